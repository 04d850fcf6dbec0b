"""Tables of codebooks as the CUDA kernels keep them in registers, or look them up in memory."""

from __future__ import annotations

import struct

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..lut_spec import LutSpec
from .launch import Kind


def device_table(table: Tensor, spec: LutSpec, kind: Kind) -> UInt8[Tensor, "tables bytes"]:
    """Return the tables of the linear kernels: entries as bytes, or all low bytes of halves and then the high ones.

    Entries of halves have the zero point taken off, and are rounded to the dtype of x if need be (bytes never need be);
    `unit` is left to the sums. Entries of kind s8 are less by 128, for which `shift_bits` makes up.
    """
    if kind == "f16b":
        return table.contiguous()
    if kind == "s8":
        return (table ^ 128).contiguous()
    halves = (table.float() - spec.zero).to(torch.float16 if kind == "f16" else torch.bfloat16)
    octets = halves.contiguous().view(torch.uint8).reshape(len(table), -1, 2)
    return octets.transpose(1, 2).reshape(len(table), -1)


def device_scale(scale: Tensor) -> Tensor:
    """Return scales in float16 if none changes by that: the inner loops read float16, a slower one the other types."""
    halves = scale.half()
    return halves if bool((halves.to(scale.dtype) == scale).all()) else scale


def dense_table(table: Tensor, spec: LutSpec) -> Float[Tensor, "tables levels"]:
    """Return the tables of `dense`: (entry - zero) unit in float32."""
    return (table.float() - spec.zero) * torch.tensor(spec.unit, device=table.device)


def shift_bits(spec: LutSpec, kind: Kind) -> int:
    """Return the argument of that name: zero - 128 as a float, or 1024 + zero as two halves."""
    if kind == "s8":
        return float_bits(spec.zero - 128)
    if kind == "f16b":
        half = struct.pack("<e", 1024 + spec.zero)
        return int.from_bytes(half + half, "little", signed=True)
    return 0


def float_bits(value: float) -> int:
    """Return a float32 as the int32 of the same bits."""
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)
