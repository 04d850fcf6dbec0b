"""`paredown::fake_quantize` and `paredown::requantize`: activations on an int8 grid, as torch and as runtimes compute.

    fake_quantize   y = (clamp(round(x / scale) + zero) - zero) * scale
    requantize      the same for x' = round(x / unit) in the place of x, and scale / unit in the place of scale

both in float32, round half to even: QuantizeLinear then DequantizeLinear of the ONNX standard. `requantize` is what an
integer kernel does to the sums of an int8 layer, which are whole numbers of `unit` (input scale times row scale); float
sums are off by some 1e-7, and each code that this flips would flip others behind it. Ranges become grids as in Jacob
et al. 2018, section 3: zero is exactly representable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import ActQuant

CODES = {False: (0, 255), True: (-128, 127)}
"""Smallest and largest code, by whether codes are signed."""
LEAST_SCALE = 2.0**-100
"""Below it products of two scales leave the range of float32."""

_LIBRARY: Any = torch.library.Library("paredown", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("fake_quantize(Tensor x, float scale, int zero, bool signed) -> Tensor")
_LIBRARY.define("requantize(Tensor x, float scale, int zero, bool signed, Tensor unit, int axis) -> Tensor")


def operators() -> tuple[Any, Any]:
    """Return `fake_quantize` and `requantize` as a graph holds them; the first four arguments mean the same."""
    return torch.ops.paredown.fake_quantize.default, torch.ops.paredown.requantize.default


def grid_of(low: float, high: float) -> ActQuant:
    """Return the unsigned grid that spans low..high and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(torch.tensor((high - low) / 255, dtype=torch.float32))
    if scale < LEAST_SCALE:
        return ActQuant(scale=1.0, zero=0, signed=False)
    return ActQuant(scale=scale, zero=min(255, max(0, round(-low / scale))), signed=False)


def _fake_quantize(x: Tensor, scale: float, zero: int, signed: bool) -> Tensor:
    return _nearest(x / scale, scale, zero, signed)


def _requantize(x: Tensor, scale: float, zero: int, signed: bool, unit: Tensor, axis: int) -> Tensor:
    shape = [1] * x.ndim
    shape[axis] = -1
    sums = (x / unit.reshape(shape)).round_()
    return _nearest(sums.mul_((unit / scale).reshape(shape)), scale, zero, signed)


def _nearest(steps: Tensor, scale: float, zero: int, signed: bool) -> Tensor:
    """Return the grid's nearest value to `steps` times its scale; `steps` is overwritten."""
    return steps.round_().add_(zero).clamp_(*CODES[signed]).sub_(zero).mul_(scale)


def _same_shape(x: Tensor, *settings: object) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("fake_quantize", _fake_quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("requantize", _requantize, "CompositeExplicitAutograd")
torch.library.register_fake("paredown::fake_quantize", _same_shape, lib=_LIBRARY)
torch.library.register_fake("paredown::requantize", _same_shape, lib=_LIBRARY)
