"""Products of torch tensors on a GPU by the CUDA kernels: `pack` a weight once, then `linear` as often as is wanted.

Everything is started on torch's current stream of the device of x; scratch memory is torch's; nothing waits. So calls
may be captured in a CUDA graph, once each kernel that they need was loaded by a call before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from .. import layout, layout_mma16, lut_reference
from ..lut_spec import ACTIVATIONS, Activation, LutParts, LutSpec, Mode
from . import driver, launch, load, tables

NUMBERS: Mapping[torch.dtype, int] = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
"""Types as cpu/paredown.h numbers them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceWeight:
    """A weight on a GPU in the layout of the kernels of one kind; `low` is (n, rank) filled up to whole 32 columns."""

    spec: LutSpec
    kind: launch.Kind
    codes: UInt8[Tensor, "bytes"]
    table: UInt8[Tensor, "tables table_bytes"]
    scale: Float[Tensor, "blocks slots 16"]
    values: Float[Tensor, "tables levels"]
    low: Float[Tensor, "n columns"] | None = None
    rank: int = 0
    arguments: Mapping[str, Tensor | int] = field(init=False, repr=False)
    """What kernels are told of the weight, by the names of `launch`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", _weight(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a batch is multiplied: into how many parts the inputs are cut, and what is started."""

    parts: int
    quantize: launch.Launch
    pad: launch.Launch
    linear: launch.Launch
    reduce: launch.Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a call runs: the index of the device, its multiprocessors, and the stream as the driver knows it."""

    device: int
    processors: int
    stream: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """One product: x as the kernels read it, what is added, and where."""

    x: Tensor
    weight: DeviceWeight
    bias: Tensor | None
    activation: Activation
    low_x: Tensor | None
    place: Place


def refusal(spec: LutSpec, mode: Mode, dtype: torch.dtype, table: torch.dtype) -> str:
    """Return "" if the kernels multiply such a weight with activations of `dtype`, else the reason."""
    if dtype not in NUMBERS:
        return f"the CUDA kernels have no activations of {dtype}".replace("torch.", "")
    if mode == "exact" and dtype == torch.float32:
        return "the CUDA kernels multiply float32 in int8 mode only; use float16 or bfloat16"
    if mode == "int8" and table != torch.uint8:
        return f"int8 products need a table of bytes, this one is {table}".replace("torch.", "")
    return launch.refusal(spec, "s8" if mode == "int8" else "f16")


def pack(parts: LutParts, spec: LutSpec, kind: launch.Kind, low: Tensor | None = None) -> DeviceWeight:
    """Return a weight of layout "c16" for the kernels; `low` (n, rank) is the dense left factor, of the dtype of x.

    The codes take as many bytes as before, and the old ones are not kept.
    """
    codes = parts.codes.new_empty(layout_mma16.codes_bytes(spec))
    sizes = {"n": spec.n, "bits": spec.bits, "steps": layout.steps(spec), "units": layout_mma16.shape(spec).units}
    _start("repack", launch.repack(spec), {"c16": parts.codes, **sizes, "codes": codes}, _place(codes))
    return DeviceWeight(
        spec=spec,
        kind=kind,
        codes=codes,
        table=tables.device_table(parts.table, spec, kind),
        scale=layout_mma16.pack_scale(layout.unpack_scale(tables.device_scale(parts.scale), spec), spec).contiguous(),
        values=tables.dense_table(parts.table, spec).contiguous(),
        low=None if low is None else functional.pad(low, (0, -low.shape[1] % 32)).contiguous(),
        rank=0 if low is None else low.shape[1],
    )


def linear(
    x: Float[Tensor, "... k"],
    weight: DeviceWeight,
    *,
    bias: Float[Tensor, "n"] | None = None,
    activation: Activation = "",
    low_x: Float[Tensor, "... rank"] | None = None,
) -> Float[Tensor, "... n"]:
    """Return act(x W^T + low_x low^T + bias) in the dtype of x, which must suit the kind of the weight."""
    spec = weight.spec
    rows = x.reshape(-1, spec.k)
    if rows.numel() == 0:
        return x.new_empty((*x.shape[:-1], spec.n))
    call = _Call(
        x=rows if rows.stride(1) == 1 else rows.contiguous(),
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        activation=activation,
        low_x=None if low_x is None else low_x.reshape(-1, weight.rank).contiguous(),
        place=_place(x),
    )
    if weight.kind != "s8" and len(rows) > launch.TILE_M:
        y = _finish(call, functional.linear(call.x, _dense(call)))
    elif x.dtype == torch.float32 and low_x is not None:  # the kernels' low-rank term has halves, which is not exact
        y = _finish(
            call, _product(_Call(x=call.x, weight=weight, bias=None, activation="", low_x=None, place=call.place))
        )
    else:
        y = _product(call)
    return y.reshape(*x.shape[:-1], spec.n)


def refuse_capture(reason: str) -> None:
    """Raise CudaError if a graph is being captured on torch's current stream."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise driver.CudaError(f"{reason}, and cannot be while a graph is captured: call it once before")


def _product(call: _Call) -> Tensor:
    """Return the whole product by gemv_* or tile_*."""
    n, m = call.weight.spec.n, len(call.x)
    plan = _plan(call.weight.spec, call.weight.kind, m, call.place.processors)
    y = call.x.new_empty(m, n)
    into = y if plan.parts == 1 else y.new_empty((plan.parts, m, n), dtype=torch.float32)
    values = {**call.weight.arguments, **_read_x(call, plan), **_added(call), "m": m, "y_stride": n, "y": into}
    _start("linear", plan.linear, values, call.place)
    if plan.parts > 1:
        _start("reduce", plan.reduce, values | {"partial": into, "splits": plan.parts, "y": y}, call.place)
    return y


@functools.lru_cache(maxsize=4096)
def _plan(spec: LutSpec, kind: launch.Kind, m: int, processors: int) -> Plan:
    """Return the plan for a batch; working it out takes longer than starting it."""
    form = launch.choose(spec, m, processors)
    parts = launch.splits(spec, m, form, processors)
    return Plan(
        parts=parts,
        quantize=launch.quantize(spec, m),
        pad=launch.pad(spec, m),
        linear=launch.linear(spec, m, kind, form, parts),
        reduce=launch.reduce(spec.n, m),
    )


def _read_x(call: _Call, plan: Plan) -> dict[str, Tensor | int]:
    """Return x as the kernels read it: rounded to bytes, in place, or filled up."""
    spec, x, stride = call.weight.spec, call.x, call.x.stride(0)
    given = {**call.weight.arguments, "x": x, "m": len(x), "x_stride": stride, "x_type": NUMBERS[x.dtype]}
    if call.weight.kind == "s8":
        size, scales = launch.quantized_sizes(spec, len(x))
        q, q_scale = x.new_empty(size, dtype=torch.int8), x.new_empty(scales, dtype=torch.float32)
        _start("quantize", plan.quantize, {**given, "q": q, "q_scale": q_scale}, call.place)
        return {"x": q, "x_scale": q_scale, "x_stride": 0}
    if launch.reads_in_place(spec, stride, x.data_ptr()):
        return {"x": x, "x_scale": 0, "x_stride": stride}
    columns = launch.padded_columns(spec)
    filled = x.new_empty(len(x), columns)
    _start("pad", plan.pad, {**given, "out": filled}, call.place)
    return {"x": filled, "x_scale": 0, "k": columns, "x_stride": columns}


def _dense(call: _Call) -> Tensor:
    """Return W decoded to the dtype of x, in scratch memory."""
    w = call.x.new_empty(call.weight.spec.n, call.weight.spec.k)
    values = {**call.weight.arguments, "table": call.weight.values, "w_type": NUMBERS[w.dtype], "w": w}
    _start("dense", launch.dense(call.weight.spec), values, call.place)
    return w


def _weight(weight: DeviceWeight) -> dict[str, Tensor | int]:
    spec, sizes = weight.spec, layout_mma16.shape(weight.spec)
    return {
        "codes": weight.codes,
        "table": weight.table,
        "scale": weight.scale,
        "scale_type": NUMBERS[weight.scale.dtype],
        "n": spec.n,
        "k": spec.k,
        "bits": spec.bits,
        "group": spec.group_columns,
        "table_rows": spec.table_rows,
        "group_steps": sizes.group_steps,
        "units": sizes.units,
        "slots": sizes.slots,
        "steps_per_slot": sizes.steps_per_slot,
        "units_per_slot": sizes.units_per_slot,
        "unit_bits": tables.float_bits(spec.unit),
        "shift_bits": tables.shift_bits(spec, weight.kind),
    }


def _added(call: _Call) -> dict[str, Tensor | int]:
    """Return what the kernels add and apply at the end."""
    low, low_x, y_type = call.weight.low, call.low_x, NUMBERS[call.x.dtype]
    has_low = low is not None and low_x is not None
    return {
        "bias": 0 if call.bias is None else call.bias,
        "has_bias": int(call.bias is not None),
        "low": low if low is not None and has_low else 0,
        "low_x": low_x if low_x is not None and has_low else 0,
        "rank": call.weight.rank if has_low else 0,
        "low_stride": call.weight.rank if has_low else 0,
        "y_type": y_type,
        "low_type": y_type,
        "activation": ACTIVATIONS.index(call.activation),
    }


def _finish(call: _Call, y: Tensor) -> Tensor:
    """Return act(y + low_x low^T + bias), by torch."""
    if call.low_x is not None and call.weight.low is not None:
        y = torch.addmm(y, call.low_x, call.weight.low[:, : call.weight.rank].T.to(call.low_x.dtype))
    if call.bias is not None:
        y = y + call.bias
    return lut_reference.activate(y, call.activation)


def _start(kernel: str, start: launch.Launch, values: Mapping[str, Tensor | int], place: Place) -> None:
    """Start a kernel with its arguments, which are found by their names."""
    given = (values[name] for name in launch.ARGUMENTS[kernel])
    arguments = [value if isinstance(value, int) else value.data_ptr() for value in given]
    function = _function(start.unit, start.name, start.shared, place.device)
    driver.launch(function, start.grid, start.block, arguments, place.stream)


@functools.cache
def _function(unit: str, name: str, shared: int, device: int) -> driver.Function:
    refuse_capture(f"{name} is not loaded yet")
    return load.function(unit, name, device, shared)


def _place(x: Tensor) -> Place:
    if not x.is_cuda:
        raise ValueError(f"the CUDA kernels take tensors on a GPU, this one is on {x.device}")
    index = x.get_device()
    return Place(device=index, processors=_processors(index), stream=torch.cuda.current_stream(index).cuda_stream)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
