"""`paredown::lut_gather` for torch: rows of a weight that is stored as codes into a table, and its embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import lut_reference, native
from .lut_arguments import FLOAT_TYPES, PARTS, WEIGHT, check_parts, check_place, numbers, pointer, read_spec, tensors
from .lut_linear import keep_types
from .lut_spec import LutParts, LutSpec
from .onnx_ops import DOMAIN


def lut_gather(
    indices: Int[Tensor, "..."], parts: LutParts, spec: LutSpec, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... k"]:
    """Return W[indices] in `dtype`; IndexError where an index is no row."""
    rows: Tensor = torch.ops.paredown.lut_gather(indices, *tensors(parts), *numbers(spec), dtype)
    return rows


class LutEmbedding(nn.Module):
    """An embedding that holds its weight as codes, and so does its state; it has no gradient."""

    codes: Tensor
    table: Tensor
    scale: Tensor

    def __init__(self, parts: LutParts, spec: LutSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec, self.num_embeddings, self.embedding_dim = spec, spec.n, spec.k
        for name, tensor in zip(PARTS, tensors(parts), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        parts = (self.codes, self.table, self.scale)
        rows: Tensor = torch.ops.paredown.lut_gather(indices, *parts, *numbers(self.spec), self.like.dtype)
        return rows

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.spec.bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LutEmbedding:
        """Move codes, table and scale where `fn` moves them, and convert only what comes out."""
        with keep_types(self, PARTS):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _on_cpu(indices: Tensor, codes: Tensor, table: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    parts, spec, dtype = _arguments(indices, codes, table, scale, *rest)
    if dtype not in FLOAT_TYPES or not native.available():
        return _reference(indices, codes, table, scale, *rest)
    rows = indices.long().contiguous()
    _check_rows(rows, spec)
    y = codes.new_empty((*rows.shape, spec.k), dtype=dtype)
    call = pointer(parts, spec), rows.data_ptr(), rows.numel(), y.data_ptr(), FLOAT_TYPES[dtype]
    native.check(native.library().paredown_gather(*call))
    return y


def _reference(indices: Tensor, codes: Tensor, table: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    parts, spec, dtype = _arguments(indices, codes, table, scale, *rest)
    rows = indices.flatten().long()
    _check_rows(rows, spec)
    return lut_reference.decode_rows(parts, spec, rows).to(dtype).reshape(*indices.shape, spec.k)


def _fake(indices: Tensor, codes: Tensor, table: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    _, spec, dtype = _arguments(indices, codes, table, scale, *rest)
    return codes.new_empty((*indices.shape, spec.k), dtype=dtype)


def _arguments(
    indices: Tensor,
    codes: Tensor,
    table: Tensor,
    scale: Tensor,
    sizes: Sequence[int],
    grid: Sequence[float],
    *rest: Any,
) -> tuple[LutParts, LutSpec, torch.dtype]:
    """Return what an operator's arguments mean; torch leaves the last out where it has its default."""
    parts, spec = LutParts(codes=codes, table=table, scale=scale), read_spec(tuple(sizes), tuple(grid))
    check_parts("lut_gather: ", parts, spec)
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"lut_gather: indices are {indices.dtype}, must be torch.int64 or torch.int32")
    check_place("lut_gather", indices, tensors(parts))
    return parts, spec, rest[0] if rest else torch.float32


def _check_rows(rows: Tensor, spec: LutSpec) -> None:
    """Look at the indices where that waits for no device; elsewhere the device's indexing does."""
    if rows.device.type == "cpu" and rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= spec.n):
        raise IndexError(f"lut_gather: indices {int(rows.min())} to {int(rows.max())}, the weight has {spec.n} rows")


_LIBRARY: Any = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"lut_gather(Tensor indices, {WEIGHT}, ScalarType dtype=float32) -> Tensor")
_LIBRARY.impl("lut_gather", _reference, "CompositeExplicitAutograd")
_LIBRARY.impl("lut_gather", _on_cpu, "CPU")
torch.library.register_fake(f"{DOMAIN}::lut_gather", _fake, lib=_LIBRARY)
