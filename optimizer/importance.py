"""Which units of a group matter: what a criterion sees, who reads a unit, and how criteria are found.

A criterion is a file of `criteria/` with `needs` and `score`. Scores are compared across groups, so each file says in
what unit they are; a channel that nobody hears (dead) scores lowest under every criterion.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Protocol, TypeVar, cast

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from .data import Calibration, rebatch
from .entry import foreign_module
from .errors import InfeasibleError, RecipeError, nearest
from .gradients import Gradients, Loss, gradients
from .groups import Group, Part, Unit
from .model import Model
from .stats import LayerStats, Stats, collect
from .walk import Traced, trace
from .weight import Layout

Found = TypeVar("Found")

STATISTICS = frozenset({"gram", "mean", "gates"})
"""What a criterion may need."""

MICRO_BATCH = 64
"""Samples per operator call while grams are summed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelStats:
    """What criteria see beside the model, each part only where a criterion needs it.

    layers: gram and mean of each weight's inputs. gates, outputs: as in `Gradients`. seed: for criteria that draw.
    """

    layers: Stats = field(default_factory=lambda: MappingProxyType({}))
    gates: Mapping[str, Float64[Tensor, "samples channels"]] = field(default_factory=lambda: MappingProxyType({}))
    outputs: Mapping[str, Float64[Tensor, "out"]] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0


class Criterion(Protocol):
    """What a file in `criteria/` offers."""

    needs: frozenset[str]

    def score(self, model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """What to gather, for which weights (default: all). traced: the network, where it is captured already."""

    needs: frozenset[str]
    params: Collection[str] | None = None
    seed: int = 0
    loss: Loss | None = None
    traced: Traced | None = None

    def __post_init__(self) -> None:
        for need in self.needs - STATISTICS:
            raise RecipeError(f'unknown statistic "{need}"', fix=nearest(need, STATISTICS))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Consumer:
    """Rows of a weight that read units of a group, and the columns that each unit is for them.

    block: which group's rows of a grouped convolution. channels: input channels of the operator, as gates count them.
    """

    param: str
    block: int | None
    weight: Float64[Tensor, "out in"]
    columns: Sequence[Int64[Tensor, "_"]]
    channels: Sequence[Int64[Tensor, "_"]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """A run of a consumer's rows that share their inputs: W, X^T X and the mean of X."""

    weight: Float64[Tensor, "out in"]
    gram: Float64[Tensor, "in in"]
    mean: Float64[Tensor, "in"] | None
    rows: int
    columns: Sequence[Int64[Tensor, "_"]]


def criterion_module(name: str) -> Criterion:
    """Return `criteria/<name>.py`, or somebody else's module where the name has a dot."""
    known = sorted(p.stem for p in (Path(__file__).parent / "criteria").glob("*.py") if p.stem != "__init__")
    if "." not in name and name not in known:
        raise RecipeError(f'unknown criterion "{name}"', fix=nearest(name, known))
    module = foreign_module(name, "criterion") if "." in name else _shipped(name)
    if not isinstance(getattr(module, "needs", None), frozenset) or not callable(getattr(module, "score", None)):
        fix = "define needs = frozenset() and score(model, group, stats)"
        raise RecipeError(f'criterion "{name}" is no criterion', fix=fix)
    return cast(Criterion, module)


def _shipped(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.criteria.{name}")


def gather(model: Model, calibration: Calibration, wanted: Wanted) -> ChannelStats:
    """Return what is needed and nothing else; a criterion that needs nothing costs nothing."""
    grams = wanted.needs & {"gram", "mean"}
    layers: Stats = {}
    if grams:
        traced = wanted.traced or trace(model.module(), rebatch(calibration, MICRO_BATCH).batches)
        layers = collect(traced, model.values(), frozenset(grams), wanted.params)
    found = Gradients(gates={}, outputs={})
    if "gates" in wanted.needs:
        params = model.weights if wanted.params is None else wanted.params
        found = gradients(model, calibration, params, wanted.seed, wanted.loss)
    return ChannelStats(layers=layers, gates=found.gates, outputs=found.outputs, seed=wanted.seed)


def consumers(model: Model, group: Group) -> tuple[Consumer, ...]:
    """Return who reads the group's units: each weight, and each block of a grouped convolution, with their columns.

    An embedding's columns are not read but written; rows that go with their unit (a depthwise filter) do not count.
    """
    found: dict[tuple[str, int], dict[int, list[Tensor]]] = {}
    for number, unit in enumerate(group.units):
        for part in unit.parts:
            if part.axis == "columns" and not part.table and not _internal(model.layouts[part.param], unit, part):
                found.setdefault((part.param, part.block), {}).setdefault(number, []).append(part.index)
    return tuple(_consumer(model, *place, parts, len(group.units)) for place, parts in found.items())


def readers(model: Model, group: Group) -> tuple[Consumer, ...]:
    """Return the consumers; an InfeasibleError where nobody reads the group's units through a weight."""
    found = consumers(model, group)
    if not found:
        raise InfeasibleError(
            "its channels are read by no weight",
            where=f'group "{group.name}"',
            fix="use criterion magnitude, or skip its layers",
        )
    return found


def readings(found: Iterable[Consumer], stats: ChannelStats) -> Iterator[Reading]:
    """Yield the runs of rows that read a group's units, each with the statistics of its inputs."""
    for consumer in found:
        yield from _runs(consumer, _required(stats.layers, consumer.param, "statistics of its inputs"))


def gate_products(found: Iterable[Consumer], stats: ChannelStats) -> Float64[Tensor, "samples units"]:
    """Return dL/dg of a gate on each unit, for each sample: the sum over all channels that consumers read of it."""
    parts = []
    for consumer in found:
        gates = _required(stats.gates, consumer.param, "gradients")
        parts.append(torch.stack([gates[:, channels].sum(1) for channels in consumer.channels], dim=1))
    return torch.stack(parts).sum(0)


def dead(found: Sequence[Consumer], stats: ChannelStats | None = None) -> Bool[Tensor, "..."]:
    """Return which units nobody hears: all their outgoing columns are zero or, where grams say so, their inputs.

    Where nothing reads them as columns (one False for all) they are not dead.
    """
    silent = []
    for consumer in found:
        heard = consumer.weight.abs().sum(0)
        if stats is not None:
            runs = readings([consumer], stats)
            heard = torch.stack([run.weight.abs().sum(0) * run.gram.diagonal() for run in runs]).sum(0)
        silent.append(torch.tensor([not bool(heard[columns].any()) for columns in consumer.columns]))
    return torch.stack(silent).all(0) if silent else torch.tensor(False)


def bury(scores: Float64[Tensor, "units"], silent: Bool[Tensor, "..."]) -> Float64[Tensor, "units"]:
    """Return the scores with those of dead units at the lowest of all, 0 if none is below it."""
    lowest = torch.clamp(scores.min(), max=0.0) if len(scores) else torch.tensor(0.0)
    return torch.where(silent, lowest.to(scores.dtype), scores)


def over_mean(scores: Float64[Tensor, "units"]) -> Float64[Tensor, "units"]:
    """Return scores as multiples of their mean, zeros where all are zero."""
    mean = scores.mean()
    return scores / mean if len(scores) and float(mean) > 0 else scores


def energies(model: Model, group: Group) -> Float64[Tensor, "units"]:
    """Return the sum of squares of all that goes with each unit: rows, columns and gains (named "weight")."""
    known: dict[tuple[str, str, int], Tensor] = {}
    return torch.stack([_energy(model, unit, known) for unit in group.units])


def _energy(model: Model, unit: Unit, known: dict[tuple[str, str, int], Tensor]) -> Float64[Tensor, ""]:
    total = torch.zeros((), dtype=torch.float64)
    for part in unit.parts:
        place = (part.param, part.axis, part.block)
        if place not in known:
            known[place] = _squares(model, part)
        total = total + known[place][part.index].sum()
    return total


def _squares(model: Model, part: Part) -> Float64[Tensor, "n"]:
    """Return the sums of squares of rows, of a block's columns, or of single elements: 0 for those that are no gain."""
    if part.axis == "elements":
        held = {**dict(model.skeleton.named_buffers()), **model.tensors}[part.param].double().flatten()
        return held.square() if part.param.rpartition(".")[2] == "weight" else torch.zeros_like(held)
    layout = model.layouts[part.param]
    squares = model.weights[part.param].dense().double().square()
    if part.axis == "rows":
        return squares.sum(1)
    return squares.reshape(layout.groups, -1, squares.shape[1])[part.block].sum(0)


def _internal(layout: Layout, unit: Unit, part: Part) -> bool:
    """Return whether the rows that read this part, a block of a grouped convolution, are all the unit's own."""
    if layout.groups == 1:
        return False
    size = layout.matrix_shape[0] // layout.groups
    own = [other.index for other in unit.parts if (other.param, other.axis) == (part.param, "rows")]
    rows = set(torch.cat(own).tolist()) if own else set()
    return rows.issuperset(range(part.block * size, (part.block + 1) * size))


def _consumer(model: Model, param: str, block: int, parts: Mapping[int, list[Tensor]], count: int) -> Consumer:
    layout = model.layouts[param]
    matrix = model.weights[param].dense().double()
    taps = math.prod(layout.shape[2:]) if layout.kind in ("conv", "conv_transpose") else 1
    size, first = len(matrix) // layout.groups, block * (matrix.shape[1] // taps)
    empty = torch.zeros(0, dtype=torch.int64)
    columns = [torch.cat(parts[number]) if number in parts else empty for number in range(count)]
    return Consumer(
        param=param,
        block=block if layout.groups > 1 else None,
        weight=matrix[block * size : (block + 1) * size],
        columns=columns,
        channels=[torch.unique(index // taps) + first for index in columns],
    )


def _runs(consumer: Consumer, seen: LayerStats) -> Iterator[Reading]:
    if seen.gram is None:
        raise InfeasibleError(f'"{consumer.param}" has no gram of its inputs', fix="skip its layers")
    runs = slice(None) if consumer.block is None else slice(consumer.block, consumer.block + 1)
    grams, means = seen.gram[runs], None if seen.mean is None else seen.mean[runs]
    for number, (weight, gram) in enumerate(zip(consumer.weight.chunk(len(grams)), grams, strict=True)):
        mean = None if means is None else means[number]
        yield Reading(weight=weight, gram=gram, mean=mean, rows=seen.rows, columns=consumer.columns)


def _required(known: Mapping[str, Found], param: str, what: str) -> Found:
    if param not in known:
        raise InfeasibleError(f'"{param}" has no {what}', fix="gather them for all weights that read the group")
    return known[param]
