"""How many units each group loses: the same part everywhere, or what costs least for what it saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float64
from torch import Tensor

from . import cost
from .errors import InfeasibleError
from .graph import Graph
from .groups import Group
from .model import Model

Resource: TypeAlias = Literal["macs", "parameters", "channels"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """What a group may lose: `removed[i]` units of each cell at a total cost of `costs[i]`; the first is nothing."""

    group: Group
    removed: tuple[int, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Footprint:
    """What a network takes of a resource as a function of what each group has lost.

    weights: parameter -> its share at full width. rows, columns: parameter -> group -> the part of its rows (columns)
    that one unit of each cell is.
    """

    weights: Mapping[str, float]
    rows: Mapping[str, Mapping[str, float]]
    columns: Mapping[str, Mapping[str, float]]

    @staticmethod
    def of(model: Model, graph: Graph, groups: Iterable[Group], resource: Resource) -> Footprint:
        groups = tuple(groups)
        if resource == "channels":
            return _by_channels(groups)
        uses = graph.of_param()
        if resource == "macs":
            weights = {param: float(cost.layer_macs(graph, sites)) for param, sites in uses.items()}
        else:
            weights = {param: float(math.prod(model.layouts[param].shape)) for param in uses if param in model.layouts}
        rows: dict[str, dict[str, float]] = {}
        columns: dict[str, dict[str, float]] = {}
        for group in groups:
            for cell in group.cells:
                for part in cell[0].parts:
                    if part.axis == "elements" or part.param not in model.layouts:
                        continue
                    layout = model.layouts[part.param]
                    high, wide = layout.matrix_shape
                    table, size = (rows, high) if part.axis == "rows" else (columns, wide * layout.groups)
                    own = table.setdefault(part.param, {})
                    own[group.name] = own.get(group.name, 0.0) + len(part.index) / size
        return Footprint(weights=weights, rows=rows, columns=columns)

    def total(self, removed: Mapping[str, int]) -> float:
        return sum(self.share(param, removed) for param in self.weights)

    def share(self, param: str, removed: Mapping[str, int]) -> float:
        kept = [
            1.0 - sum(part * removed.get(name, 0) for name, part in table.get(param, {}).items())
            for table in (self.rows, self.columns)
        ]
        return self.weights[param] * kept[0] * kept[1]

    def touched(self, name: str) -> tuple[str, ...]:
        """Return the parameters that a group occupies."""
        return tuple(p for p in self.weights if name in self.rows.get(p, {}) or name in self.columns.get(p, {}))


def _by_channels(groups: Sequence[Group]) -> Footprint:
    """Return the number of channels: one row per unit."""
    weights = {group.name: float(len(group.units)) for group in groups}
    rows = {group.name: {group.name: len(group.cells) / len(group.units)} for group in groups}
    return Footprint(weights=weights, rows=rows, columns={})


def curve(group: Group, costs: Float64[Tensor, "steps"], round_to: int, most: float) -> Curve:
    """Return what a group may lose: widths that are multiples of `round_to`, and no more than the part `most` of it.

    costs: total cost of removing 1, 2, ... units of each cell. The full width is allowed whatever it is.
    """
    least = max(1, math.ceil(group.width * (1 - most)))
    counts = [n for n in range(1, min(len(costs), group.width - least) + 1) if (group.width - n) % round_to == 0]
    return Curve(group=group, removed=(0, *counts), costs=(0.0, *(float(costs[n - 1]) for n in counts)))


def evenly(curves: Sequence[Curve], part: float) -> dict[str, int]:
    """Return the same part of every group, to the nearest allowed width."""
    wanted = {c.group.name: part * c.group.width for c in curves}
    return {c.group.name: min(c.removed, key=lambda n: (abs(n - wanted[c.group.name]), n)) for c in curves}


def cheapest(curves: Sequence[Curve], footprint: Footprint, part: float, fixed: Mapping[str, int]) -> dict[str, int]:
    """Return what removes `part` of a resource at little cost: greedily, the step that costs least for what it saves.

    fixed: what other groups lose whatever is chosen here. Each group's next step is the one along its lower convex
    hull. Raises InfeasibleError where all may go and it is not enough.
    """
    removed = {**fixed, **{c.group.name: 0 for c in curves}}
    start, now = footprint.total({}), footprint.total(removed)
    while now > start * (1 - part):
        steps = [(step, c) for c in curves if (step := _step(c, footprint, removed)) is not None]
        if not steps:
            what = f"{(1 - now / start):.1%} can be removed at most, {part:.1%} is asked for"
            raise InfeasibleError(what, fix="ask for less, skip fewer layers, lower round_to or raise max_ratio")
        (_, count), best = min(steps, key=lambda item: (item[0][0], item[1].group.name))
        removed[best.group.name] = count
        now = footprint.total(removed)
    return _trimmed(curves, footprint, removed, start * (1 - part))


def evenly_to(curves: Sequence[Curve], footprint: Footprint, part: float, fixed: Mapping[str, int]) -> dict[str, int]:
    """Return the smallest even part of every group that removes `part` of a resource."""
    start = footprint.total({})
    for step in range(1001):
        removed = {**fixed, **evenly(curves, step / 1000)}
        if footprint.total(removed) <= start * (1 - part):
            return removed
    raise InfeasibleError(
        f"{part:.1%} cannot be removed evenly", fix="ask for less, skip fewer layers or lower round_to"
    )


def _step(c: Curve, footprint: Footprint, removed: Mapping[str, int]) -> tuple[float, int] | None:
    """Return (cost per saving, units removed) of a group's best next step."""
    place, name = c.removed.index(removed[c.group.name]), c.group.name
    params = footprint.touched(name)
    before = sum(footprint.share(param, removed) for param in params)
    found = []
    for count, price in zip(c.removed[place + 1 :], c.costs[place + 1 :], strict=True):
        saved = before - sum(footprint.share(param, {**removed, name: count}) for param in params)
        if saved > 0:
            found.append(((price - c.costs[place]) / saved, count))
    return min(found, default=None)


def _trimmed(curves: Sequence[Curve], footprint: Footprint, removed: dict[str, int], limit: float) -> dict[str, int]:
    """Give back steps, the dearest first, as far as the limit still holds."""
    for c in sorted(curves, key=lambda c: -c.costs[c.removed.index(removed[c.group.name])]):
        while (place := c.removed.index(removed[c.group.name])) > 0:
            tried = {**removed, c.group.name: c.removed[place - 1]}
            if footprint.total(tried) > limit:
                break
            removed = tried
    return removed
