"""Corrections after quantization, without training, each kept only if data that nothing else saw agrees.

bias           each layer's mean output becomes what it was (Nagel et al. 2019, section 4.2, from data)
normalization  mean and spread do, for layers into which a batch normalization was folded: the same as re-estimating
               its running statistics, written into the layer's row scales and bias; the mean alone for other layers.
               Not tried where nothing was folded
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, fx

from .graph import Site
from .model import Model
from .walk import Traced, Visitor, walk
from .weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

Kind: TypeAlias = Literal["bias", "normalization"]

MAX_GAIN = 1.5
"""A channel's spread is changed by at most this factor; more means that the channel is dead or broken."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """Calibration data to fit corrections on, and data to judge them by."""

    fit: Traced
    held_out: Traced


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Mean and standard deviation of each output channel of a layer."""

    mean: Float[Tensor, "channels"]
    std: Float[Tensor, "channels"]


def choose(original: Model, compressed: Model, data: Data, kinds: Iterable[Kind]) -> tuple[Model, tuple[str, ...]]:
    """Try each correction in turn and keep it if the held-out output error falls; return notes that say so."""
    reference = walk(data.held_out, original.values())
    moments = measure(original, data.fit)
    best, error = compressed, output_error(reference, walk(data.held_out, compressed.values()))
    notes = []
    for kind in kinds:
        if kind == "normalization" and not any(edit["edit"] == "fold_norm" for edit in compressed.edits):
            continue
        candidate = apply(best, data.fit, moments, kind)
        tried = output_error(reference, walk(data.held_out, candidate.values()))
        verdict = "kept" if tried < error else "dropped"
        notes.append(f"{kind} correction {verdict}: held-out output error {error:.5f} -> {tried:.5f}")
        if tried < error:
            best, error = candidate, tried
    return best, tuple(notes)


def measure(model: Model, traced: Traced) -> dict[str, Moments]:
    """Return the output moments of each layer with a bias of its own, by the name of the bias."""
    found: dict[str, Moments] = {}

    def after(site: Site, node: fx.Node, outputs: Sequence[Tensor]) -> None:
        if bias_name := _bias_name(model, traced, site, node):
            found[bias_name] = _moments(site, outputs)

    walk(traced, model.values(), Visitor(after=after))
    return found


def apply(model: Model, traced: Traced, moments: Mapping[str, Moments], kind: Kind) -> Model:
    """Return the model with each layer's output moved to `moments`, layer after layer."""
    folded = {f"{edit['into']}.weight" for edit in model.edits if edit["edit"] == "fold_norm"}
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Weight] = {}

    def after(site: Site, node: fx.Node, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        bias_name = _bias_name(model, traced, site, node)
        if bias_name not in moments:
            return None
        now, want = _moments(site, outputs), moments[bias_name]
        weight = model.weights[site.param]
        gain = torch.ones_like(now.mean)
        if kind == "normalization" and site.param in folded:
            gain = (want.std / now.std.clamp(min=1e-12)).clamp(1 / MAX_GAIN, MAX_GAIN)
            weights[site.param] = scale_rows(weight, gain)
        bias = model.tensors[bias_name]
        tensors[bias_name] = ((bias.double() - now.mean) * gain + want.mean).to(bias.dtype)
        return [_move(site, y, gain, want.mean - now.mean * gain) for y in outputs]

    walk(traced, model.values(), Visitor(after=after))
    return replace(model, tensors={**model.tensors, **tensors}, weights={**model.weights, **weights})


def scale_rows(weight: Weight, gain: Float[Tensor, "out"]) -> Weight:
    """Return a weight whose rows are multiplied by `gain`, in the scale's own dtype."""
    match weight:
        case Dense():
            return Dense(values=(weight.values.double() * gain[:, None]).to(weight.values.dtype))
        case Uniform() | Codebook():
            return replace(weight, scale=(weight.scale.double() * gain[:, None]).to(weight.scale.dtype))
        case LowRank():
            return replace(weight, left=scale_rows(weight.left, gain))
        case Sum():
            return replace(weight, terms=tuple(scale_rows(term, gain) for term in weight.terms))
        case _:
            assert_never(weight)


def output_error(reference: Sequence[tuple[Any, ...]], outputs: Sequence[tuple[Any, ...]]) -> float:
    """Return ||y' - y|| / ||y|| over all floating outputs and batches."""
    wrong = total = 0.0
    for before, after in zip(reference, outputs, strict=True):
        for y, z in zip(before, after, strict=True):
            if isinstance(y, Tensor) and y.is_floating_point():
                wrong += float((z.double() - y.double()).square().sum())
                total += float(y.double().square().sum())
    return float((wrong / max(total, 1e-300)) ** 0.5)


def _bias_name(model: Model, traced: Traced, site: Site, node: fx.Node) -> str:
    """Return the name of the bias that this call adds, "" if it has none or shares it with another call."""
    if site.kind not in ("conv", "conv_transpose", "linear") or len(node.args) < 3:
        return ""
    bias = node.args[2] if site.operand == 0 else node.args[0]
    name = traced.graph.values.get(getattr(bias, "name", ""), "")
    users = sum(len(other.users) for other in traced.graph.nodes if traced.graph.values.get(other.name) == name)
    return name if name in model.tensors and users == 1 else ""


def _channel_axis(site: Site, y: Tensor) -> int:
    return y.ndim - 1 if site.kind == "linear" else y.ndim - (len(site.layout.shape) - 2) - 1


def _moments(site: Site, outputs: Sequence[Tensor]) -> Moments:
    total = square = torch.zeros(1, dtype=torch.float64)
    count = 0
    for y in outputs:
        flat = y.movedim(_channel_axis(site, y), -1).reshape(-1, y.shape[_channel_axis(site, y)]).double()
        total, square, count = total + flat.sum(0), square + flat.square().sum(0), count + len(flat)
    mean = total / max(count, 1)
    return Moments(mean=mean, std=(square / max(count, 1) - mean.square()).clamp(min=0).sqrt())


def _move(site: Site, y: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    shape = [1] * y.ndim
    shape[_channel_axis(site, y)] = -1
    return y * gain.to(y.dtype).reshape(shape) + shift.to(y.dtype).reshape(shape)
