"""Canonical packing: codes of 1 to 8 bits as one little-endian stream of words, row after row without padding.

A word is the smallest whole number of bytes that holds whole codes: 1 byte for 1, 2, 4 and 8 bits (8, 4, 2, 1 codes),
3, 5, 3 and 7 bytes for 3, 5, 6 and 7 bits (8, 8, 4, 8 codes). The first code sits in the lowest bits of the lowest
byte. Kernels have layouts of their own, made from the codes when building or exporting; files hold this one.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import UInt8
from torch import Tensor


def word(bits: int) -> tuple[int, int]:
    """Return (bytes per word, codes per word)."""
    size = math.lcm(bits, 8) // 8
    return size, size * 8 // bits


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take."""
    size, codes = word(bits)
    return math.ceil(count / codes) * size


def pack(codes: UInt8[Tensor, "..."], bits: int) -> UInt8[Tensor, "bytes"]:
    """Pack codes in row-major order; the last word is filled up with zeros."""
    size, per_word = word(bits)
    flat = codes.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % per_word)).reshape(-1, per_word).to(torch.int64)
    words = (padded << (bits * torch.arange(per_word))).sum(1)
    octets: Tensor = words[:, None] >> (8 * torch.arange(size)) & 255
    return octets.to(torch.uint8).flatten()


def unpack(packed: UInt8[Tensor, "bytes"], bits: int, shape: tuple[int, ...]) -> UInt8[Tensor, "..."]:
    """Return the codes that `pack` packed."""
    size, per_word = word(bits)
    words = (packed.reshape(-1, size).to(torch.int64) << (8 * torch.arange(size))).sum(1)
    codes: Tensor = words[:, None] >> (bits * torch.arange(per_word)) & (2**bits - 1)
    return codes.flatten()[: math.prod(shape)].reshape(shape).to(torch.uint8)
