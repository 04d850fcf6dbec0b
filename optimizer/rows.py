"""What a weight multiplies: the rows x of X in y = x W^T, for each kind of site.

Every function returns (groups, rows, in) for one call of an operator; columns are in the order of `Layout.to_matrix`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, fx

from .graph import Site, argument


def rows_of(site: Site, node: fx.Node, value: Tensor) -> Float[Tensor, "groups rows in"]:
    """Return the rows of one input tensor; the caller cuts large batches first."""
    match site.kind:
        case "conv":
            return _conv_rows(site, node, value)
        case "conv_transpose":
            return _transposed_rows(site, node, value)
        case _:
            return value.reshape(1, -1, value.shape[-1])


def _conv_rows(site: Site, node: fx.Node, value: Shaped[Tensor, "..."]) -> Tensor:
    kernel = site.layout.shape[2:]
    dims = len(kernel)
    if value.ndim == dims + 1:
        value = value[None]
    stride, dilation = (_spread(argument(node, name, 1), dims) for name in ("stride", "dilation"))
    padding = argument(node, "padding", 0)
    value = _pad(value, padding, kernel, dilation)
    return _patches(value, kernel, stride, dilation, site.layout.groups)


def _transposed_rows(site: Site, node: fx.Node, value: Tensor) -> Tensor:
    """A transposed conv is a conv with stride 1 over its zero-stuffed input, with its kernel reversed."""
    kernel = site.layout.shape[2:]
    dims = len(kernel)
    if value.ndim == dims + 1:
        value = value[None]
    names = ("stride", "padding", "output_padding", "dilation")
    defaults = (1, 0, 0, 1)
    stride, padding, extra, dilation = (
        _spread(argument(node, name, default), dims) for name, default in zip(names, defaults, strict=True)
    )
    stuffed = _stuff(value, stride)
    margins: list[int] = []
    for i in reversed(range(dims)):
        before = dilation[i] * (kernel[i] - 1) - padding[i]
        margins += [before, before + extra[i]]
    stuffed = F.pad(stuffed, margins)
    patches = _patches(stuffed, kernel, (1,) * dims, dilation, site.layout.groups)
    taps = 1
    for size in kernel:
        taps *= size
    shaped = patches.reshape(*patches.shape[:2], -1, taps)
    return shaped.flip(-1).reshape(patches.shape)


def _stuff(value: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Put stride - 1 zeros between neighbours along each spatial dimension."""
    sizes = [(size - 1) * step + 1 for size, step in zip(value.shape[2:], stride, strict=True)]
    out = value.new_zeros(*value.shape[:2], *sizes)
    index: Any = (..., *(slice(None, None, step) for step in stride))
    out[index] = value
    return out


def _patches(
    value: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """Return sliding windows as (groups, batch * positions, in/groups * taps)."""
    batch, channels = value.shape[:2]
    for i, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        value = value.unfold(2 + i, gap * (size - 1) + 1, step)
        value = value[..., ::gap]
    spatial = value.shape[2 : 2 + len(kernel)]
    count = batch
    for size in spatial:
        count *= size
    value = value.reshape(batch, groups, channels // groups, *spatial, *kernel)
    order = [1, 0, *range(3, 3 + len(kernel)), 2, *range(3 + len(kernel), 3 + 2 * len(kernel))]
    return value.permute(order).reshape(groups, count, -1)


def _pad(value: Tensor, padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    if padding == "valid":
        return value
    margins: list[int] = []
    for i in reversed(range(len(kernel))):
        if padding == "same":
            total = dilation[i] * (kernel[i] - 1)
            margins += [total // 2, total - total // 2]
        else:
            margins += [_spread(padding, len(kernel))[i]] * 2
    return F.pad(value, margins) if any(margins) else value


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return sizes * dims if len(sizes) == 1 else sizes
