"""Layout "mma16" of the CUDA kernels: the codes of 16 rows in the order in which the lanes of a warp feed `mma`.

A unit is 16 rows x 128 inputs = 4 steps of 32 inputs, steps as in "c16" (every group starts a new one). Lane 4 g + t of
a warp (g 0..7, t 0..3) holds, of each step, the inputs 8 t .. 8 t + 7 of rows g and g + 8: the sum over k does not mind
in which order `mma` takes them, so long as x follows, and 8 neighbouring inputs of x are one load of 16 bytes.

A plane of w bits (4, 2 or 1; 3 bits are a plane of 2 and one of 1) keeps 4 / w steps in a word. Step e of a word has
the code of its input 8 t + 4 f + b at bits 8 b + 4 f + w e: shifted right by w e, the low bits of its nibbles are
codes, as PRMT takes them. (For w = 4 these are the words of c16. For 2 and 1, words of c16 hold 16 and 32 neighbouring
inputs: 8 codes of 3 bits would take two instructions more, and groups would be filled up to 128 inputs.)

    codes   [block of 16 rows][unit][plane][lane]: 16 bytes a lane and plane for w = 2, 8 for w = 1, and twice 16 for
            w = 4, all lanes of steps 0 and 1 first. They are the words of row g, then those of row g + 8, by step.
            Steps and rows that fill up the last unit and block are code 0.
    scale   [block of 16 rows][slot][16 rows]. A slot is `units_per_slot` units, or `steps_per_slot` = 1 or 2 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from . import layout
from .lut_spec import BLOCK, STEP, LutSpec

BITS = (2, 3, 4)
UNIT_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a weight in this layout; 4 steps per slot where a slot is whole units, of which it has several."""

    blocks: int
    units: int
    group_steps: int
    steps_per_slot: int
    units_per_slot: int
    slots: int


def shape(spec: LutSpec) -> Shape:
    """Return the sizes; a group of 3, 5, 6, .. steps has its scale repeated for each of its steps or pairs of steps."""
    units, steps = math.ceil(layout.steps(spec) / UNIT_STEPS), layout.group_steps(spec)
    groups = spec.scale_shape[1]
    per_slot = 4 if groups == 1 or steps % 4 == 0 else 2 if steps % 2 == 0 else 1
    whole = max(1, math.ceil(steps / UNIT_STEPS)) if per_slot == 4 else 1
    return Shape(
        blocks=layout.blocks(spec),
        units=units,
        group_steps=steps,
        steps_per_slot=per_slot,
        units_per_slot=whole,
        slots=groups if per_slot == 4 else units * UNIT_STEPS // per_slot,
    )


def codes_bytes(spec: LutSpec) -> int:
    """Return the bytes of the codes."""
    sizes = shape(spec)
    return sizes.blocks * sizes.units * unit_bytes(spec.bits)


def unit_bytes(bits: int) -> int:
    """Return the bytes of a unit."""
    return BLOCK * UNIT_STEPS * STEP * bits // 8


def pack(codes: UInt8[Tensor, "n k"], spec: LutSpec) -> UInt8[Tensor, "bytes"]:
    """Return codes in this layout; what fills up rows and steps is 0."""
    _check_bits(spec)
    if tuple(codes.shape) != (spec.n, spec.k) or codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)}, must be torch.uint8 {(spec.n, spec.k)}")
    sizes, place = shape(spec), layout.columns(spec, codes.device)
    packed = codes.new_empty(sizes.blocks, sizes.units, unit_bytes(spec.bits))
    for start, stop in _chunks(sizes):
        part = codes[start * BLOCK : stop * BLOCK]
        filled = part.new_zeros((stop - start) * BLOCK, sizes.units * UNIT_STEPS * STEP)
        filled[: len(part)].index_copy_(1, place, part)
        packed[start:stop] = _units(filled.reshape(stop - start, 2, 8, sizes.units, 4, 4, 2, 4), spec.bits)
    return packed.flatten()


def unpack(packed: UInt8[Tensor, "bytes"], spec: LutSpec) -> UInt8[Tensor, "n k"]:
    """Return the codes that `pack` packed."""
    _check_bits(spec)
    if tuple(packed.shape) != (codes_bytes(spec),) or packed.dtype != torch.uint8:
        have = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"packed codes are {have}, must be torch.uint8 {(codes_bytes(spec),)}")
    sizes, place = shape(spec), layout.columns(spec, packed.device)
    units, codes = packed.reshape(sizes.blocks, sizes.units, -1), packed.new_empty(spec.n, spec.k)
    for start, stop in _chunks(sizes):
        rows = codes[start * BLOCK : stop * BLOCK]
        torch.index_select(_codes(units[start:stop], spec.bits)[: len(rows)], 1, place, out=rows)
    return codes


def pack_scale(scale: Float[Tensor, "n groups"], spec: LutSpec) -> Float[Tensor, "blocks slots 16"]:
    """Return scales in this layout; rows and slots that fill up the last block and unit have 0."""
    sizes, packed = shape(spec), layout.pack_scale(scale, spec)
    if sizes.steps_per_slot == 4:
        return packed
    slot = torch.arange(math.ceil(layout.steps(spec) / sizes.steps_per_slot), device=scale.device)
    used = packed[:, slot * sizes.steps_per_slot // sizes.group_steps]
    return torch.nn.functional.pad(used, (0, 0, 0, sizes.slots - len(slot)))


def _check_bits(spec: LutSpec) -> None:
    if spec.bits not in BITS:
        raise ValueError(f"layout mma16 has codes of {', '.join(map(str, BITS))} bits, not {spec.bits}")


def _chunks(sizes: Shape) -> list[tuple[int, int]]:
    """Return ranges of blocks that hold at most `layout.AT_ONCE` codes, or one block."""
    size = max(1, layout.AT_ONCE // (BLOCK * UNIT_STEPS * STEP * sizes.units))
    return [(start, min(start + size, sizes.blocks)) for start in range(0, sizes.blocks, size)]


def _units(codes: UInt8[Tensor, "block h g unit s t f b"], bits: int) -> UInt8[Tensor, "block unit bytes"]:
    blocks, _, _, units = codes.shape[:4]
    found, below = [], 0
    for width in layout.planes(bits):
        words, steps = width, UNIT_STEPS // width
        fields = (codes >> below & (1 << width) - 1).reshape(blocks, 2, 8, units, words, steps, 4, 2, 4)
        shifted = [fields[:, :, :, :, :, e, :, f] << 4 * f + width * e for e in range(steps) for f in range(2)]
        octets = torch.stack(shifted).sum(0, dtype=torch.uint8)  # block h g unit word t b
        chunks = octets.reshape(blocks, 2, 8, units, max(1, words // 2), min(words, 2), 4, 4)
        found.append(chunks.permute(0, 3, 4, 2, 6, 1, 5, 7).reshape(blocks, units, -1))
        below += width
    return torch.cat(found, 2)


def _codes(packed: UInt8[Tensor, "block unit bytes"], bits: int) -> UInt8[Tensor, "rows columns"]:
    blocks, units, _ = packed.shape
    codes = packed.new_zeros(blocks, 2, 8, units, UNIT_STEPS, 4, 2, 4)
    start = below = 0
    for width in layout.planes(bits):
        words, steps, size = width, UNIT_STEPS // width, unit_bytes(width)
        chunks = packed[:, :, start : start + size].reshape(
            blocks, units, max(1, words // 2), 8, 4, 2, min(words, 2), 4
        )
        octets = chunks.permute(0, 5, 3, 1, 2, 6, 4, 7).reshape(blocks, 2, 8, units, words, 4, 4)
        fields = [
            torch.stack([octets >> 4 * f + width * e & (1 << width) - 1 for f in range(2)], -2) for e in range(steps)
        ]
        codes |= torch.stack(fields, 5).reshape(codes.shape) << below
        start, below = start + size, below + width
    return codes.reshape(blocks * BLOCK, units * UNIT_STEPS * STEP)
