"""Small transformers that write their attention out: projections apart or packed, heads by attributes; packed gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE = 12, 3, 4


class ApartAttention(nn.Module):
    """Three projections, split into heads and joined again by the sizes that the module remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.inner = HEADS, SIZE, HEADS * SIZE
        self.query, self.key, self.value = (nn.Linear(WIDTH, self.inner) for _ in range(3))
        self.output = nn.Linear(self.inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        weights = (q @ k.transpose(-1, -2) * SIZE**-0.5).softmax(dim=-1)
        y = (weights @ v).permute(0, 2, 1, 3).contiguous()
        out: Tensor = self.output(y.view(x.shape[0], x.shape[1], self.inner))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_dim).permute(0, 2, 1, 3)


class PackedAttention(nn.Module):
    """One projection for queries, keys and values, taken apart by reshape, permute and unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = HEADS, SIZE, SIZE**-0.5
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE, bias=False)
        self.proj = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, time, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, time, self.heads * self.head_dim))
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.grow, self.act, self.shrink = nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.shrink(self.act(self.grow(self.norm2(x))))
        return y


class Patches(nn.Module):
    """A vision transformer without a class token: positions looked up by number, patches averaged for the head."""

    numbers: Tensor

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.positions = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Embedding(4, WIDTH)
        self.register_buffer("numbers", torch.arange(4)[None])
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2) + self.positions(self.numbers)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x).mean(dim=1))
        return y


def apart() -> nn.Module:
    return Patches(ApartAttention)


def packed() -> nn.Module:
    return Patches(PackedAttention)


class Gate(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6) with the gate and what it opens in one matrix."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.gate_up = nn.LayerNorm(width), nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        y: Tensor = x + self.down(F.silu(gate) * up)
        return y


class Swiglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(6, 8), nn.Sequential(Gate(8, 14), Gate(8, 10))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.embed(x)))
        return y


def swiglu() -> nn.Module:
    return Swiglu()
