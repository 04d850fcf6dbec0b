"""The CUDA kernels by name: their arguments, and the blocks, threads and shared memory that each is started with.

A product x W^T of m rows takes, on the device and in this order:

    m <= 16    gemv_*: one block per 16 or 32 rows of W, whose 8 warps share out the inputs
    m > 16     tile_*: blocks of 128 rows of W x 32 or 64 rows of x. With `splits` > 1 each block has a part of the
               inputs, y is float32 (splits, m, n), and `reduce` adds the parts in a fixed order and finishes
    m > 128    exact mode: `dense` decodes W, and the host calls cuBLAS. int8 mode stays with tile_*

W is in layout mma16 (../layout_mma16.py), its table as tables.py makes it. In int8 mode `quantize` runs first. In exact
mode x is read in place where `reads_in_place`; else `pad` runs first, and x is then (m, 128 units) without gaps.

Arguments are pointers and int32 alone, inputs first and the output last, which TensorRT demands of plugins. An input
that is not there (x_scale, bias, low, low_x) may be any pointer: its flag, rank or kind says so. Float arguments travel
as their bits. No kernel allocates, waits or keeps anything, so all may be captured in a graph; sums are always added in
the same order, so the same inputs give the same bits. None of these kernels was ever executed on a GPU: they compile,
and tests/kernels/test_cuda_kernels.py runs their source on an emulated warp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from .. import layout, layout_mma16
from ..lut_spec import LutSpec, Mode
from .sources import unit_of

Kind: TypeAlias = Literal["f16", "f16b", "bf16", "s8"]
KINDS: Mapping[str, str] = {
    "f16": "x and table entries in float16",
    "f16b": "x in float16, a table of bytes whose zero point is whole: 4 bits, where looking up halves costs most",
    "bf16": "x and table entries in bfloat16",
    "s8": "x rounded to bytes by `quantize`, a table of bytes",
}

THREADS, WARPS = 256, 8
X_TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What `quantize` rounds."""

GEMV_M, TILE_M = 16, 128
"""The most rows of x that gemv_* take, and up to which tile_* is chosen in exact mode."""

INPUTS = ("codes", "table", "scale", "x", "x_scale", "bias", "low", "low_x")
"""Pointers that every linear kernel takes first.

`scale` [block][slot][16] of scale_type. `x` halves, or bytes of `quantize`. `bias` n values of y_type. `low` (n,
low_columns) and `low_x` (m, low_stride) of low_type: the low-rank term low_x low^T; columns of `low` from `rank` to the
next multiple of 32 are 0.
"""

SIZES = ("n", "m", "k", "units", "slots", "steps_per_slot", "units_per_slot", "table_rows", "x_stride", "y_stride")
"""int32 that follow: m rows of x, of which k columns are read (those of the weight; 128 units after `pad`), x_stride
elements apart (ignored for bytes); y_stride elements between rows of y; the others are those of `layout_mma16.Shape`.
"""

_TYPES = ("scale_type", "y_type", "low_type")
_EPILOGUE = ("activation", "has_bias", "rank", "low_stride", "unit_bits", "shift_bits")
OPTIONS = (*_TYPES, *_EPILOGUE)
"""int32 that follow those; the output y is last. Types and activations are numbered as in cpu/paredown.h.

`unit_bits` is float32 `unit` as int32, `shift_bits` what `tables.shift_bits` says; `low_columns` is rank, rounded up to
a multiple of 32.
"""

_GROUPS = ("group", "group_steps", "units")
_SLOTS = ("slots", "steps_per_slot", "units_per_slot", "table_rows")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "linear": (*INPUTS, *SIZES, *OPTIONS, "y"),
    "reduce": ("partial", "bias", "n", "m", "splits", "y_stride", "y_type", "activation", "has_bias", "y"),
    "quantize": ("x", "m", "k", *_GROUPS, "steps_per_slot", "x_stride", "x_type", "q", "q_scale"),
    "pad": ("x", "m", "k", *_GROUPS, "x_stride", "out"),
    "dense": ("codes", "table", "scale", "n", "k", "bits", *_GROUPS, *_SLOTS, "scale_type", "w_type", "w"),
    "repack": ("c16", "n", "bits", "steps", "units", "codes"),
}
"""Arguments in order, by kernel; gemv_* and tile_* all take those of "linear". `group` is k where there is just one."""

POINTERS = frozenset({*INPUTS, "y", "partial", "q", "q_scale", "out", "w", "c16"})
"""Arguments that are device pointers; the others are int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A compiled form of the linear kernels: how many rows of W and of x a block of 8 warps multiplies."""

    name: str
    rows: int
    tokens: int


GEMVS = (
    Form(name="gemv_r16_m8", rows=16, tokens=8),
    Form(name="gemv_r16_m16", rows=16, tokens=16),
    Form(name="gemv_r32_m8", rows=32, tokens=8),
    Form(name="gemv_r32_m16", rows=32, tokens=16),
)
TILES = (Form(name="tile_r128_m32", rows=128, tokens=32), Form(name="tile_r128_m64", rows=128, tokens=64))
FORMS = (*GEMVS, *TILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One start of a kernel of a unit."""

    unit: str
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


def refusal(spec: LutSpec, kind: Kind) -> str:
    """Return "" if the kernels of a kind take such a weight, else the reason."""
    if spec.bits not in layout_mma16.BITS:
        return f"codes of {spec.bits} bits, the CUDA kernels have 2, 3 and 4"
    if kind == "f16b" and spec.bits != 4:
        return f"tables of bytes serve float16 at 4 bits, not {spec.bits}: use kind f16"
    if spec.table_rows % 16:
        return f"each table serves {spec.table_rows} rows, the CUDA kernels take multiples of 16"
    if kind in ("s8", "f16b") and spec.zero not in range(256):
        return f"zero point {spec.zero:g} is not whole and within 0 to 255"
    return ""


def kind_of(spec: LutSpec, table: torch.dtype, x: torch.dtype, mode: Mode) -> Kind | None:
    """Return the kind of kernel for activations of a dtype; None where there is none (float32 in exact mode)."""
    kind: Kind | None
    if mode == "int8":
        kind = "s8" if table == torch.uint8 and x in X_TYPES else None
    elif x == torch.float16:
        kind = "f16b" if table == torch.uint8 and spec.bits == 4 and spec.zero in range(256) else "f16"
    else:
        kind = "bf16" if x == torch.bfloat16 else None
    return None if kind is None or refusal(spec, kind) else kind


def choose(spec: LutSpec, m: int, processors: int) -> Form:
    """Return the form for m rows of x on a GPU of so many multiprocessors.

    Blocks of 32 rows of W halve what x costs (8 rows of x in float16 are twice the bytes of 16 rows of W at 4 bits), so
    long as there are two of them for every processor.
    """
    if m <= GEMV_M:
        paired = spec.table_rows % 32 == 0 and spec.n >= 2 * 32 * processors
        return next(form for form in GEMVS if form.rows == (32 if paired else 16) and form.tokens >= m)
    return TILES[0] if m <= TILES[0].tokens else TILES[1]


def splits(spec: LutSpec, m: int, form: Form, processors: int) -> int:
    """Return into how many parts tile_* should cut the inputs: a block for each processor, parts of 8 units or more."""
    if form not in TILES:
        return 1
    blocks = math.ceil(spec.n / form.rows) * math.ceil(m / form.tokens)
    return max(1, min(processors // blocks, layout_mma16.shape(spec).units // 8))


def linear(spec: LutSpec, m: int, kind: Kind, form: Form, parts: int = 1) -> Launch:
    """Return how the product is started; ValueError for what the kernels do not have."""
    if reason := refusal(spec, kind):
        raise ValueError(f"no CUDA kernel: {reason}")
    if parts > 1 and form not in TILES:
        raise ValueError(f"{form.name} does not cut the inputs into {parts} parts; tile_* does")
    if form.rows == 32 and spec.table_rows % 32:
        raise ValueError(f"{form.name} takes one table for 32 rows, here each serves {spec.table_rows}")
    grid = (math.ceil(spec.n / form.rows), math.ceil(m / form.tokens), parts)
    name, used = f"paredown_{form.name}_{kind}_b{spec.bits}", shared(form, spec.bits, kind)
    return Launch(unit=unit_of(kind, spec.bits), name=name, grid=grid, block=(THREADS, 1, 1), shared=used)


def shared(form: Form, bits: int, kind: Kind) -> int:
    """Return the bytes of shared memory: what is on its way (gemv.cuh, tile.cuh), or the sums of the warps after it."""
    if form in TILES:
        stage = form.tokens * 128 * (1 if kind == "s8" else 2) + WARPS * layout_mma16.unit_bytes(bits)
        return max(3 * stage, 4 * form.tokens * (form.rows + 4))
    slot = form.rows // 16 * layout_mma16.unit_bytes(bits)
    stages = min(8, 40960 // (WARPS * slot))
    return max(WARPS * stages * (slot + 8), 4 * WARPS * form.tokens * (form.rows + 4))


def reduce(n: int, m: int) -> Launch:
    """Return how the parts of tile_* are added up."""
    return _prepare("reduce", m, math.ceil(n / THREADS))


def quantize(spec: LutSpec, m: int) -> Launch:
    """Return how x is rounded to bytes: a warp for each run of up to 128 inputs."""
    runs = spec.scale_shape[1] * math.ceil(layout.group_steps(spec) / layout_mma16.UNIT_STEPS)
    return _prepare("quantize", m, math.ceil(runs / WARPS))


def pad(spec: LutSpec, m: int) -> Launch:
    """Return how halves are copied to where the layout has their codes."""
    return _prepare("pad", m, math.ceil(padded_columns(spec) / THREADS))


def dense(spec: LutSpec) -> Launch:
    """Return how W is decoded: a warp for each unit."""
    sizes = layout_mma16.shape(spec)
    return _prepare("dense", math.ceil(sizes.units / WARPS), sizes.blocks)


def repack(spec: LutSpec) -> Launch:
    """Return how codes of layout c16 become layout mma16."""
    sizes = layout_mma16.shape(spec)
    return _prepare("repack", math.ceil(sizes.units * 64 * spec.bits / THREADS), sizes.blocks)


def reads_in_place(spec: LutSpec, x_stride: int, address: int) -> bool:
    """Tell whether gemv_* and tile_* can read halves where they are: 8 inputs of a step from 16 aligned bytes."""
    aligned = spec.k % 8 == 0 and x_stride % 8 == 0 and address % 16 == 0
    return aligned and (spec.scale_shape[1] == 1 or spec.group_columns % 32 == 0)


def padded_columns(spec: LutSpec) -> int:
    """Return the columns of a row of `pad`."""
    return layout_mma16.shape(spec).units * 128


def quantized_sizes(spec: LutSpec, m: int) -> tuple[int, int]:
    """Return the bytes of q and the floats of q_scale that `quantize` writes: whole tiles of 8 rows of x."""
    sizes, rows = layout_mma16.shape(spec), math.ceil(m / 8) * 8
    slots = sizes.units * layout_mma16.UNIT_STEPS // sizes.steps_per_slot
    return rows * sizes.units * 128, 2 * rows * slots


def _prepare(name: str, x: int, y: int) -> Launch:
    return Launch(unit="prepare.cu", name=f"paredown_{name}", grid=(x, y, 1), block=(THREADS, 1, 1), shared=0)
