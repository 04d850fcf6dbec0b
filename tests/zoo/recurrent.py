"""Small recurrent networks: a bidirectional GRU of two layers, a stacked LSTM, and cells called step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, hidden = self.gru(x)
        out: Tensor = self.head(y) + hidden.mean()
        return out


def gru() -> nn.Module:
    return Gru()


class Lstm(nn.Module):
    """Time comes first; the initial state is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2)
        self.start = nn.Parameter(0.5 * torch.randn(2, 1, 6))
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1)
        start = self.start.expand(-1, x.shape[1], -1).contiguous()
        y, (_, cell) = self.lstm(x, (start, torch.zeros_like(start)))
        return self.head(y).transpose(0, 1), cell


def lstm() -> nn.Module:
    return Lstm()


class Cells(nn.Module):
    """One GRU cell unrolled over four steps: its weights are used four times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 6)
        for step in range(4):
            hidden = self.cell(x[:, step], hidden)
        y: Tensor = self.head(hidden)
        return y


def cells() -> nn.Module:
    return Cells()
