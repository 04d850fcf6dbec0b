"""A seeded network of the Llama kind (arXiv 2302.13971): one step of decoding with a cache, 246 M parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Widths of the network; the defaults make 246 M parameters, all but 65 M of them in its layers."""

    dim: int = 1024
    hidden: int = 2816
    layers: int = 16
    heads: int = 16
    key_heads: int = 4
    vocabulary: int = 32000

    @property
    def head(self) -> int:
        return self.dim // self.heads


class Attention(nn.Module):
    """Grouped-query attention of new tokens over themselves and the cache, with rotary positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.key_heads * sizes.head
        self.wq = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.wk = nn.Linear(sizes.dim, width, bias=False)
        self.wv = nn.Linear(sizes.dim, width, bias=False)
        self.wo = nn.Linear(sizes.dim, sizes.dim, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the new keys and values [2, batch, key heads, new, head]."""
        q, k, v = (part.reshape(*part.shape[:2], -1, self.sizes.head).transpose(1, 2) for part in self._projected(x))
        new = torch.stack([_rotated(k, turn), v])
        k, v = torch.cat([cache, new], dim=3).unbind(0)
        repeat = self.sizes.heads // self.sizes.key_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(_rotated(q, turn), k, v)
        return self.wo(y.transpose(1, 2).flatten(2)), new

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.wq(x), self.wk(x), self.wv(x)


class FeedForward(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(sizes), nn.RMSNorm(sizes.dim, eps=1e-5)
        self.feed_forward, self.ffn_norm = FeedForward(sizes), nn.RMSNorm(sizes.dim, eps=1e-5)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Tensor) -> tuple[Tensor, Tensor]:
        y, new = self.attention(self.attention_norm(x), turn, cache)
        x = x + y
        return x + self.feed_forward(self.ffn_norm(x)), new


class Llama(nn.Module):
    """Logits of the next token for one token id [batch, 1], given the cache [layers, 2, batch, key heads, past, head].

    Also returns what to append to the cache.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.dim)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.dim, eps=1e-5)
        self.head = nn.Linear(sizes.dim, sizes.vocabulary, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, sizes.head, 2) / sizes.head)
        self.frequency: Tensor
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, ids: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        angle = cache.shape[4] * self.frequency
        turn, new = (angle.cos(), angle.sin()), []
        x = self.embedding(ids)
        for layer, held in zip(self.layers, cache.unbind(0), strict=True):
            x, made = layer(x, turn, held)
            new.append(made)
        return self.head(self.norm(x)), torch.stack(new)


def seeded(sizes: Sizes, seed: int = 0) -> Llama:
    """Return the network with normal weights of the spread that keeps activations near 1."""
    torch.manual_seed(seed)
    net = Llama(sizes)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return net.eval()


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the adjacent pairs (2i, 2i + 1) of x [batch, heads, new, head]."""
    cos, sin = turn
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(3)
