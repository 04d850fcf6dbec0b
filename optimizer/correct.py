"""Corrections after quantization, without training, each kept only if data that nothing else saw agrees.

bias           each layer's mean output becomes what it was (Nagel et al. 2019, section 4.2, from data)
normalization  mean and spread do, for layers with a batch normalization behind them or folded into them; the mean alone
               for other layers. Not tried where there is no such layer

What moves a layer's output is its own bias, the row scales where a normalization was folded, or the running statistics
of the normalization behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, fx

from .fold import NORMS
from .graph import Site, module_path
from .model import Model
from .walk import Traced, Visitor, walk
from .weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

Kind: TypeAlias = Literal["bias", "normalization"]

RUNNING = ".running_mean"
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
        if kind == "normalization" and not _has_norms(compressed, data.fit):
            continue
        candidate = apply(best, data.fit, moments, kind)
        tried = output_error(reference, walk(data.held_out, candidate.values()))
        verdict = "kept" if tried < error else "dropped"
        notes.append(f"{kind} correction {verdict}: held-out output error {error:.5f} -> {tried:.5f}")
        if tried < error:
            best, error = candidate, tried
    return best, tuple(notes)


def measure(model: Model, traced: Traced) -> dict[str, Moments]:
    """Return the output moments of each layer that can be moved, by the name of what moves it."""
    found: dict[str, Moments] = {}

    def after(site: Site, node: fx.Node, outputs: Sequence[Tensor]) -> None:
        if name := _mover(model, traced, site, node):
            found[name] = _moments(site, outputs)

    walk(traced, model.values(), Visitor(after=after))
    return found


def apply(model: Model, traced: Traced, moments: Mapping[str, Moments], kind: Kind) -> Model:
    """Return the model with each layer's output moved to `moments`, layer after layer."""
    folded = {f"{edit['into']}.weight" for edit in model.edits if edit["edit"] == "fold_norm"}
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Weight] = {}

    def after(site: Site, node: fx.Node, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        name = _mover(model, traced, site, node)
        if name not in moments:
            return None
        now, want = _moments(site, outputs), moments[name]
        gain = torch.ones_like(now.mean)
        if kind == "normalization" and (site.param in folded or name.endswith(RUNNING)):
            gain = (want.std / now.std.clamp(min=1e-12)).clamp(1 / MAX_GAIN, MAX_GAIN)
        if name.endswith(RUNNING):
            tensors.update(_moved_norm(model, name.removesuffix(RUNNING), now.mean, gain, want.mean))
        else:
            bias = model.tensors[name]
            tensors[name] = ((bias.double() - now.mean) * gain + want.mean).to(bias.dtype)
            if kind == "normalization" and site.param in folded:
                weights[site.param] = scale_rows(model.weights[site.param], gain)
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


def _has_norms(model: Model, traced: Traced) -> bool:
    folded = any(edit["edit"] == "fold_norm" for edit in model.edits)
    calls = ((traced.graph.sites.get(node.name), node) for node in traced.graph.nodes)
    return folded or any(_norm_behind(model, sites[0], node) for sites, node in calls if sites)


def _mover(model: Model, traced: Traced, site: Site, node: fx.Node) -> str:
    """Return the tensor that can move this call's output: the statistics of its normalization, else its bias, or ""."""
    behind = _norm_behind(model, site, node)
    calls = [other for other in traced.graph.nodes if other.target in NORMS and module_path(other) == behind]
    if behind and len(calls) == 1:
        return behind + RUNNING
    return _bias_name(model, traced, site, node)


def _norm_behind(model: Model, site: Site, node: fx.Node) -> str:
    """Return the path of the batch normalization that alone reads this call's output, "" if none does."""
    if site.kind not in ("conv", "conv_transpose", "linear") or len(node.users) != 1:
        return ""
    (user,) = node.users
    if user.target not in NORMS or (site.kind == "linear" and node.meta["val"].ndim != 2):
        return ""
    path = module_path(user)
    return path if path + RUNNING in model.tensors and f"{path}.running_var" in model.tensors else ""


def _moved_norm(model: Model, path: str, mean: Tensor, gain: Tensor, want: Tensor) -> dict[str, Tensor]:
    """Return running statistics m', v' with which y is normalized as (y - mean) gain + want was with m and v.

    m' = mean - (want - m) / gain, v' = (v + eps) / gain^2 - eps.
    """
    old, var = model.tensors[path + RUNNING], model.tensors[f"{path}.running_var"]
    eps = float(model.skeleton.get_submodule(path).eps)  # type: ignore[arg-type]
    moved = mean - (want - old.double()) / gain
    spread = ((var.double() + eps) / gain.square() - eps).clamp(min=0)
    return {path + RUNNING: moved.to(old.dtype), f"{path}.running_var": spread.to(var.dtype)}


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
