"""CIFAR ResNet-20 and ResNet-56 (He et al. 2015, arXiv 1512.03385, section 4.2), their calibration draws and metrics.

Checkpoints `cifar10/resnet20.safetensors`, `cifar10/resnet56.safetensors`. The shortcut has no parameters (option A).
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

CALIBRATION_BATCH = 64
METRIC_BATCH = 250
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions and the option A shortcut: every second row and column, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Logits [batch, 10] of normalised RGB images [batch, 3, 32, 32]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20() -> nn.Module:
    return ResNet(3)


def resnet56() -> nn.Module:
    return ResNet(9)


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Draw train images (10,000 lossless ones, official positions 0..9999) in batches of 64."""
    data = _data()
    parts = [data.arrays(f"cifar10/{name}.npz")["x"] for name in ("cifar10_calib_2000", "cifar10_train_8000")]
    pool = np.concatenate(parts)
    x = _normalise(pool[data.draw(len(pool), samples, seed).numpy()])
    return [(part,) for part in x.split(CALIBRATION_BATCH)]


def top1_jpeg(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score 1 or 0 for each of the 10,000 JPEG test images: for paired comparison only (see its README)."""
    data, name = _data(), "cifar10/cifar10_test_10000_jpeg.npz"
    return _top1(model, np.stack(data.images(name)), data.arrays(name)["y"])


def top1_lossless(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score 1 or 0 for each of the first 1000 official test images, comparable with published figures."""
    file = _data().arrays("cifar10/cifar10_test_first1000.npz")
    return _top1(model, file["x"], file["y"])


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def _normalise(images: npt.NDArray[np.uint8]) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((x - mean) / std).contiguous()


@torch.no_grad()
def _top1(
    model: Callable[..., Tensor | tuple[Tensor, ...]], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    picks = [_first(model(part)).argmax(1) for part in _normalise(images).split(METRIC_BATCH)]
    return (torch.cat(picks).numpy() == labels).astype(np.float64)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
