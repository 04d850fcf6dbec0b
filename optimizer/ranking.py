"""In which order the units of a group would go, and what that costs: a criterion's scores, or its exact removals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from .entry import user_code
from .errors import InputError
from .groups import Group
from .importance import ChannelStats, criterion_module
from .model import Model
from .obs import Elimination


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """The units of each cell, the first to go first, and the total cost of the first 1, 2, ... of every cell."""

    group: Group
    orders: tuple[tuple[int, ...], ...]
    costs: Float64[Tensor, "steps"]


def rank(model: Model, groups: Iterable[Group], stats: ChannelStats, criterion: str) -> dict[str, Ranking]:
    """Return a ranking of each group by its name.

    A criterion whose scores do not add up offers `removal(model, group, places, stats)`, which takes units out one
    after another; else the cost is the sum of scores, counted from the lowest of all where that is negative.
    """
    module, groups = criterion_module(criterion), tuple(groups)
    if removal := getattr(module, "removal", None):
        return {g.name: _joined(g, [removal(model, g, places, stats) for places in g.places]) for g in groups}
    scores = {group.name: _checked(model, group, stats, criterion) for group in groups}
    low = min([0.0, *(float(own.min()) for own in scores.values())])
    return {group.name: _sorted(group, scores[group.name] - low) for group in groups}


def _checked(model: Model, group: Group, stats: ChannelStats, criterion: str) -> Float64[Tensor, "units"]:
    """Return a criterion's scores; an InputError where they are not one finite number per unit."""
    with user_code(f'criterion "{criterion}"'):
        scores = torch.as_tensor(criterion_module(criterion).score(model, group, stats)).double()
    if tuple(scores.shape) != (len(group.units),) or not bool(torch.isfinite(scores).all()):
        what = f"it gave scores {tuple(scores.shape)} for {len(group.units)} units, or some that are not finite"
        raise InputError(what, where=f'criterion "{criterion}", group "{group.name}"', fix="score every unit")
    return scores


def _sorted(group: Group, scores: Float64[Tensor, "units"]) -> Ranking:
    orders, costs = [], torch.zeros(group.width - 1, dtype=torch.float64)
    for places in group.places:
        own = scores[places.start : places.stop]
        order = own.argsort(stable=True)[: group.width - 1]
        orders.append(tuple(places.start + int(n) for n in order))
        costs = costs + own[order].cumsum(0)
    return Ranking(group=group, orders=tuple(orders), costs=costs)


def _joined(group: Group, found: Sequence[Elimination]) -> Ranking:
    steps = group.width - 1
    pairs = zip(group.places, found, strict=True)
    orders = tuple(tuple(places.start + int(n) for n in cell.order[:steps]) for places, cell in pairs)
    costs = torch.stack([cell.costs[:steps].cumsum(0) for cell in found]).sum(0)
    return Ranking(group=group, orders=orders, costs=costs)
