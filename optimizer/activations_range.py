"""Ranges of activations: how far a grid reaches, from what calibration data show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor, fx

from .activations_grid import CODES, grid_of
from .activations_names import value_names
from .errors import InputError, RecipeError, nearest
from .graph import Graph
from .model import ActQuant, InputSpec
from .walk import Traced, Visitor, walk

Range: TypeAlias = Literal["minmax", "percentile", "mse"]
RANGES: tuple[Range, ...] = ("minmax", "percentile", "mse")

BINS = 4096
"""Sixteen bins to a step of the widest grid."""
SHRINKS = torch.linspace(1.0, 0.2, 81, dtype=torch.float64)
"""Parts of the measured range that `mse` tries at each end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a range is chosen from all values of a tensor.

    minmax: all of them lie in it. percentile: that part of them, the rest cut off evenly at both ends where both have
    any. mse: the least mean squared error of rounding and cutting off.
    """

    range: Range = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.range not in RANGES:
            raise RecipeError(f'range="{self.range}" is not supported', fix=nearest(self.range, RANGES))
        if not 50 < self.percentile <= 100:
            raise RecipeError(f"percentile={self.percentile} is out of range", fix="use more than 50, at most 100")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """How many values fell into each of equal bins from `low` to `high`."""

    low: float
    high: float
    counts: Float64[Tensor, "bins"]

    @property
    def centers(self) -> Float64[Tensor, "bins"]:
        step = (self.high - self.low) / len(self.counts)
        return self.low + step * (torch.arange(len(self.counts), dtype=torch.float64) + 0.5)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Watch:
    """The network as it runs on all batches with `values`, and the values (stable names) to look at."""

    traced: Traced
    values: Mapping[str, Tensor]
    inputs: tuple[InputSpec, ...]
    wanted: frozenset[str]


def measure(watch: Watch, rule: Rule) -> dict[str, ActQuant]:
    """Return the grid of each value that is watched, from one walk for `minmax` and two for the others."""
    extremes = _extremes(watch)
    if rule.range == "minmax":
        return {name: grid_of(low, high) for name, (low, high) in extremes.items()}
    return {name: choose(histogram, rule) for name, histogram in _histograms(watch, extremes).items()}


def choose(histogram: Histogram, rule: Rule) -> ActQuant:
    """Return the grid that a rule gives to values spread like this."""
    match rule.range:
        case "minmax":
            return grid_of(histogram.low, histogram.high)
        case "percentile":
            return grid_of(*_percentiles(histogram, rule.percentile))
        case "mse":
            return _least_error(histogram)


def _percentiles(histogram: Histogram, percent: float) -> tuple[float, float]:
    """Return the ends of the range, on the edges of bins; a rectified tensor is cut at its top alone."""
    total = histogram.counts.sum()
    ends = 2 if histogram.low < 0 < histogram.high else 1
    outside = total * (1 - percent / 100) / ends
    step = (histogram.high - histogram.low) / len(histogram.counts)
    below = int((histogram.counts.cumsum(0) <= outside).sum())
    above = int((histogram.counts.flip(0).cumsum(0) <= outside).sum())
    low = histogram.low + step * below if histogram.low < 0 else histogram.low
    return low, histogram.high - step * above if histogram.high > 0 else histogram.high


def _least_error(histogram: Histogram) -> ActQuant:
    """Search the top of the range with the bottom as measured, then the bottom."""
    low, high = histogram.low, histogram.high
    if high > 0:
        high = min((high * float(part) for part in SHRINKS), key=lambda end: _error(histogram, grid_of(low, end)))
    if low < 0:
        low = min((low * float(part) for part in SHRINKS), key=lambda end: _error(histogram, grid_of(end, high)))
    return grid_of(low, high)


def _error(histogram: Histogram, grid: ActQuant) -> float:
    centers, (low, high) = histogram.centers, CODES[grid.signed]
    codes = ((centers / grid.scale).round() + grid.zero).clamp(low, high)
    delta = (codes - grid.zero) * grid.scale - centers
    return float((delta.square() * histogram.counts).sum())


def _extremes(watch: Watch) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}

    def see(name: str, value: Tensor) -> None:
        low, high = (float(end) for end in value.aminmax())
        before = found.get(name, (low, high))
        found[name] = (min(low, before[0]), max(high, before[1]))

    _show(watch, see)
    for name, (low, high) in found.items():
        if not math.isfinite(high - low):
            raise InputError(f'"{name}" reaches {low} to {high} on the calibration data', fix="check the data")
    return found


def _histograms(watch: Watch, extremes: Mapping[str, tuple[float, float]]) -> dict[str, Histogram]:
    counts: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> None:
        low, high = extremes[name]
        part = torch.histc(value, BINS if high > low else 1, low, high).double()
        counts[name] = counts[name] + part if name in counts else part

    _show(watch, see)
    return {name: Histogram(low=low, high=high, counts=counts[name]) for name, (low, high) in extremes.items()}


def _show(watch: Watch, see: Callable[[str, Tensor], None]) -> None:
    """Run all batches and show each value that is wanted, under its stable name."""
    names = {id(graph): value_names(graph.nodes, graph.inputs, watch.inputs) for graph in watch.traced.graphs}

    def value(graph: Graph, node: fx.Node, made: Tensor) -> None:
        name = names[id(graph)].get(node.name, "")
        if name in watch.wanted:
            see(name, made)

    walk(watch.traced, watch.values, Visitor(value=value))
