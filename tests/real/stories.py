"""The stories260k language model (Llama architecture, arXiv 2302.13971; llama2.c), its calibration and metric.

Checkpoint `lm/stories260k.safetensors`; the output layer is the token embedding, transposed. Of the 400 stories, the
first 200 are for calibration, the other 200 for the metric.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM, HIDDEN, LAYERS, HEADS, KEY_HEADS, VOCABULARY, CONTEXT = 64, 172, 5, 8, 4, 512, 512
HEAD = DIM // HEADS
CALIBRATION_STORIES = 200
CALIBRATION_TOKENS = 256
CALIBRATION_BATCH = 16
METRIC_BATCH = 20


class Attention(nn.Module):
    """Causal attention with rotary positions; each key and value head serves two query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(DIM, HEADS * HEAD, bias=False)
        self.wk = nn.Linear(DIM, KEY_HEADS * HEAD, bias=False)
        self.wv = nn.Linear(DIM, KEY_HEADS * HEAD, bias=False)
        self.wo = nn.Linear(HEADS * HEAD, DIM, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (part.unflatten(2, (-1, HEAD)) for part in (self.wq(x), self.wk(x), self.wv(x)))
        q, k = _rotated(q, turn).transpose(1, 2), _rotated(k, turn).transpose(1, 2)
        k = k.repeat_interleave(HEADS // KEY_HEADS, dim=1)
        v = v.transpose(1, 2).repeat_interleave(HEADS // KEY_HEADS, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(), nn.RMSNorm(DIM, eps=1e-5)
        self.feed_forward, self.ffn_norm = FeedForward(), nn.RMSNorm(DIM, eps=1e-5)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Logits [batch, seq, 512] of the next token for int64 token ids [batch, seq], seq <= 512."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(DIM, eps=1e-5)
        frequency = 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        angle = torch.arange(ids.shape[1]).unsqueeze(1) * self.frequency
        turn = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)  # [seq, 1 (heads), HEAD / 2]
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, turn)
        return F.linear(self.norm(x), self.tok_embeddings.weight)


def stories260k() -> nn.Module:
    return Llama()


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Draw sequences of 256 tokens, each the start of one of the first 200 stories that is long enough."""
    long = [ids[:CALIBRATION_TOKENS] for ids in _stories()[:CALIBRATION_STORIES] if len(ids) >= CALIBRATION_TOKENS]
    picks = _data().draw(len(long), samples, seed)
    return [(part,) for part in torch.stack(long)[picks].split(CALIBRATION_BATCH)]


def likelihood(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score minus the mean cross-entropy per token (nats) for each of the 200 stories after the first 200."""
    loss, tokens = _losses(model, _stories()[CALIBRATION_STORIES:])
    return (-loss / tokens).numpy()


def loss_all(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> float:
    """Return the mean cross-entropy per token (nats, lower is better) over all 400 stories: the README's figure."""
    loss, tokens = _losses(model, _stories())
    return float(loss.sum() / tokens.sum())


@torch.no_grad()
def _losses(model: Callable[..., Tensor | tuple[Tensor, ...]], stories: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return each story's summed cross-entropy (float64) and its number of predicted tokens.

    Stories of similar length share a batch; what is padded after a story cannot reach back into it.
    """
    tokens = torch.tensor([len(ids) - 1 for ids in stories])
    loss = torch.zeros(len(stories), dtype=torch.float64)
    for picks in tokens.argsort(stable=True).split(METRIC_BATCH):
        ids = nn.utils.rnn.pad_sequence([stories[i] for i in picks], batch_first=True)
        logits = _first(model(ids[:, :-1].contiguous())).double()
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        inside = torch.arange(each.shape[1]) < tokens[picks].unsqueeze(1)
        loss[picks] = (each * inside).sum(1)
    return loss, tokens


def _stories() -> list[Tensor]:
    """Return the token ids of the 400 stories, each with its leading BOS, cut at the context plus one."""
    file = _data().arrays("lm/tinystories_first400_ids.npz")
    ids = torch.from_numpy(file["ids"].astype(np.int64)).split(file["length"].tolist())
    return [story[: CONTEXT + 1] for story in ids]


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the adjacent pairs (2i, 2i + 1) of x [batch, seq, heads, HEAD]."""
    cos, sin = turn
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(3)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
