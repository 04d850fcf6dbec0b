"""The demo's network and data: a residual network on scikit-learn's bundled digits (real 8x8 scans, 1797 of them).

These are entry functions as a user writes them: plain PyTorch, no import of paredown. The split is fixed: 600 test
scans and 1197 train scans, both shuffled once with SPLIT_SEED; calibration draws from the train scans only. Writers
are shared between the two parts (the set names none), so the accuracy is that of known hands.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPLIT_SEED = 0
TEST_SCANS = 600
CALIBRATION_BATCH = 64
METRIC_BATCH = 200


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity, or a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Logits [batch, 10] of scans [batch, 1, 8, 8] with values 0..1; stages of 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(Block(16, 16), Block(16, 16))
        self.stage2 = nn.Sequential(Block(16, 32, stride=2), Block(32, 32))
        self.stage3 = nn.Sequential(Block(32, 64, stride=2))
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def network() -> nn.Module:
    """Model entry: the architecture with fresh weights."""
    return DigitsNet()


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Data entry: draw `samples` different train scans with the seed, in batches of 64."""
    x, _ = train_scans()
    if samples > len(x):
        raise ValueError(f"{samples} calibration samples asked, {len(x)} train scans exist; ask for at most {len(x)}")
    picks = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:samples]
    return [(part,) for part in torch.split(x[picks], CALIBRATION_BATCH)]


@torch.no_grad()
def accuracy(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Metric entry: 1 or 0 for each of the 600 test scans."""
    x, y = test_scans()
    outputs = (model(part) for part in torch.split(x, METRIC_BATCH))
    logits = torch.cat([out if isinstance(out, Tensor) else out[0] for out in outputs])
    return (logits.argmax(1) == y).numpy().astype(np.float64)


def train_scans() -> tuple[Tensor, Tensor]:
    """Return the 1197 train scans [n, 1, 8, 8] and their labels."""
    x, y = _scans()
    return x[TEST_SCANS:], y[TEST_SCANS:]


def test_scans() -> tuple[Tensor, Tensor]:
    """Return the 600 test scans [n, 1, 8, 8] and their labels."""
    x, y = _scans()
    return x[:TEST_SCANS], y[:TEST_SCANS]


def _scans() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    x = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16  # the scans count 0..16 inked pixels per cell
    return x[order], torch.from_numpy(labels).long()[order]
