"""Small convolutional networks whose channels meet in harder ways: concatenated, grouped, gated, shuffled, branched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """Normalizes all features so far and adds `growth` new ones at their end."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class Dense(nn.Module):
    """A DenseNet of two blocks: every normalization but the last of a block spans a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first = nn.Sequential(DenseLayer(8, 6), DenseLayer(14, 6))
        self.between_norm, self.between = nn.BatchNorm2d(20), nn.Conv2d(20, 10, 1, bias=False)
        self.second = DenseLayer(10, 6)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.between(F.relu(self.between_norm(self.first(self.stem(image)))))
        x = F.relu(self.norm(self.second(F.avg_pool2d(x, 2))))
        y: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return y


def dense() -> nn.Module:
    return Dense()


def _varied(module: nn.Module) -> nn.Module:
    """Give group normalizations and slopes values that differ from channel to channel."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
        if isinstance(part, nn.PReLU):
            nn.init.uniform_(part.weight, -0.2, 0.5)
    return module


class SlopedBlock(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.GroupNorm(3, inner)
        self.slope = nn.PReLU(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.norm2(self.conv2(self.slope(self.norm1(self.conv1(x)))))
        return y


class Restorer(nn.Module):
    """Doubles an image: group-normalized residual blocks, a slope for each channel, pixels shuffled out of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_slope = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8)
        self.blocks = nn.Sequential(SlopedBlock(8, 12), SlopedBlock(8, 12))
        self.grow, self.shuffle, self.slope = nn.Conv2d(8, 24, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(6)
        self.out = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.stem_slope(self.stem(image)))
        y: Tensor = self.out(self.slope(self.shuffle(self.grow(x))))
        return y + F.interpolate(image, scale_factor=2.0, mode="nearest")


def restorer() -> nn.Module:
    return _varied(Restorer())


class Gated(nn.Module):
    """Half of each convolution's channels open or close the other half; averaged down and interpolated up again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(8, 24, 3, padding=1)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        value, gate = self.norm(self.first(image)).chunk(2, dim=1)
        x = F.avg_pool2d(value * torch.sigmoid(gate), 2)
        x = F.interpolate(F.glu(self.second(x), dim=1), scale_factor=2.0, mode="bilinear", align_corners=False)
        y: Tensor = self.out(x)
        return y


def gated() -> nn.Module:
    return Gated()


class Segmenter(nn.Module):
    """Three outputs of one encoder: a mask from two scales, an auxiliary mask from the coarse one, and a score."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.fine_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.coarse, self.coarse_norm = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.context, self.context_norm = nn.Conv2d(12, 12, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(12)
        self.narrow = nn.Conv2d(12, 8, 1)
        self.mask, self.auxiliary = nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(12, 3, 1)
        self.score = nn.Linear(12, 2)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        fine = F.relu(self.fine_norm(self.fine(image)))
        coarse = F.relu(self.coarse_norm(self.coarse(F.max_pool2d(fine, 3, stride=1, padding=1))))
        coarse = coarse + F.leaky_relu(self.context_norm(self.context(coarse)), 0.1)
        wide = F.interpolate(self.narrow(coarse), size=fine.shape[2:], mode="bilinear", align_corners=True)
        others = {"auxiliary": self.auxiliary(coarse), "score": self.score(coarse.amax((2, 3)))}
        return self.mask(fine + wide), others


def segmenter() -> nn.Module:
    return Segmenter()


class Multiplied(nn.Module):
    """Convolutions in time: grouped, then two outputs for each channel, then three of one that are grouped again."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.norm = nn.Conv1d(4, 8, 5, stride=2, padding=2, groups=2), nn.BatchNorm1d(8)
        self.twice, self.twice_norm = nn.Conv1d(8, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm1d(16)
        self.mix = nn.Conv1d(16, 6, 1)
        self.thrice = nn.Conv1d(6, 18, 3, padding=1, groups=6)
        self.gather = nn.Conv1d(18, 6, 1, groups=3)
        self.head = nn.Linear(6, 3)

    def forward(self, wave: Tensor) -> Tensor:
        x = F.elu(self.norm(self.encode(wave)))
        x = self.mix(F.relu(self.twice_norm(self.twice(x))))
        x = x + torch.tanh(self.gather(F.relu(self.thrice(x))))
        y: Tensor = self.head(x.mean(2))
        return y


def multiplied() -> nn.Module:
    return Multiplied()


class ExcitedBlock(nn.Module):
    """The inverted residual block of MobileNetV3: widened, filtered, weighed by what each channel is on average."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.filter = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2, self.act = nn.BatchNorm2d(inner), nn.Hardswish(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)
        self.project, self.norm3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm2(self.filter(self.act(self.norm1(self.expand(x))))))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(self.pool(y)))))
        out: Tensor = x + self.norm3(self.project(y))
        return out


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act = nn.Hardswish(inplace=True)
        self.blocks = nn.Sequential(ExcitedBlock(8, 16), ExcitedBlock(8, 12))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.Hardswish())
        self.classify = nn.Linear(12, 4)

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.classify(self.head(self.blocks(self.act(self.norm(self.stem(image))))))
        return y


def excited() -> nn.Module:
    return Excited()
