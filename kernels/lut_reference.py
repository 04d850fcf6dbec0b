"""What the kernels compute, in plain torch: y = act(x W^T + t L^T + bias), on any device and for any instruction set.

W is decoded whole for each product. Sums are of float32 (of float64 where x is), and y is rounded once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from . import layout
from .lut_spec import BLOCK, LEAST, RUN, Activation, LutParts, LutSpec, Mode


def decode(parts: LutParts, spec: LutSpec) -> Float[Tensor, "n k"]:
    """Return W in float32."""
    rows = torch.arange(spec.n, device=parts.codes.device)
    return _values(layout.unpack(parts.codes, spec), layout.unpack_scale(parts.scale, spec), rows, parts.table, spec)


def decode_rows(parts: LutParts, spec: LutSpec, rows: Int64[Tensor, "m"]) -> Float[Tensor, "m k"]:
    """Return some rows of W in float32."""
    codes, scale = layout.unpack_rows(parts.codes, spec, rows), parts.scale[rows // BLOCK, :, rows % BLOCK]
    return _values(codes, scale, rows, parts.table, spec)


def round_inputs(x: Float[Tensor, "... k"], group: int) -> Float[Tensor, "... k"]:
    """Return x rounded to signed bytes and back, in runs of up to 128 inputs within each group; float32."""
    values = x.float()
    runs = _runs(x.shape[-1], group or x.shape[-1], x.device)
    count = int(runs[-1]) + 1 if len(runs) else 0
    most = values.new_zeros(*x.shape[:-1], count).scatter_reduce(-1, runs.expand(x.shape), values.abs(), "amax")
    factor, step = rounding(most)
    return torch.round(values * factor[..., runs]) * step[..., runs]


def rounding(most: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Return by what values are multiplied before they are rounded, and after, where `most` is their largest."""
    # A number divided by a tensor is the number times a rounded inverse in torch: one in four quotients is another.
    return torch.full_like(most, 127.0) / torch.where(most < LEAST, 1.0, most), most / 127.0


def product(x: Float[Tensor, "... k"], weight: Float[Tensor, "n k"], group: int, mode: Mode) -> Float[Tensor, "... n"]:
    """Return x W^T before it is rounded: in float32, or float64 where x is."""
    values = round_inputs(x, group) if mode == "int8" else x
    dtype = torch.promote_types(x.dtype, torch.float32)
    return values.to(dtype) @ weight.to(dtype).T


def activate(y: Float[Tensor, "... n"], activation: Activation) -> Float[Tensor, "... n"]:
    """Return the activation of y."""
    match activation:
        case "":
            return y
        case "relu":
            return functional.relu(y)
        case "gelu":
            return functional.gelu(y)
        case "gelu_tanh":
            return functional.gelu(y, approximate="tanh")
        case "silu":
            return functional.silu(y)


def _values(codes: Tensor, scale: Tensor, rows: Tensor, table: Tensor, spec: LutSpec) -> Tensor:
    """Return what codes, and scales (m, groups), of these rows mean."""
    index = codes.int()
    if spec.table_rows:
        index = index + (rows // spec.table_rows << spec.bits).int()[:, None]
    entries = (table.float() - spec.zero) * torch.tensor(spec.unit)
    factors = scale.float()
    if spec.scale_shape[1] > 1:
        factors = factors[:, torch.arange(spec.k, device=codes.device) // spec.group]
    return entries.flatten()[index] * factors


def _runs(k: int, group: int, device: torch.device) -> Tensor:
    """Return the run of each input."""
    inputs = torch.arange(k, device=device)
    return inputs // group * -(-group // RUN) + inputs % group // RUN
