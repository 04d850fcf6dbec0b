"""An embedding that holds its rows as codes and decodes those that are looked up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ..kernels import layout
from ..kernels.lut_spec import BLOCK, STEP, LutParts, LutSpec

PARTS = ("codes", "table", "scale")


class LutEmbedding(nn.Module):
    """Rows of a weight in the layout of the kernels; it has no gradient.

    `.to` and `.half` change the type of the rows that it gives; codes, tables and scales keep theirs.
    """

    codes: Tensor
    table: Tensor
    scale: Tensor
    like: Tensor

    def __init__(self, parts: LutParts, spec: LutSpec, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.num_embeddings, self.embedding_dim = spec, spec.n, spec.k
        for name in PARTS:
            self.register_buffer(name, getattr(parts, name))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, rows: Int64[Tensor, "..."]) -> Float[Tensor, "... k"]:
        flat, spec = rows.flatten().long(), self.spec
        blocks, lanes = flat // BLOCK, flat % BLOCK
        units = self.codes.reshape(-1, layout.steps(spec), spec.bits, BLOCK, 4)[blocks, :, :, lanes]
        codes = _codes(units, spec.bits)[:, layout.columns(spec, flat.device)].int()
        if spec.table_rows:
            codes = codes + (flat // spec.table_rows << spec.bits)[:, None]
        table = (self.table.float() - spec.zero) * torch.tensor(spec.unit)
        group = torch.arange(spec.k, device=flat.device) // spec.group_columns
        values = table.flatten()[codes] * self.scale.float()[blocks, :, lanes][:, group]
        return values.to(self.like.dtype).reshape(*rows.shape, spec.k)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.spec.bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LutEmbedding:
        kept = {name: self.get_buffer(name) for name in PARTS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(self.get_buffer(name).device))
        return self


def _codes(units: UInt8[Tensor, "m steps bits 4"], bits: int) -> UInt8[Tensor, "m filled"]:
    """Return the codes of rows, each with its inputs side by side, from their words of each unit."""
    total, unit, below = units.new_zeros(units.shape[0], units.shape[1] * STEP), 0, 0
    for width in layout.planes(bits):
        octets = units[:, :, unit : unit + width]
        fields = [octets >> width * field & (1 << width) - 1 for field in range(8 // width)]
        total = total | torch.stack(fields, -2).reshape(total.shape) << below
        unit, below = unit + width, below + width
    return total
