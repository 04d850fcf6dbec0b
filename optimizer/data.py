"""Calibration data: what a user's data function returned, as checked batches of the network's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .entry import user_code
from .errors import InputError, nearest
from .model import InputSpec

WHERE = "the data entry"
Batch: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Batches of inputs in the network's order, on the CPU.

    axes: for each input the dimension that counts samples; None where it has none, and every batch gets it whole.
    unit: how many samples the network wants at a time, where its batch size is a number; 0 = any.
    """

    batches: tuple[Batch, ...]
    samples: int
    axes: tuple[int | None, ...] = (0,)
    unit: int = 0


def batches(result: Any, inputs: tuple[InputSpec, ...], samples: int) -> Calibration:
    """Take the first `samples` samples of what a data function returned.

    That is all samples at once (a tensor or array, a tuple with one per input, a dict by input name), or an iterable of
    such batches. What a tuple holds beyond the inputs (labels) is dropped. A plain list is an iterable of batches.
    Raises InputError for data that does not fit the inputs, is not finite, or is too little.
    """
    axes, unit = _axes(inputs)
    taken: list[Batch] = []
    count = 0
    if samples % (unit or 1):
        raise InputError(
            f"{samples} samples do not divide into batches of {unit}", where=WHERE, fix=f"ask for a multiple of {unit}"
        )
    for index, item in enumerate(_items(result)):
        batch = _checked(_by_input(item, inputs, index), inputs, index)
        size = _size(batch, axes, index)
        batch = _cut(batch, axes, slice(0, min(size, samples - count)))
        taken += _pieces(batch, axes, unit) if unit else [batch]
        count += min(size, samples - count)
        if count == samples:
            return Calibration(batches=tuple(taken), samples=samples, axes=axes, unit=unit)
    if not count:
        raise InputError("it gave no samples", where=WHERE, fix="return at least one batch")
    raise InputError(f"asked for {samples} samples, it gave {count}", where=WHERE, fix=f"set samples: {count}")


def rebatch(calibration: Calibration, size: int) -> Calibration:
    """Return the same samples in the same order, at most `size` at a time and of equal sizes as far as they go.

    A network with a fixed batch size keeps its batches.
    """
    if size < 1:
        raise InputError(f"a batch of {size} samples is empty", fix="use 1 or more")
    if calibration.unit:
        return calibration
    axes, parts = calibration.axes, list[Batch]()
    for _, run in groupby(calibration.batches, key=lambda batch: _other_sizes(batch, axes)):
        for batch in _joined(list(run), axes, size):
            parts += _pieces(batch, axes, size)
    return replace(calibration, batches=tuple(parts))


def split(calibration: Calibration, fraction: float, seed: int) -> tuple[Calibration, Calibration]:
    """Return what to fit on and what is held out: `fraction` of the samples, at least one, drawn with the seed."""
    unit = calibration.unit or 1
    total = calibration.samples // unit
    held = max(1, round(total * fraction)) if 0 < fraction < 1 else total
    if held >= total:
        raise InputError(
            f"{calibration.samples} samples cannot be split with {fraction} of them held out",
            where=WHERE,
            fix="give more samples, or a fraction between 0 and 1",
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[order[:held]] = True
    mask = chosen.repeat_interleave(unit)
    return _where(calibration, ~mask), _where(calibration, mask)


def _axes(inputs: tuple[InputSpec, ...]) -> tuple[tuple[int | None, ...], int]:
    """Return the sample dimension of each input, and the batch size if it is a number."""
    if not inputs or not inputs[0].shape:
        raise InputError("the first input has no dimension that counts samples", where=WHERE)
    first = inputs[0].shape[0]
    if isinstance(first, str):
        return tuple(spec.shape.index(first) if first in spec.shape else None for spec in inputs), 0
    return tuple(0 if spec.shape and spec.shape[0] == first else None for spec in inputs), first


def _items(result: Any) -> Iterator[Any]:
    """Yield one batch after another; what the user's own iterator raises names its line."""
    if isinstance(result, (Tensor, np.ndarray, Mapping)) or _is_batch(result):
        yield result
        return
    if not isinstance(result, Iterable) or isinstance(result, (str, bytes)):
        raise InputError(
            f"it returned {type(result).__name__}", where=WHERE, fix="return a tensor, or an iterable of batches"
        )
    with user_code(WHERE):
        iterator = iter(result)
    while True:
        with user_code(WHERE):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _is_batch(result: Any) -> bool:
    return isinstance(result, tuple) and bool(result) and all(isinstance(x, (Tensor, np.ndarray)) for x in result)


def _by_input(item: Any, inputs: tuple[InputSpec, ...], index: int) -> list[Any]:
    """Return the values of one batch in the order of the inputs."""
    if isinstance(item, Mapping):
        for spec in inputs:
            if spec.name not in item:
                raise InputError(f'batch {index} lacks the input "{spec.name}"', where=WHERE, fix=_keys(spec, item))
        return [item[spec.name] for spec in inputs]
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(values) < len(inputs):
        raise InputError(
            f"batch {index} holds {_count(len(values), 'tensor')}, the network has {_count(len(inputs), 'input')}",
            where=WHERE,
            fix="return one tensor per input: " + ", ".join(spec.name for spec in inputs),
        )
    return values[: len(inputs)]


def _keys(spec: InputSpec, item: Mapping[Any, Any]) -> str:
    return nearest(spec.name, map(str, item)) if item else "return a dict with one tensor per input"


def _checked(values: Sequence[Any], inputs: tuple[InputSpec, ...], index: int) -> Batch:
    """Return one batch in the declared dtypes; shapes, named dimensions and finiteness hold."""
    sizes: dict[str, tuple[int, str]] = {}
    batch: list[Tensor] = []
    for value, spec in zip(values, inputs, strict=True):
        tensor = _tensor(value, spec, index)
        for name, size in _sizes(tensor, spec, index).items():
            known, other = sizes.setdefault(name, (size, spec.name))
            if known != size:
                raise InputError(
                    f'batch {index}: "{name}" is {known} in input "{other}" and {size} in input "{spec.name}"',
                    where=WHERE,
                    fix="give both the same size",
                )
        batch.append(_finite(_cast(tensor, spec, index), spec, index))
    return tuple(batch)


def _tensor(value: Any, spec: InputSpec, index: int) -> Tensor:
    try:
        tensor = (
            torch.from_numpy(np.require(value, requirements=["C", "W"])) if isinstance(value, np.ndarray) else value
        )
    except TypeError:
        tensor = value.dtype
    if isinstance(tensor, Tensor):
        return tensor.detach().cpu()
    got = f"an array of {tensor}" if isinstance(value, np.ndarray) else type(value).__name__
    raise InputError(f'batch {index}, input "{spec.name}" is {got}', where=WHERE, fix="return tensors or numpy arrays")


def _sizes(tensor: Tensor, spec: InputSpec, index: int) -> dict[str, int]:
    """Return the named dimensions. The first one, if a number, may come several times over."""
    wanted = spec.shape
    fits = tensor.ndim == len(wanted) and all(
        isinstance(want, str) or size == want or (axis == 0 and size and size % want == 0)
        for axis, (size, want) in enumerate(zip(tensor.shape, wanted, strict=True))
    )
    if not fits:
        raise InputError(
            f'batch {index}, input "{spec.name}" has shape {_list(tensor.shape)}, the recipe says {_list(wanted)}',
            where=WHERE,
            fix="return batches of that shape, or mend inputs in the recipe",
        )
    return {want: size for size, want in zip(tensor.shape, wanted, strict=True) if isinstance(want, str)}


def _cast(tensor: Tensor, spec: InputSpec, index: int) -> Tensor:
    """Return the tensor in the declared dtype: floats to floats, whole numbers to whole numbers that hold them."""
    wanted: torch.dtype = getattr(torch, spec.dtype)
    if tensor.dtype == wanted:
        return tensor
    both_float = tensor.is_floating_point() and wanted.is_floating_point
    if both_float or (_is_whole(tensor.dtype) and _is_whole(wanted) and _holds(tensor, wanted)):
        return tensor.to(wanted)
    raise InputError(
        f'batch {index}, input "{spec.name}" is {_name(tensor.dtype)}, the recipe says {spec.dtype}',
        where=WHERE,
        fix=f"convert it in the entry, or write dtype: {_name(tensor.dtype)}",
    )


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _holds(tensor: Tensor, wanted: torch.dtype) -> bool:
    limits = torch.iinfo(wanted)
    return not tensor.numel() or (int(tensor.min()) >= limits.min and int(tensor.max()) <= limits.max)


def _finite(tensor: Tensor, spec: InputSpec, index: int) -> Tensor:
    if tensor.is_floating_point():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InputError(
                f'batch {index}, input "{spec.name}" has {bad} of {tensor.numel()} values that are NaN or infinite',
                where=WHERE,
                fix="remove them in the entry",
            )
    return tensor


def _size(batch: Batch, axes: Sequence[int | None], index: int) -> int:
    sizes = [x.shape[axis] for x, axis in zip(batch, axes, strict=True) if axis is not None]
    if len(set(sizes)) > 1:
        raise InputError(f"batch {index} has {sizes[0]} samples of one input and {sizes[1]} of another", where=WHERE)
    if not sizes[0]:
        raise InputError(f"batch {index} is empty", where=WHERE, fix="return batches with samples")
    return sizes[0]


def _count_of(batch: Batch, axes: Sequence[int | None]) -> int:
    return _size(batch, axes, 0)


def _cut(batch: Batch, axes: Sequence[int | None], part: slice) -> Batch:
    return tuple(
        x if axis is None else x.narrow(axis, part.start, part.stop - part.start)
        for x, axis in zip(batch, axes, strict=True)
    )


def _pieces(batch: Batch, axes: Sequence[int | None], size: int) -> list[Batch]:
    count = _count_of(batch, axes)
    return [_cut(batch, axes, slice(first, min(first + size, count))) for first in range(0, count, size)]


def _joined(run: list[Batch], axes: Sequence[int | None], size: int) -> list[Batch]:
    """Concatenate batches of one shape, unless they divide evenly already or share an input without samples."""
    uneven = any(_count_of(batch, axes) % size for batch in run[:-1])
    if not uneven or None in axes:
        return run
    columns = zip(*run, strict=True)
    return [tuple(torch.cat(column, dim=axis or 0) for column, axis in zip(columns, axes, strict=True))]


def _other_sizes(batch: Batch, axes: Sequence[int | None]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(size for i, size in enumerate(x.shape) if i != axis) for x, axis in zip(batch, axes, strict=True)
    )


def _where(calibration: Calibration, mask: Tensor) -> Calibration:
    """Keep the samples that a mask names."""
    kept: list[Batch] = []
    first, axes = 0, calibration.axes
    for batch in calibration.batches:
        size = _count_of(batch, axes)
        index = mask[first : first + size].nonzero().flatten()
        first += size
        if len(index):
            pairs = zip(batch, axes, strict=True)
            kept.append(tuple(x if axis is None else x.index_select(axis, index) for x, axis in pairs))
    return replace(calibration, batches=tuple(kept), samples=int(mask.sum()))


def _list(shape: Iterable[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
