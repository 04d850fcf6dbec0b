"""MobileNetV1 of width 0.25 at 224x224 (Howard et al. 2017, arXiv 1704.04861), its calibration draws and metrics.

Checkpoint `imagenet/mobilenet_v1_025_224.safetensors`. Of the 300 sample images, every third one (positions 0, 3, ...:
100 images) is for calibration and the other 200 are for the metric `top1`, so that the two never meet.
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

CALIBRATION_BATCH = 20
METRIC_BATCH = 50
SAMPLES = "imagenet/imagenet_samples_300.npz"
CHANNELS = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
HALVED = (2, 4, 6, 12)  # the blocks of stride 2, counted from 1


class MobileNet(nn.Module):
    """Logits [batch, 1000] of RGB images [batch, 3, 224, 224] with values -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.conv1_bn = nn.BatchNorm2d(8, eps=1e-3)
        for i, (inputs, outputs) in enumerate(zip((8, *CHANNELS), CHANNELS, strict=False), start=1):
            depthwise = nn.Conv2d(inputs, inputs, 3, 2 if i in HALVED else 1, groups=inputs, bias=False)
            self.add_module(f"conv_dw_{i}", depthwise)
            self.add_module(f"conv_dw_{i}_bn", nn.BatchNorm2d(inputs, eps=1e-3))
            self.add_module(f"conv_pw_{i}", nn.Conv2d(inputs, outputs, 1, bias=False))
            self.add_module(f"conv_pw_{i}_bn", nn.BatchNorm2d(outputs, eps=1e-3))
        self.conv_preds = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._layer("conv1", _padded(x, stride=2))
        for i in range(1, len(CHANNELS) + 1):
            x = self._layer(f"conv_dw_{i}", _padded(x, stride=2 if i in HALVED else 1))
            x = self._layer(f"conv_pw_{i}", x)
        return self.conv_preds(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return F.relu6(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))


def mobilenet() -> nn.Module:
    return MobileNet()


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Draw from the 100 calibration images, in batches of 20."""
    data = _data()
    pool = data.images(SAMPLES)[::3]
    x = _scaled([pool[i] for i in data.draw(len(pool), samples, seed)])
    return [(part,) for part in x.split(CALIBRATION_BATCH)]


def top1(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score 1 or 0 for each of the 200 images that calibration never draws."""
    kept = [i for i in range(300) if i % 3]
    return _top1(model, kept)


def top1_all(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score 1 or 0 for each of the 300 images, to compare with the data folder's README."""
    return _top1(model, list(range(300)))


@torch.no_grad()
def _top1(model: Callable[..., Tensor | tuple[Tensor, ...]], picks: list[int]) -> npt.NDArray[np.float64]:
    data = _data()
    pool, labels = data.images(SAMPLES), data.arrays(SAMPLES)["y"]
    parts = _scaled([pool[i] for i in picks]).split(METRIC_BATCH)
    found = torch.cat([_first(model(part)).argmax(1) for part in parts]).numpy()
    return (found == labels[picks]).astype(np.float64)


def _padded(x: Tensor, stride: int) -> Tensor:
    """Pad 1 all around, or with stride 2 only at the bottom and the right."""
    return F.pad(x, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))


def _scaled(images: list[npt.NDArray[np.uint8]]) -> Tensor:
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
