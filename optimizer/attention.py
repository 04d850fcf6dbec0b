"""Attention that can be pruned: `nn.MultiheadAttention` with an inner width that need not be the embedding's."""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError


class Hint(TypedDict, total=False):
    """The eighth parameter of `nn.MultiheadAttention.forward`, by keyword only."""

    is_causal: bool


class Attention(nn.Module):
    """A drop-in replacement of `nn.MultiheadAttention`: same parameters, same call, same numbers.

    Queries and keys are num_heads * head_dim wide, values as wide as `out_proj` reads; head h owns the h-th run of
    rows of each projection. `scale` multiplies the scores and stays what it was when channels are taken out of heads.
    To prune, slice the parameters and set `num_heads` and `head_dim`. Projections are in `in_proj_weight` or, where
    that is None, apart.
    """

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = like.embed_dim, like.kdim, like.vdim
        self.num_heads, self.head_dim = like.num_heads, like.head_dim
        self.scale = like.head_dim**-0.5
        self.dropout, self.batch_first = like.dropout, like.batch_first
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            self.register_parameter(name, getattr(like, name))
        self.out_proj = nn.Linear(like.embed_dim, like.embed_dim, bias=like.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = like.out_proj.weight, like.out_proj.bias
        # nn.TransformerEncoderLayer reads this; True would let its fused path take weights of any width for embed_dim.
        self._qkv_same_embed_dim = False
        self.train(like.training)

    @classmethod
    def from_module(cls, module: nn.MultiheadAttention, where: str = "") -> Attention:
        """Return an Attention that holds the very parameters of `module`; they may be on the meta device.

        Raises InputError where `module` adds a learned or a zero key, which no head owns.
        """
        for option, used in (("add_bias_kv", module.bias_k is not None), ("add_zero_attn", module.add_zero_attn)):
            if used:
                raise InputError(f"attention with {option}=True cannot be pruned", where=where, fix="skip it")
        return cls(module)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        **hint: Unpack[Hint],
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values, and the weights of the attention or None; as `nn.MultiheadAttention` does.

        (time, batch, width), (batch, time, width) with batch_first, or (time, width).
        """
        if query.is_nested:
            fix = "build nn.TransformerEncoder with enable_nested_tensor=False"
            raise InputError("attention cannot read nested tensors", fix=fix)
        causal = _checked(attn_mask, **hint)
        q, k, v = (self._split(x, query.ndim) for x in self._project(query, key, value))
        if causal and key_padding_mask is None and not need_weights:
            y, weights = self._fused(q, k, v, None, causal=True), None
        else:
            mask = _merged(self._spread(attn_mask, q), _additive(key_padding_mask, "key_padding_mask", q.dtype))
            if need_weights:
                y, weights = self._explicit(q, k, v, mask)
            else:
                y, weights = self._fused(q, k, v, mask), None
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if query.ndim == 2:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values in the layout of the inputs; one product where the three are one."""
        width = self.num_heads * self.head_dim
        sizes = (width, width, self.out_proj.weight.shape[1])
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return torch.split_with_sizes(F.linear(query, weight, bias), sizes, dim=-1)
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        parts = apart if weight is None else torch.split_with_sizes(weight, sizes)
        biases = (None, None, None) if bias is None else torch.split_with_sizes(bias, sizes)
        pairs = zip((query, key, value), parts, biases, strict=True)
        return tuple(F.linear(x, w, b) for x, w, b in pairs)

    def _split(self, x: Tensor, ndim: int) -> Tensor:
        """Return (batch, heads, time, width of a head)."""
        if ndim == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return torch.unflatten(x, -1, (self.num_heads, -1)).transpose(1, 2)

    def _spread(self, attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Return a mask (queries, keys) as it is and one (batch * heads, queries, keys) with its heads apart."""
        mask = _additive(attn_mask, "attn_mask", q.dtype)
        if mask is None or mask.ndim == 2:
            return mask
        if mask.shape[0] != q.shape[0] * self.num_heads:
            raise InputError(
                f"attn_mask has {mask.shape[0]} matrices for a batch of {q.shape[0]} and {self.num_heads} heads",
                fix="give one for each sample and head that is left, or one (queries, keys) for all",
            )
        return torch.unflatten(mask, 0, (-1, self.num_heads))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        dropped = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropped, causal, scale=self.scale)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mixed values and the weights that mixed them: softmax(scale Q K^T + mask) V (Vaswani 2017, eq. 1)."""
        scores = (q * self.scale) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ v, weights


def _checked(attn_mask: Tensor | None, is_causal: bool = False) -> bool:
    if is_causal and attn_mask is None:
        raise InputError("is_causal=True without attn_mask", fix="give the causal mask too, as nn.MultiheadAttention")
    return is_causal


def _additive(mask: Tensor | None, name: str, target: torch.dtype) -> Tensor | None:
    """Return a mask that is added to scores: -inf where a boolean one is True."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise InputError(f"{name} has dtype {str(mask.dtype).removeprefix('torch.')}", fix="use bool or a float")
    return mask.new_zeros(mask.shape, dtype=target).masked_fill(mask, float("-inf"))


def _merged(mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Return the sum of a mask over (queries, keys) and one over ([batch,] keys)."""
    if padding is None:
        return mask
    spread = padding[..., None, None, :]
    return spread if mask is None else mask + spread
