"""ESPNet p=2 q=8 for street scenes (Mehta et al. 2018, arXiv 1803.06815), its calibration draws and metrics.

Checkpoint `segmentation/espnet_p2_q8_camvid.safetensors`. Calibration: the 16 CamVid train images; metric: the 39 test
images.
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

OUTPUTS, CLASSES, VOID = 12, 11, 11
CALIBRATION_BATCH = 4
METRIC_BATCH = 3
MEAN_BGR = (110.33102643430215, 108.40886315470784, 105.03319368755676)
STD_BGR = (72.12571015416249, 72.69074533734523, 69.90434816160945)


class C(nn.Module):
    """A convolution without bias that keeps the size (stride 1) or halves it (stride 2)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class BR(nn.Module):
    """BatchNorm and a PReLU per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class CBR(BR):
    """A convolution, BatchNorm and a PReLU per channel."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(outputs)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x))


class Pyramid(nn.Module):
    """Reduce to a fifth of the channels, five dilated convolutions, running sums, concatenation (without BatchNorm)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        narrow = outputs // 5
        wide = outputs - 4 * narrow
        self.c1 = C(inputs, narrow, kernel, stride)
        self.d1 = C(narrow, wide, 3)
        self.d2, self.d4 = C(narrow, narrow, 3, dilation=2), C(narrow, narrow, 3, dilation=4)
        self.d8, self.d16 = C(narrow, narrow, 3, dilation=8), C(narrow, narrow, 3, dilation=16)

    def pyramid(self, x: Tensor) -> Tensor:
        x = self.c1(x)
        a = self.d2(x)
        b = a + self.d4(x)
        c = b + self.d8(x)
        d = c + self.d16(x)
        return torch.cat([self.d1(x), a, b, c, d], dim=1)


class Down(Pyramid):
    """Halve the size: a pyramid whose reduction is 3x3 with stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, kernel=3, stride=2)
        self.bn, self.act = nn.BatchNorm2d(outputs, eps=1e-3), nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.pyramid(x)))


class ESP(Pyramid):
    """Keep the size; add the input where the channels agree and `residual` is set."""

    def __init__(self, inputs: int, outputs: int, residual: bool) -> None:
        super().__init__(inputs, outputs, kernel=1, stride=1)
        self.bn, self.residual = BR(outputs), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.pyramid(x)
        return self.bn(x + y if self.residual else y)


class Encoder(nn.Module):
    """Features of a half (19 channels), a quarter (131) and the scores of an eighth (12) of the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.level1, self.b1 = CBR(3, 16, stride=2), BR(19)
        self.level2_0, self.b2 = Down(19, 64), BR(131)
        self.level2 = nn.ModuleList(ESP(64, 64, residual=True) for _ in range(2))
        self.level3_0, self.b3 = Down(131, 128), BR(256)
        self.level3 = nn.ModuleList(ESP(128, 128, residual=True) for _ in range(8))
        self.classifier = C(256, OUTPUTS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = F.avg_pool2d(x, 3, stride=2, padding=1)
        quarter = F.avg_pool2d(half, 3, stride=2, padding=1)
        e0 = self.b1(torch.cat([self.level1(x), half], dim=1))
        s2 = t2 = self.level2_0(e0)
        for block in self.level2:
            t2 = block(t2)
        e1 = self.b2(torch.cat([t2, s2, quarter], dim=1))
        s3 = t3 = self.level3_0(e1)
        for block in self.level3:
            t3 = block(t3)
        return e0, e1, self.classifier(self.b3(torch.cat([s3, t3], dim=1)))


class ESPNet(nn.Module):
    """Scores [batch, 12, 360, 480] of normalised BGR images [batch, 3, 360, 480]; channel 11 means void."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.br = nn.BatchNorm2d(OUTPUTS, eps=1e-3)
        self.up_l3 = nn.Sequential(_twice())
        self.level3_C = C(131, OUTPUTS, 1)
        self.combine_l2_l3 = nn.Sequential(BR(2 * OUTPUTS), ESP(2 * OUTPUTS, OUTPUTS, residual=False))
        self.up_l2 = nn.Sequential(_twice(), BR(OUTPUTS))
        self.conv = CBR(31, OUTPUTS)
        self.classifier = _twice()

    def forward(self, x: Tensor) -> Tensor:
        e0, e1, scores = self.encoder(x)
        y = torch.cat([self.level3_C(e1), self.up_l3(self.br(scores))], dim=1)
        y = self.up_l2(self.combine_l2_l3(y))
        return self.classifier(self.conv(torch.cat([y, e0], dim=1)))


def espnet() -> nn.Module:
    return ESPNet()


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Draw from the 16 train images, in batches of 4."""
    data = _data()
    pool = data.images("segmentation/camvid_train_16.npz")
    x = torch.cat([_normalised(pool[i]) for i in data.draw(len(pool), samples, seed)])
    return [(part,) for part in x.split(CALIBRATION_BATCH)]


def pixel_accuracy(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score the share of pixels (void ones apart) that are right, for each of the 39 test images."""
    counts = _confusion(model).astype(np.float64)
    return np.trace(counts, axis1=1, axis2=2) / counts.sum(axis=(1, 2))


def miou(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> float:
    """Return the mean over the 11 classes of intersection over union, from one confusion matrix of all images."""
    counts = _confusion(model).sum(axis=0)
    right = np.diag(counts)
    return float((right / (counts.sum(axis=0) + counts.sum(axis=1) - right)).mean())


@torch.no_grad()
def _confusion(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.int64]:
    """Count pixels by image, true class and found class: [39, 11, 11]."""
    data, name = _data(), "segmentation/camvid_test_39.npz"
    images, labels = data.images(name), data.arrays(name)["label"].astype(np.int64)
    counts = np.zeros((len(images), CLASSES, CLASSES), dtype=np.int64)
    for part in data.batches(len(images), METRIC_BATCH):
        scores = _first(model(torch.cat([_normalised(image) for image in images[part]])))
        for i, found in enumerate(scores[:, :CLASSES].argmax(1).numpy(), start=part.start):
            seen = labels[i] < VOID
            pairs = labels[i][seen] * CLASSES + found[seen]
            counts[i] = np.bincount(pairs, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    return counts


def _twice() -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(OUTPUTS, OUTPUTS, 2, stride=2, bias=False)


def _normalised(rgb: npt.NDArray[np.uint8]) -> Tensor:
    x = torch.from_numpy(rgb[:, :, ::-1].copy()).permute(2, 0, 1).float()
    return ((x - torch.tensor(MEAN_BGR).view(3, 1, 1)) / torch.tensor(STD_BGR).view(3, 1, 1) / 255).unsqueeze(0)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
