"""Prove an exported file equal to the model, and name the first layer that is not.

The truth is `model.module()` in torch; the file runs through a `Runner`. Every output is compared at two batch sizes,
so that a size that the trace has baked in is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..optimizer import activations
from ..optimizer.errors import ExportError, InputError, RecipeError
from ..optimizer.model import Model
from ..optimizer.weight import Dense
from . import onnx_integer
from .difference import argmax_agreement, difference
from .onnx_layers import Search, first_bad_layer
from .runner import Open, Runner, RunnerOptions

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest |a - b| / max |a| by the narrowest dtype of the weights: some 10 steps of its mantissa."""
TOLERANCE_FLOAT32 = 1e-4
TOLERANCE_INT8 = 2e-2
"""With int8 activations: a value that two roundings see on two sides of a half moves a code, and codes behind it."""
LEAST_AGREEMENT = 0.995
"""Part of the rows whose argmax int8 activations must keep, of outputs of `ENOUGH_ROWS` rows or more."""
ENOUGH_ROWS = 200


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spec:
    """How a file is compared: batch sizes, and a tolerance `rel` (None: by the dtype of the weights).

    inputs: real inputs, one tensor per input of the model, of which the first rows are used; seeded ones without it.
    kernels: whether our library computes the operators that it has.
    """

    batches: tuple[int, ...] = (1, 3)
    rel: float | None = None
    inputs: tuple[Tensor, ...] = ()
    seed: int = 0
    kernels: bool = True

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise RecipeError(f"batches={list(self.batches)} must be positive sizes", where="verify")
        if self.rel is not None and not self.rel > 0:
            raise RecipeError(f"rel={self.rel} must be positive", where="verify")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison: `rel` is the largest |a - b| / max |a| of any output, `max_abs` the largest |a - b|.

    argmax_agreement: part of the rows (last dimension) with the same largest entry, of the worst output; None without
    a floating output of two or more dimensions. first_bad_layer: "module (value)", None where all is well or unknown.
    agreement_limit: what the agreement must reach, None with float activations or too few rows to tell.
    float_operators: what computes in float between int8 layers.
    """

    runtime: str
    batch: int
    max_abs: float
    rel: float
    argmax_agreement: float | None
    first_bad_layer: str | None
    size_bytes: int
    agreement_limit: float | None = None
    float_operators: tuple[str, ...] = ()


def verify(model: Model, path: Path, open_: Open, spec: Spec | None = None) -> list[Row]:
    """Return one row per batch size; ExportError, with the first bad layer, where a row exceeds the tolerance."""
    spec = spec or Spec()
    rows = compare(model, path, open_, spec)
    judge(rows, path, tolerance(model, spec))
    return rows


def judge(rows: Sequence[Row], path: Path, limit: float) -> None:
    """Raise ExportError, with the first bad layer, where a row exceeds `limit`."""
    for row in rows:
        if not row.rel <= limit:
            where = f", first in {row.first_bad_layer}" if row.first_bad_layer else ""
            raise ExportError(
                f"outputs differ from torch by {row.rel:.1e} of their range at batch {row.batch}, "
                f"{limit:.0e} is allowed{where}",
                where=f"{path.name} in {row.runtime}",
                fix="look at that layer: a Python branch on sizes is traced only once, noise differs in each run",
            )
        if row.agreement_limit is not None and not (row.argmax_agreement or 0.0) >= row.agreement_limit:
            raise ExportError(
                f"{row.argmax_agreement} of the rows have the largest entry where torch has it at batch {row.batch}, "
                f"{row.agreement_limit} must",
                where=f"{path.name} in {row.runtime}",
                fix="give activations more range, or leave them float",
            )


def compare(model: Model, path: Path, open_: Open, spec: Spec) -> list[Row]:
    """Return one row per batch size, the first bad one with its first bad layer."""
    options = RunnerOptions(exact=True, kernels=spec.kernels)
    module, runner, limit = model.module(), open_(path, options), tolerance(model, spec)
    rows: list[Row] = []
    floats = onnx_integer.check(path, activations.layers(model)).floats if model.acts and path.suffix == ".onnx" else ()
    for batch in _batches(model, spec):
        inputs = _inputs(model, spec, batch)
        with torch.no_grad():
            want = [value.numpy(force=True) for value in _tensors(module(*inputs))]
        have = _run(runner, model, inputs)
        if len(want) != len(have):
            raise ExportError(f"the file has {len(have)} outputs, the network {len(want)}", where=path.name)
        row = _row(runner.name, batch, want, have)
        bad = [i for i, pair in enumerate(zip(want, have, strict=True)) if not difference(*pair)[1] <= limit]
        if bad and path.suffix == ".onnx" and all(known.first_bad_layer is None for known in rows):
            search = Search(open_=open_, options=options, inputs=inputs, limit=limit, output=bad[0])
            row = replace(row, first_bad_layer=first_bad_layer(model, path, search))
        agreement = LEAST_AGREEMENT if _rounds(model) and _enough(want) else None
        size = artifact_bytes(path)
        rows.append(replace(row, size_bytes=size, agreement_limit=agreement, float_operators=floats))
    return rows


def tolerance(model: Model, spec: Spec) -> float:
    """Return the largest `rel` that passes."""
    if spec.rel is not None:
        return spec.rel
    dtypes = {w.values.dtype if isinstance(w, Dense) else w.dtype for w in model.weights.values()}
    least = TOLERANCE_INT8 if _rounds(model) else TOLERANCE_FLOAT32
    return max([least, *(TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE)])


def _rounds(model: Model) -> bool:
    return bool(model.acts or model.dynamic)


def artifact_bytes(path: Path) -> int:
    """Return the bytes of a file and of the external weights beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def _row(runtime: str, batch: int, want: Sequence[np.ndarray], have: Sequence[np.ndarray]) -> Row:
    differences = [difference(a, b) for a, b in zip(want, have, strict=True)]
    return Row(
        runtime=runtime,
        batch=batch,
        max_abs=max((absolute for absolute, _ in differences), default=0.0),
        rel=max((rel for _, rel in differences), default=0.0),
        argmax_agreement=argmax_agreement(want, have),
        first_bad_layer=None,
        size_bytes=0,
    )


def _enough(outputs: Sequence[np.ndarray]) -> bool:
    """Whether every floating output is rows of entries (no image), and enough of them."""
    floating = [value for value in outputs if np.issubdtype(value.dtype, np.floating)]
    return all(value.ndim in (2, 3) and value.size >= ENOUGH_ROWS * value.shape[-1] for value in floating)


def _batches(model: Model, spec: Spec) -> tuple[int, ...]:
    """Return the batch sizes to try: one, if no input has a named dimension."""
    if _batch_name(model) is None:
        fixed = [spec.shape[0] for spec in model.inputs if spec.shape]
        return (int(fixed[0]) if fixed else 1,)
    return spec.batches


def _batch_name(model: Model) -> str | None:
    return next((size for spec in model.inputs for size in spec.shape if isinstance(size, str)), None)


def _inputs(model: Model, spec: Spec, batch: int) -> tuple[Tensor, ...]:
    """Return the first `batch` rows of the real inputs, else seeded ones."""
    name = _batch_name(model)
    if not spec.inputs or name is None:
        return spec.inputs or model.examples(batch, spec.seed)
    cut = []
    for known, value in zip(model.inputs, spec.inputs, strict=True):
        known.sizes(value)
        for axis, size in enumerate(known.shape):
            if size == name and value.shape[axis] < batch:
                have = f"{value.shape[axis]} rows were given, {batch} are needed"
                raise InputError(have, where=f'verify, input "{known.name}"', fix="give more, or smaller batches")
            value = value.narrow(axis, 0, batch) if size == name else value
        cut.append(value.contiguous())
    return tuple(cut)


def _run(runner: Runner, model: Model, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    names = [spec.name for spec in model.inputs]
    return list(runner.run({name: value.numpy() for name, value in zip(names, inputs, strict=True)}).values())


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
