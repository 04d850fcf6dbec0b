"""Layout "c16" of the kernels: 16 rows side by side, so that a vector register holds the same inputs of 16 outputs.

`cpu/paredown.h` defines it. Files hold the canonical stream of `pack`; this layout is made from the codes when a module
is built or a model exported, and kernels use it in place.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from .lut_spec import BLOCK, STEP, LutSpec

AT_ONCE = 1 << 22
"""Codes that are rearranged at a time: what is held besides the input and the result stays under some 50 MB."""


def planes(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes of a code, lowest bits first: 3 = (2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def blocks(spec: LutSpec) -> int:
    """Return how many blocks of 16 rows there are."""
    return math.ceil(spec.n / BLOCK)


def group_steps(spec: LutSpec) -> int:
    """Return the steps of 32 inputs that a full group takes."""
    return math.ceil(spec.group_columns / STEP)


def steps(spec: LutSpec) -> int:
    """Return the steps of a row: every group starts a new one."""
    full, rest = divmod(spec.k, spec.group_columns)
    return full * group_steps(spec) + math.ceil(rest / STEP)


def codes_bytes(spec: LutSpec) -> int:
    """Return the bytes of the codes."""
    return blocks(spec) * steps(spec) * spec.bits * BLOCK * 4


def packed_scale_shape(spec: LutSpec) -> tuple[int, int, int]:
    """Return the shape of the scales: blocks, groups, 16 rows."""
    return blocks(spec), spec.scale_shape[1], BLOCK


def columns(spec: LutSpec, device: torch.device | None = None) -> Tensor:
    """Return where each input stands in a row that is filled up group by group."""
    inputs = torch.arange(spec.k, device=device)
    return inputs + inputs // spec.group_columns * (group_steps(spec) * STEP - spec.group_columns)


def pack(codes: UInt8[Tensor, "n k"], spec: LutSpec) -> UInt8[Tensor, "bytes"]:
    """Return codes in this layout; what fills up rows and steps is 0."""
    if tuple(codes.shape) != (spec.n, spec.k) or codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, must be torch.uint8 {(spec.n, spec.k)}")
    place, count = columns(spec, codes.device), steps(spec)
    packed = codes.new_empty(blocks(spec), count, spec.bits, BLOCK, 4)
    for start, stop in _chunks(spec):
        part = codes[start * BLOCK : stop * BLOCK]
        filled = part.new_zeros((stop - start) * BLOCK, count * STEP)
        filled[: len(part)].index_copy_(1, place, part)
        packed[start:stop] = _units(filled.reshape(stop - start, BLOCK, count, STEP), spec.bits)
    return packed.flatten()


def unpack(packed: UInt8[Tensor, "bytes"], spec: LutSpec) -> UInt8[Tensor, "n k"]:
    """Return the codes that `pack` packed."""
    if tuple(packed.shape) != (codes_bytes(spec),) or packed.dtype != torch.uint8:
        have = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"packed codes are {have}, must be torch.uint8 {(codes_bytes(spec),)}")
    place, units = columns(spec, packed.device), packed.reshape(blocks(spec), steps(spec), spec.bits, BLOCK, 4)
    codes = packed.new_empty(spec.n, spec.k)
    for start, stop in _chunks(spec):
        rows = codes[start * BLOCK : stop * BLOCK]
        torch.index_select(_codes(units[start:stop], spec.bits)[: len(rows)], 1, place, out=rows)
    return codes


def unpack_rows(packed: UInt8[Tensor, "bytes"], spec: LutSpec, rows: Int64[Tensor, "m"]) -> UInt8[Tensor, "m k"]:
    """Return the codes of some rows."""
    units = packed.reshape(blocks(spec), steps(spec), spec.bits, BLOCK, 4)
    picked = units[rows // BLOCK, :, :, rows % BLOCK]
    filled = torch.nn.functional.pad(picked, (0, 0, 0, 0, 0, 0, 0, -len(rows) % BLOCK))
    as_blocks = filled.reshape(-1, BLOCK, *filled.shape[1:]).permute(0, 2, 3, 1, 4)
    return _codes(as_blocks, spec.bits)[: len(rows), columns(spec, packed.device)]


def pack_scale(scale: Float[Tensor, "n groups"], spec: LutSpec) -> Float[Tensor, "blocks groups 16"]:
    """Return scales in this layout; rows that fill up the last block have 0."""
    if tuple(scale.shape) != spec.scale_shape:
        raise ValueError(f"scales are {tuple(scale.shape)}, must be {spec.scale_shape}")
    filled = torch.nn.functional.pad(scale, (0, 0, 0, -spec.n % BLOCK))
    return filled.reshape(blocks(spec), BLOCK, -1).transpose(1, 2).contiguous()


def unpack_scale(packed: Float[Tensor, "blocks groups 16"], spec: LutSpec) -> Float[Tensor, "n groups"]:
    """Return the scales that `pack_scale` packed."""
    if tuple(packed.shape) != packed_scale_shape(spec):
        raise ValueError(f"packed scales are {tuple(packed.shape)}, must be {packed_scale_shape(spec)}")
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[: spec.n]


def _chunks(spec: LutSpec) -> list[tuple[int, int]]:
    """Return ranges of blocks that hold at most `AT_ONCE` codes, or one block."""
    size = max(1, AT_ONCE // (BLOCK * STEP * steps(spec)))
    return [(start, min(start + size, blocks(spec))) for start in range(0, blocks(spec), size)]


def _units(codes: UInt8[Tensor, "b 16 s 32"], bits: int) -> UInt8[Tensor, "b s bits 16 4"]:
    b, _, s, _ = codes.shape
    found, below = [], 0
    for width in planes(bits):
        fields = (codes >> below & (1 << width) - 1).reshape(b, BLOCK, s, width, 8 // width, 4)
        shifted = [fields[..., field, :] << width * field for field in range(8 // width)]
        found.append(torch.stack(shifted).sum(0, dtype=torch.uint8))
        below += width
    return torch.cat(found, 3).permute(0, 2, 3, 1, 4)


def _codes(units: UInt8[Tensor, "b s bits 16 4"], bits: int) -> UInt8[Tensor, "rows columns"]:
    b, s = units.shape[:2]
    codes, unit, below = units.new_zeros(b, BLOCK, s, STEP), 0, 0
    for width in planes(bits):
        octets = units[:, :, unit : unit + width].permute(0, 3, 1, 2, 4)
        fields = [octets >> width * field & (1 << width) - 1 for field in range(8 // width)]
        codes |= torch.stack(fields, -2).reshape(b, BLOCK, s, STEP) << below
        unit, below = unit + width, below + width
    return codes.reshape(b * BLOCK, s * STEP)
