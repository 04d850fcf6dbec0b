"""Prove an exported file equal to the model, and name the first layer that is not.

The truth is `model.module()` in torch; the file runs through a `Runner`. Every output is compared at two batch sizes,
so that a size that the trace has baked in is seen. The weights in an ONNX file are compared too, byte by byte: outputs
within a tolerance do not see a few wrong codes.

Where inputs are rounded at run time, two correct evaluations differ: a value near the middle of two codes falls to
either side by the last bit of a sum, and what it moves makes others fall. How far, the network itself tells: torch is
asked a second time, with parameters changed in their last bits, and a file may differ by `SLACK` times that, at most
by `MOST`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..optimizer import activations
from ..optimizer.errors import ExportError, InputError, RecipeError
from ..optimizer.model import Model
from ..optimizer.weight import Dense
from . import onnx_integer, onnx_stored
from .difference import argmax_agreement, difference
from .onnx_layers import Search, first_bad_layer
from .runner import Open, Runner, RunnerOptions, arrays

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest |a - b| / max |a| by the narrowest dtype of the weights: some 10 steps of its mantissa."""
TOLERANCE_FLOAT32 = 1e-4
TOLERANCE_INT8 = 2e-2
"""With int8 activations: a value that two roundings see on two sides of a half moves a code, and codes behind it."""
LAST_BITS = 2.0**-21
"""Spread of the relative change of parameters that stands for another order of sums: four steps of a float32."""
SLACK = 2.0
"""How much further than torch from itself a file may be from torch."""
MOST = 0.1
"""What is never allowed: a network that its own last bits move further cannot be verified."""
LEAST_MOVED_AGREEMENT = 0.9
LEAST_AGREEMENT = 0.995
"""Part of the rows whose argmax int8 activations must keep, of outputs of `ENOUGH_ROWS` rows or more."""
ENOUGH_ROWS = 200
CHANGED, AGAIN = "are not those of the stored model", "the file was changed since: export it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An ONNX file that is asked for the inner values of an artifact that keeps none, `at_once` of them a time."""

    path: Path
    open_: Open
    at_once: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spec:
    """How a file is compared: batch sizes, and a tolerance `rel` (None: by the dtype of the weights).

    inputs: real inputs, one tensor per input of the model, of which the first rows are used; seeded ones without it.
    kernels: whether our library computes the operators that it has. graph: where the first bad layer is looked for;
    None: in the artifact itself, if it is an ONNX file.
    """

    batches: tuple[int, ...] = (1, 3)
    rel: float | None = None
    inputs: tuple[Tensor, ...] = ()
    seed: int = 0
    kernels: bool = True
    graph: Graph | None = None

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
    limit: what `rel` must not exceed.
    agreement_limit: what the agreement must reach, None with float activations or too few rows to tell.
    float_operators: what computes in float between int8 layers.
    weights_equal: tensors of an ONNX file that are the model's to the bit. weights_wrong: bytes of one that are not.
    """

    runtime: str
    batch: int
    max_abs: float
    rel: float
    argmax_agreement: float | None
    first_bad_layer: str | None
    size_bytes: int
    limit: float
    agreement_limit: float | None = None
    float_operators: tuple[str, ...] = ()
    weights_equal: int = 0
    weights_wrong: str = ""


def verify(model: Model, path: Path, open_: Open, spec: Spec | None = None) -> list[Row]:
    """Return one row per batch size; ExportError, with the first bad layer, where a row exceeds the tolerance."""
    spec = spec or Spec()
    rows = compare(model, path, open_, spec)
    judge(rows, path)
    return rows


def judge(rows: Sequence[Row], path: Path) -> None:
    """Raise ExportError, with the first bad layer, where a row exceeds its limits."""
    for row in rows:
        if not row.rel <= row.limit:
            where = f", first in {row.first_bad_layer}" if row.first_bad_layer else ""
            cause = f"; {row.weights_wrong} {CHANGED}" if row.weights_wrong else ""
            look = "look at that layer: a Python branch on sizes is traced only once, noise differs in each run"
            raise ExportError(
                f"outputs differ from torch by {row.rel:.1e} of their range at batch {row.batch}, "
                f"{row.limit:.0e} is allowed{where}{cause}",
                where=f"{path.name} in {row.runtime}",
                fix=AGAIN if cause else look,
            )
        if row.agreement_limit is not None and not (row.argmax_agreement or 0.0) >= row.agreement_limit:
            raise ExportError(
                f"{row.argmax_agreement} of the rows have the largest entry where torch has it at batch {row.batch}, "
                f"{row.agreement_limit:.3g} must",
                where=f"{path.name} in {row.runtime}",
                fix="give activations more range, or leave them float",
            )
    if rows and rows[0].weights_wrong:
        raise ExportError(f"{rows[0].weights_wrong} {CHANGED}", where=path.name, fix=AGAIN)


def compare(model: Model, path: Path, open_: Open, spec: Spec) -> list[Row]:
    """Return one row per batch size, the first bad one with its first bad layer."""
    options = RunnerOptions(exact=True, kernels=spec.kernels)
    module, runner = model.module(), open_(path, options)
    nudged = _nudged(model.module(), spec.seed) if _rounds(model) and spec.rel is None else None
    graph = spec.graph or (Graph(path=path, open_=open_) if path.suffix == ".onnx" else None)
    rows: list[Row] = []
    is_onnx = path.suffix == ".onnx"
    floats = onnx_integer.check(path, activations.layers(model)).floats if model.acts and is_onnx else ()
    stored = onnx_stored.compare(path, model) if is_onnx else onnx_stored.Stored()
    for batch in _batches(model, spec):
        inputs = _inputs(model, spec, batch)
        want = _outputs(module, inputs)
        have = _run(runner, model, inputs)
        if len(want) != len(have):
            raise ExportError(f"the file has {len(have)} outputs, the network {len(want)}", where=path.name)
        allowed = _allowed(model, spec, want, want if nudged is None else _outputs(nudged, inputs))
        row = replace(_row(runner.name, batch, (want, have), allowed), size_bytes=artifact_bytes(path))
        bad = [i for i, pair in enumerate(zip(want, have, strict=True)) if not difference(*pair)[1] <= row.limit]
        if bad and graph and all(known.first_bad_layer is None for known in rows):
            search = Search(
                open_=graph.open_,
                options=options,
                inputs=inputs,
                limit=row.limit,
                output=bad[0],
                at_once=graph.at_once,
            )
            row = replace(row, first_bad_layer=first_bad_layer(model, graph.path, search))
        rows.append(replace(row, float_operators=floats, weights_equal=stored.equal, weights_wrong=stored.wrong))
    return rows


def tolerance(model: Model, spec: Spec) -> float:
    """Return the largest `rel` that passes where nothing is rounded at run time, and the least there."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Allowed:
    """What an output may differ: `limit` of `rel`, and the `agreement` that it must reach."""

    limit: float
    agreement: float | None


def _allowed(model: Model, spec: Spec, want: Sequence[np.ndarray], again: Sequence[np.ndarray]) -> _Allowed:
    """Return what is allowed; `again`: the same outputs with parameters changed in their last bits."""
    limit = tolerance(model, spec)
    if not _rounds(model):
        return _Allowed(limit=limit, agreement=None)
    moved = max((difference(*pair)[1] for pair in zip(want, again, strict=True)), default=0.0)
    kept = argmax_agreement(want, again)
    least = min(LEAST_AGREEMENT, max(LEAST_MOVED_AGREEMENT, 1 - SLACK * (1 - (1.0 if kept is None else kept))))
    return _Allowed(limit=max(limit, min(SLACK * moved, MOST)), agreement=least if _enough(want) else None)


def _nudged(module: nn.Module, seed: int) -> nn.Module:
    """Change the parameters of a module in their last bits, at random, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                spread = max(LAST_BITS, torch.finfo(parameter.dtype).eps / 2)
                change = 1 + spread * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter.float() * change)
    return module


def _outputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        return [value.numpy(force=True) for value in _tensors(module(*inputs))]


def _row(runtime: str, batch: int, pair: tuple[Sequence[np.ndarray], Sequence[np.ndarray]], allowed: _Allowed) -> Row:
    want, have = pair
    differences = [difference(a, b) for a, b in zip(want, have, strict=True)]
    return Row(
        runtime=runtime,
        batch=batch,
        max_abs=max((absolute for absolute, _ in differences), default=0.0),
        rel=max((rel for _, rel in differences), default=0.0),
        argmax_agreement=argmax_agreement(want, have),
        first_bad_layer=None,
        size_bytes=0,
        limit=allowed.limit,
        agreement_limit=allowed.agreement,
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
    return list(runner.run(arrays(model.inputs, inputs)).values())


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
