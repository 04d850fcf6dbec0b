"""Networks of the zoo with weights of 8 bits and int8 activations."""

from __future__ import annotations

import functools

from paredown.optimizer import activations, fold
from paredown.optimizer.activations_range import Rule
from paredown.optimizer.model import Model
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Uniform, Weight

from ..zoo.nets import ZOO


@functools.cache
def w8(name: str) -> Model:
    """Return a network with 8-bit weights, its normalizations folded."""
    net = ZOO[name]
    model = net.model()
    folded = fold.apply(model, fold.plan(model, trace(model.module(), net.batches(2)).graph))
    return folded.with_weights({key: rounded(weight) for key, weight in folded.weights.items()})


@functools.cache
def int8(name: str) -> Model:
    """Return a network with 8-bit weights and activations."""
    model = w8(name)
    return activations.apply(model, ZOO[name].batches(16, 8), Rule())[0]


def rounded(weight: Weight) -> Uniform:
    """Round to 255 levels a row."""
    w = weight.dense()
    scale = (w.abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
    return Uniform(codes=((w / scale).round() + 128).byte(), scale=scale, zero=128, code_bits=8)
