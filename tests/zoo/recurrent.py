"""Small recurrent networks: GRU and LSTM stacked and in two directions, and cells called step by step.

In the classifier and the tagger nothing but the output sequence is read, so that every hidden unit may go.
"""

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
        hidden = x.new_zeros(x.shape[0], 6)
        for step in range(4):
            hidden = self.cell(x[:, step], hidden)
        y: Tensor = self.head(hidden)
        return y


def cells() -> nn.Module:
    return Cells()


class GruClassifier(nn.Module):
    """A stacked GRU whose last step alone is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.gru = nn.GRU(8, 10, num_layers=2, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(torch.tanh(self.embed(x)))
        out: Tensor = self.head(y[:, -1])
        return out


def gru_classifier() -> nn.Module:
    return GruClassifier()


class LstmTagger(nn.Module):
    """An LSTM in two directions whose outputs are concatenated and read at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.inner, self.head = nn.Linear(16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.inner(self.lstm(x)[0])))
        return y


def lstm_tagger() -> nn.Module:
    return LstmTagger()
