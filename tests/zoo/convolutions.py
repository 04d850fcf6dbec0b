"""Small convolutional networks: residual, separable, one-dimensional, encoder-decoder, squeeze-excite, grouped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """A CIFAR residual block; where it halves the image the shortcut is subsampled and padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return F.relu(x + y)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(ResidualBlock(6, 6, 1), ResidualBlock(6, 10, 2))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def residual() -> nn.Module:
    return Residual()


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


def separable() -> nn.Module:
    """Return a network in the manner of MobileNet: depthwise and pointwise convolutions, activations in place."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        _separable(8, 12, 1),
        _separable(12, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, 4),
    )


class Waves(nn.Module):
    """Strided and dilated convolutions in time; a linear layer with a normalization after it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(2, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm1d(8)
        self.context = nn.Conv1d(8, 8, 3, dilation=2, padding="same")
        self.head = nn.Linear(8, 6, bias=False)
        self.head_norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.encode(x)))
        x = x + torch.tanh(self.context(x))
        y: Tensor = self.head_norm(self.head(x.amax(2)))
        return y


def waves() -> nn.Module:
    return Waves()


class EncoderDecoder(nn.Module):
    """A small U-Net: the features of each scale are concatenated with what the transposed convolutions bring back."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.up, self.norm3 = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1), nn.BatchNorm2d(6)
        self.grouped_up = nn.ConvTranspose2d(12, 4, 2, stride=2, groups=2, bias=False)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.norm1(self.down1(x)))
        coarse = torch.relu(self.norm2(self.down2(fine)))
        x = torch.cat([fine, torch.relu(self.norm3(self.up(coarse)))], dim=1)
        y: Tensor = self.out(torch.relu(self.grouped_up(x)))
        return y


def encoder_decoder() -> nn.Module:
    return EncoderDecoder()


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        y: Tensor = self.head(x * gate).flatten(1).mean(1)
        return y


def squeeze_excite() -> nn.Module:
    return SqueezeExcite()


class Grouped(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(12, affine=False)
        self.second = nn.Conv2d(12, 6, 3, stride=2, groups=3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        y: Tensor = self.head(torch.relu(self.second(x)).mean((2, 3)))
        return y


def grouped() -> nn.Module:
    return Grouped()


class Detector(nn.Module):
    """Two feature maps read by one shared head; a dictionary of a tuple and a tensor comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stem_norm = nn.BatchNorm2d(8)
        self.deeper = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.deeper_norm = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 6, 3, padding=1)
        self.score = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        fine = torch.relu(self.stem_norm(self.stem(image)))
        coarse = torch.relu(self.deeper_norm(self.deeper(fine)))
        boxes = tuple(self.head(x).flatten(2) for x in (fine, coarse))
        return {"boxes": boxes, "score": self.score(coarse.mean((2, 3)))}


def detector() -> nn.Module:
    return Detector()
