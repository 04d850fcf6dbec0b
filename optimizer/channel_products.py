"""Channel numbers of products of activations with each other: sums over channels, heads, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .channels import Follower, Value, frozen_like
from .graph import argument
from .ledger import FROZEN


def matmul(follower: Follower, node: fx.Node) -> Any:
    x, y = follower.current(follower.value(node.args[-2])), follower.current(follower.value(node.args[-1]))
    shape = tuple(node.meta["val"].shape)
    if min(len(x.shape), len(y.shape)) < 2:
        follower.freeze_all([x, y], follower.why("it is multiplied by a vector"))
        return frozen_like(node.meta["val"])
    x, y = _summed(follower, x, -1), _summed(follower, y, -2)
    if x.ids.shape[-1] > 1 or y.ids.shape[-2] > 1:
        _couple_sum(follower, x, y)
        x, y = follower.current(x), follower.current(y)
    return _batched(follower, x, y, shape)


def _summed(follower: Follower, value: Value, axis: int) -> Value:
    """Join what is summed over within each slice of the leading dimensions, where those carry channels (heads)."""
    axis %= len(value.shape)
    leading = any(a < len(value.shape) - 2 for a in value.varying)
    return follower.merge_along(value, [axis]) if leading and axis in value.varying else value


def _couple_sum(follower: Follower, x: Value, y: Value) -> None:
    """Join the two sides of a sum over channels."""
    if x.ids.shape[-1] == 1 or y.ids.shape[-2] == 1:
        follower.freeze_all([x, y], follower.why("it is multiplied by what has no channels"))
        return
    x = follower.merge_along(x, [a for a in x.varying if a != len(x.shape) - 1])
    y = follower.merge_along(y, [a for a in y.varying if a != len(y.shape) - 2])
    follower.ledger.join(x.ids.reshape(-1), y.ids.reshape(-1))


def _batched(follower: Follower, x: Value, y: Value, shape: tuple[int, ...]) -> Value:
    """Return the numbers of a product: those of the leading dimensions, else the rows of x or the columns of y."""
    lead = range(len(shape) - 2)
    heads = [v for v in (x, y) if any(a < len(v.shape) - 2 for a in v.varying)]
    if heads:
        parts = []
        for value in (x, y):
            value = follower.merge_along(value, [a for a in value.varying if a >= len(value.shape) - 2])
            ids = value.ids[..., :1, :1]
            parts.append(Value(ids=ids, shape=(*value.shape[:-2], 1, 1), own=value.own))
        made = follower.elementwise(parts, (*[shape[a] for a in lead], 1, 1))
        return Value(ids=made.ids, shape=shape)
    rows, columns = x.ids.shape[-2] > 1, y.ids.shape[-1] > 1
    if rows and columns:
        follower.freeze_all([x, y], follower.why("it is one side of an outer product"))
    ids = x.ids[..., :1] if rows else y.ids[..., :1, :] if columns else torch.full((1, 1), FROZEN)
    return follower.current(Value(ids=ids.reshape((1,) * (len(shape) - 2) + tuple(ids.shape[-2:])), shape=shape))


def attention(follower: Follower, node: fx.Node) -> Any:
    """Scaled dot product attention; the scale depends on the size of a head, so that heads go whole."""
    q, k, v = (follower.settle(follower.value(arg), [-1], "it is summed over in attention") for arg in node.args[:3])
    shape = tuple(node.meta["val"].shape)
    parts = []
    for value in (q, k, v):
        value = follower.settle(value, [-2], "it lies along the sequence")
        ids = value.ids
        if value.shape[-3:-2] != shape[-3:-2] and ids.shape[-3] > 1:  # grouped queries
            ids = ids.repeat_interleave(shape[-3] // value.shape[-3], dim=-3)
        parts.append(Value(ids=ids, shape=(*shape[:-2], 1, 1)))
    mask = follower.value(argument(node, "attn_mask"))
    made = follower.elementwise(parts, (*shape[:-2], 1, 1))
    if isinstance(mask, Value):
        scores = (*shape[:-1], mask.shape[-1])
        made = follower.elementwise([Value(ids=made.ids, shape=scores), mask], scores)
        made = follower.settle(made, [-1, -2], "a mask differs along it")
    return follower.current(Value(ids=made.ids, shape=shape))
