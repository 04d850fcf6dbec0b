"""How a weight is passed to an operator of torch, which takes tensors and lists of numbers, and to the library of C."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import layout, native
from .lut_spec import LutParts, LutSpec, Mode, refusal

Sizes: TypeAlias = tuple[int, ...]
"""n, k, bits, group, table_rows."""
Grid: TypeAlias = tuple[float, ...]
"""zero, unit."""

WEIGHT = "Tensor codes, Tensor table, Tensor scale, int[] sizes, float[] grid"
"""A weight in an operator's schema."""

PARTS = ("codes", "table", "scale")
TABLE_TYPES = {torch.uint8: native.U8, torch.float16: native.F16}
FLOAT_TYPES = {torch.float16: native.F16, torch.bfloat16: native.BF16, torch.float32: native.F32}
_PART_TYPES: tuple[tuple[torch.dtype, ...], ...] = ((torch.uint8,), tuple(TABLE_TYPES), tuple(FLOAT_TYPES))


def tensors(parts: LutParts) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors of a weight in the order of the schema."""
    return parts.codes, parts.table, parts.scale


def numbers(spec: LutSpec) -> tuple[Sizes, Grid]:
    """Return the numbers of a weight as the schema has them."""
    return (spec.n, spec.k, spec.bits, spec.group, spec.table_rows), (spec.zero, spec.unit)


@functools.lru_cache(maxsize=4096)
def read_spec(sizes: Sizes, grid: Grid) -> LutSpec:
    """Return what `numbers` was made of."""
    if len(sizes) != 5 or len(grid) != 2:
        raise ValueError(f"sizes={sizes}, grid={grid}: must be n, k, bits, group, table_rows and zero, unit")
    n, k, bits, group, table_rows = sizes
    zero, unit = grid
    return LutSpec(n=n, k=k, bits=bits, group=group, table_rows=table_rows, zero=zero, unit=unit)


def check_parts(name: str, parts: LutParts, spec: LutSpec, mode: Mode = "exact") -> None:
    """Raise ValueError where the tensors do not fit the spec, or the weight does not suit the mode."""
    for part, tensor, shape, dtypes in zip(PARTS, tensors(parts), _shapes(spec), _PART_TYPES, strict=True):
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            have = f"{tensor.dtype} {tuple(tensor.shape)}" + (" with gaps" if not tensor.is_contiguous() else "")
            raise ValueError(f"{name}{part} is {have}, must be {' or '.join(map(str, dtypes))} {shape}")
    if reason := _refusal(spec, mode, parts.table.dtype):
        raise ValueError(f"{name.partition(':')[0]}: {reason}")


def check_place(name: str, first: Tensor, others: Iterable[Tensor | None]) -> None:
    """Raise ValueError where tensors are on other devices than the first, whose device computes."""
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}: tensors are on {first.device} and {tensor.device}, must be on one device")


def pointer(parts: LutParts, spec: LutSpec) -> Any:
    """Return a pointer to the weight as C knows it; it is valid as long as the tensors are held."""
    kinds = TABLE_TYPES[parts.table.dtype], FLOAT_TYPES[parts.scale.dtype]
    return _pointer(parts.codes.data_ptr(), parts.table.data_ptr(), parts.scale.data_ptr(), kinds, spec)


@functools.lru_cache(maxsize=4096)
def _pointer(codes: int, table: int, scale: int, kinds: tuple[int, int], spec: LutSpec) -> Any:
    sizes = spec.n, spec.k, spec.group, spec.table_rows, spec.bits
    return ctypes.pointer(native.Weight(*sizes, *kinds, spec.zero, spec.unit, codes, table, scale))


@functools.lru_cache(maxsize=4096)
def _shapes(spec: LutSpec) -> tuple[tuple[int, ...], ...]:
    return (layout.codes_bytes(spec),), spec.table_shape, layout.packed_scale_shape(spec)


@functools.lru_cache(maxsize=4096)
def _refusal(spec: LutSpec, mode: Mode, table: torch.dtype) -> str:
    return refusal(spec, mode, table)
