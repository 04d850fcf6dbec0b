"""Convolutions of a packed weight with inputs rounded to int8 at run time (`paredown_conv` of cpu/paredown.h).

The kernel (n, channels, height, width) is multiplied as a matrix (n, k) of layout "c16", its inputs in the order (row
of the kernel, column, channel), channels filled up to a multiple of 4: a word of the image is four channels of a place.
The inputs of an image share one scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from . import lut_reference
from .lut_spec import LutSpec

CHANNELS = 4
"""Channels of a word of the image."""
MOST_INPUTS = 65536
"""Products of bytes that a sum of 32 bits holds (cpu/conv.cpp)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSpec:
    """A convolution of one group in two dimensions; `pads`: top, left, bottom, right."""

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        if min(self.channels, *self.kernel, *self.stride, *self.dilation) < 1 or min(self.pads) < 0:
            raise ValueError(f"{self} is no convolution")

    @property
    def filled_channels(self) -> int:
        return -(-self.channels // CHANNELS) * CHANNELS

    @property
    def inputs(self) -> int:
        """Inputs of one output, with those that fill up channels."""
        return self.kernel[0] * self.kernel[1] * self.filled_channels


def tap_spec(spec: LutSpec, conv: ConvSpec) -> LutSpec:
    """Return the matrix that the kernel multiplies by, of a weight (n, channels x height x width)."""
    return replace(spec, k=conv.inputs, group=0)


def tap_codes(codes: UInt8[Tensor, "n k"], conv: ConvSpec) -> UInt8[Tensor, "n inputs"]:
    """Return codes of (channel, row, column) as (row, column, channel); what fills up channels is 0."""
    by_tap = codes.reshape(-1, conv.channels, *conv.kernel).permute(0, 2, 3, 1)
    filled = codes.new_zeros(*by_tap.shape[:-1], conv.filled_channels)
    filled[..., : conv.channels] = by_tap
    return filled.reshape(len(codes), conv.inputs)


def refusal(spec: LutSpec, conv: ConvSpec) -> str:
    """Return "" if the kernel can convolve with a weight of these sizes, else the reason."""
    if spec.scale_shape[1] != 1:
        return f"its scales are of groups of {spec.group} inputs, convolutions need one scale per row (group: 0)"
    if conv.inputs > MOST_INPUTS:
        return f"sums of {conv.inputs} products of bytes do not fit 32 bits"
    return ""


def round_images(x: Float[Tensor, "... c h w"]) -> Float[Tensor, "... c h w"]:
    """Return images rounded to signed bytes and back, each by its largest value; float32."""
    values = x.float()
    most = values.abs().amax((-3, -2, -1), keepdim=True)
    factor, step = lut_reference.rounding(most)
    return torch.round(values * factor) * step
