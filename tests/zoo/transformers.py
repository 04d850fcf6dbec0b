"""Small transformers: vision, cross-attention, Llama-like with grouped queries, BERT-like, GPT-2-like."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VisionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.shrink(F.gelu(self.grow(self.norm2(x))))
        return out


class Vision(nn.Module):
    """Patches, a class token and positions as raw parameters, packed attention projections."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList([VisionBlock(8), VisionBlock(8)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x)[:, 0])
        return y


def vision() -> nn.Module:
    return Vision()


class CrossAttention(nn.Module):
    """Queries from one sequence, keys from a second, values from a third: one packed matrix, three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        x = query + self.attention(query, memory, 2.0 * memory, need_weights=False)[0]
        x = x + self.shared(x, memory, memory, need_weights=False)[0]
        y: Tensor = self.head(x)
        return y


def cross_attention() -> nn.Module:
    return CrossAttention()


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LlamaBlock(nn.Module):
    """Four query heads on two key heads, rotary positions, a gated feed-forward layer."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(width, 20, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(20, width, bias=False)
        self.norm1, self.norm2 = RootMeanSquare(width), RootMeanSquare(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            part.unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (self.q_proj(y), self.k_proj(y), self.v_proj(y))
        )
        q, k = (part * cos + _turn(part) * sin for part in (q, k))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o_proj(y)
        y = self.norm2(x)
        out: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


def _turn(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


class Llama(nn.Module):
    """Embeddings tied with the head; the rotary cache is in buffers that no state dict holds."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        width, heads = 16, 4
        self.embed_tokens = nn.Embedding(24, width)
        self.layers = nn.ModuleList(LlamaBlock(width, heads, 2) for _ in range(2))
        self.norm = RootMeanSquare(width)
        self.lm_head = nn.Linear(width, 24, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        size = width // heads
        angle = torch.arange(32)[:, None] * 100.0 ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        y: Tensor = self.lm_head(self.norm(x))
        return y


def llama() -> nn.Module:
    return Llama()


class BertBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query(x), self.key(x), self.value(x)))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        x = self.norm1(x + self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        y: Tensor = self.norm2(x + self.shrink(F.gelu(self.grow(x))))
        return y


class Bert(nn.Module):
    """Three embeddings, positions looked up by a buffer of numbers, an attention mask, a pooled output."""

    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.positions = nn.Embedding(16, 8)
        self.types = nn.Embedding(2, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList([BertBlock(8), BertBlock(8)])
        self.pooler = nn.Linear(8, 8)
        self.register_buffer("position_ids", torch.arange(16)[None], persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.words(tokens) + self.positions(self.position_ids[:, : tokens.shape[1]])
        x = self.norm(x + self.types(torch.zeros_like(tokens)))
        bias = (1.0 - mask[:, None, None].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, bias)
        return {"last": x, "pooled": torch.tanh(self.pooler(x[:, 0]))}


def bert() -> nn.Module:
    return Bert()


class Conv1D(nn.Module):
    """The linear layer of GPT-2: a raw parameter (in, out) that multiplies from the right."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(0.1 * torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Raw(nn.Module):
    """Parameters that no layer owns: for F.linear, for x @ W, and split; and a plain tensor that is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = Conv1D(18, 6)
        self.linear = nn.Parameter(0.3 * torch.randn(8, 6))
        self.linear_bias = nn.Parameter(0.1 * torch.randn(8))
        self.right = nn.Parameter(0.3 * torch.randn(8, 5))
        self.both_ways = nn.Parameter(0.3 * torch.randn(5, 5))
        self.window = torch.linspace(0.5, 1.5, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.expand(x * self.window).split(6, dim=-1)
        y = torch.tanh(F.linear(a * b + c, self.linear, self.linear_bias)) @ self.right
        return F.linear(torch.tanh(y @ self.both_ways), self.both_ways)


def raw() -> nn.Module:
    return Raw()
