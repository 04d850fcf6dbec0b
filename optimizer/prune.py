"""The prune step: find what must go together, choose what costs least, let the rest make up for it, and cut.

The plan names the units that go. Applying it walks the network once: a layer that reads removed channels gets the
least-squares weights of those that stay, on inputs from the already pruned prefix, for the outputs of the network as it
was (OSSCAR, Meng et al. 2024, with the target of GPTAQ, Li et al. 2025: the original's activations).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import budget, channel_rules, correct, cut, entry, groups, obs, tree, widths
from .channels import Channels
from .data import Calibration, rebatch, split
from .errors import InfeasibleError, RecipeError
from .graph import Graph, Site
from .groups import Group, Unit
from .importance import Wanted, consumers, criterion_module, gather
from .model import Model
from .quantize import MICRO_BATCH
from .ranking import Ranking, rank
from .stats import LayerStats, collect_shared, observe
from .steps import Decision, Ground, Hooks, LayerResult, Result, check_globs, matches, output_error, short
from .walk import Reader, Traced, Visitor, trace, walk
from .weight import Dense

UNTOUCHED = "full width"
DEFAULT_RATIO = 0.3
KEEPS_ALL = "no narrower width that round_to and max_ratio allow is worth what it would save"
TRUST = 0.5
"""How far a layer aims at the original network's outputs instead of its own on the pruned prefix's inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to remove. One of ratio (of the channels), remove_macs and remove_parameters says how much, as a part.

    scope: global takes what costs least over the whole network, layer the same part of every group. layers, skip,
    override: globs over the layers that make the channels; override maps a glob to {ratio, round_to, max_ratio}, and a
    ratio there is that group's own. round_to: widths that are multiples of it. max_ratio: what a group loses at most.
    compensate: solve for the remaining weights. correct: match means and spreads afterwards, where the part `held_out`
    of the data, which nothing else sees, has a smaller output error. loss: "path.py:function" of (outputs, batch)
    for criteria that need gradients; without it targets are drawn from the network's own outputs.
    """

    criterion: str = "obs"
    ratio: float | None = None
    remove_macs: float | None = None
    remove_parameters: float | None = None
    scope: Literal["global", "layer"] = "global"
    layers: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    override: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    round_to: int = 1
    max_ratio: float = 0.9
    compensate: bool = True
    correct: bool = True
    loss: str = ""
    held_out: float = 0.125

    def __post_init__(self) -> None:
        given = [name for name in _PARTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} both say how much to remove", fix="keep one of them")
        for name in (*given, "max_ratio", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)} is out of range", fix="use a part between 0 and 1")
        if self.round_to < 1:
            raise RecipeError(f"round_to={self.round_to} is out of range", fix="use 1, 8 or 16")
        if self.loss:
            entry.parts(self.loss)
        criterion_module(self.criterion)
        for glob, changes in self.override.items():
            for key in changes.keys() - {"ratio", "round_to", "max_ratio"}:
                what = f'override "{glob}" has the key "{key}"'
                raise RecipeError(what, fix="a group's own keys are ratio, round_to and max_ratio")

    @property
    def how_much(self) -> tuple[budget.Resource, float]:
        """Return which resource is to be saved, and which part of it."""
        if self.remove_macs is not None:
            return "macs", self.remove_macs
        if self.remove_parameters is not None:
            return "parameters", self.remove_parameters
        return "channels", DEFAULT_RATIO if self.ratio is None else self.ratio


_PARTS = ("ratio", "remove_macs", "remove_parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How many units a group keeps of how many, and which go: their numbers, the cells one after another."""

    keep: int
    of: int
    remove: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.keep + len(self.remove) != self.of or len(set(self.remove)) != len(self.remove):
            raise RecipeError(
                f"keep: {self.keep} and {len(self.remove)} removed units are not {self.of}", fix="count again"
            )
        if any(not 0 <= number < self.of for number in self.remove):
            raise RecipeError(f"units are numbered 0 to {self.of - 1}", fix="mend remove")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Analysis:
    """What of a model can be pruned. `kept`: the other weights, and why."""

    model: Model
    graph: Graph
    channels: Channels
    fit: widths.Fit
    kept: Mapping[str, str]

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.fit.groups


def analyse(model: Model, spec: Spec, graph: Graph, calibration: Calibration) -> Analysis:
    """Follow the channels of a model and try which groups its code lets shrink."""
    model = _laid(model, graph)
    fixed = [name for name in graph.of_param() if not _wanted(spec, name)]
    found = channel_rules.follow(graph, fixed)
    all_groups = groups.find(found)
    fit = widths.fit(model, found, all_groups, rebatch(calibration, 2).batches[0])
    kept = groups.kept(found, fit.groups)
    for group in all_groups:
        if group.name in fit.refused:
            kept |= dict.fromkeys(group.producers, fit.refused[group.name])
    return Analysis(model=model, graph=graph, channels=found, fit=fit, kept=kept)


def names(model: Model, spec: Spec, ground: Ground) -> Sequence[str]:
    """Return the groups by name, then the weights that none of them makes narrower."""
    assert ground.calibration is not None
    found = analyse(model, spec, ground.graph, ground.calibration)
    return [*(group.name for group in found.groups), *found.kept]


def plan(model: Model, spec: Spec, extras: tuple[Any, ...], ground: Ground) -> tuple[Decision, ...]:
    """Choose the units of each group that go; measures on the calibration data where the criterion needs it.

    Raises RecipeError for a glob that matches nothing, InfeasibleError where there is not enough to remove.
    """
    assert ground.calibration is not None
    check_globs((*spec.layers, *spec.skip, *spec.override), list(ground.graph.of_param()))
    found = analyse(model, spec, ground.graph, ground.calibration)
    if not found.groups:
        why = "; ".join(dict.fromkeys(f"{short(name)}: {reason}" for name, reason in found.kept.items()))
        raise InfeasibleError(f"no channel of the network can be removed ({why})", fix="leave prune out")
    ranked = _ranked(found, spec, ground)
    removed = _allocated(found, spec, [_curve(spec, ranked[group.name]) for group in found.groups])
    decisions = [_decision(spec, ranked[group.name], removed[group.name]) for group in found.groups]
    return (*decisions, *(Decision(layer=name, reason=why) for name, why in found.kept.items()))


def apply(model: Model, spec: Spec, decisions: Sequence[Decision], calibration: Calibration, hooks: Hooks) -> Result:
    """Return the narrower model. Raises InfeasibleError where it does not compute what the masked one does."""
    fit, held = (rebatch(part, MICRO_BATCH) for part in split(calibration, spec.held_out, hooks.seed))
    traced = trace(model.module(), fit.batches)
    found = analyse(model, spec, traced.graph, calibration)
    by_name = {group.name: group for group in found.groups}
    _check_plan(by_name, decisions)
    chosen = {d.layer: [by_name[d.layer].units[n] for n in d.spec.remove] for d in decisions if d.method}
    units = [unit for name in chosen for unit in chosen[name]]
    if not units:
        return Result(model=model, layers=(), notes=("nothing was removed",))
    silent, results = _compensated(found.model, units, traced, spec, hooks)
    notes: tuple[str, ...] = ()
    if spec.correct:
        data = correct.Data(fit=traced, held_out=trace(model.module(), held.batches))
        silent, notes = correct.choose(found.model, silent, data, ("bias", "normalization"))
    attributes: dict[str, Any] = {}
    for name, own in chosen.items():
        attributes |= widths.values(found.model, found.channels, own, found.fit.attributes.get(name, ()))
    small = cut.cut(silent, units, attributes)
    off = widths.difference(cut.masked(silent, units), small, rebatch(calibration, 2).batches[0])
    if not off <= widths.TOLERANCE:
        raise InfeasibleError(f"the pruned network differs from the masked one by {off:.1e} of its range")
    return Result(model=small, layers=results, notes=(*notes, *_rewritten(attributes)))


def describe(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain data for plan.yaml."""
    if not decision.method:
        return {"keep": decision.reason}
    width = dataclasses.asdict(decision.spec)
    return {"criterion": decision.method, **width, "remove": list(width["remove"])}


def restore(layer: str, data: Mapping[str, Any]) -> Decision:
    """Return the decision that `describe` wrote."""
    if "criterion" not in data:
        return Decision(layer=layer, reason=str(data.get("keep", "")))
    plain = {key: value for key, value in data.items() if key != "criterion"}
    width = tree.build_all((Width,), tree.of_plain(plain, layer), layer)[0]
    return Decision(layer=layer, method=str(data["criterion"]), spec=width)


def shown(decision: Decision) -> str:
    """Return a decision in a few words."""
    return f"{decision.spec.keep} of {decision.spec.of} channels by {decision.method}"


def _check_plan(known: Mapping[str, Group], decisions: Sequence[Decision]) -> None:
    """Raise RecipeError for a decision, perhaps edited by hand, that the network's groups do not fit."""
    for decision in (decision for decision in decisions if decision.method):
        group = known.get(decision.layer)
        if group is None:
            raise RecipeError(f'"{decision.layer}" cannot be pruned', where="the plan", fix="leave its keep as planned")
        if len(group.units) != decision.spec.of:
            what = f'"{decision.layer}" has {len(group.units)} units, the plan says {decision.spec.of}'
            raise RecipeError(what, where="the plan", fix="plan again")
        lost = [sum(number in places for number in decision.spec.remove) for places in group.places]
        if len(set(lost)) > 1:
            what = f'"{decision.layer}" loses {lost} units of its {len(lost)} cells'
            raise RecipeError(what, where="the plan", fix="remove as many of each")


def _wanted(spec: Spec, name: str) -> bool:
    return any(matches(p, name) for p in spec.layers) and not any(matches(p, name) for p in spec.skip)


def _laid(model: Model, graph: Graph) -> Model:
    """Return the model with each weight laid out as the graph reads it: a parameter (in, out) turned."""
    layouts = {name: sites[0].layout for name, sites in graph.of_param().items() if name in model.layouts}
    turned = {name: layout for name, layout in layouts.items() if layout.kind != model.layouts[name].kind}
    weights = {
        name: Dense(values=layout.to_matrix(model.layouts[name].to_param(model.weights[name].dense())))
        for name, layout in turned.items()
        if isinstance(model.weights[name], Dense)
    }
    kept = {name: turned[name] for name in weights}
    return replace(model, weights={**model.weights, **weights}, layouts={**model.layouts, **kept})


def _ranked(found: Analysis, spec: Spec, ground: Ground) -> dict[str, Ranking]:
    """Measure what the criterion needs on the part of the data that is not held out, and rank every group's units."""
    assert ground.calibration is not None
    fit, _ = split(ground.calibration, spec.held_out, ground.seed)
    loss = entry.resolve(spec.loss, ground.base).function if spec.loss else None
    read = {consumer.param for group in found.groups for consumer in consumers(found.model, group)}
    needs = criterion_module(spec.criterion).needs
    stats = gather(found.model, fit, Wanted(needs=needs, params=read, seed=ground.seed, loss=loss))
    return rank(found.model, found.groups, stats, spec.criterion)


def _own(spec: Spec, group: Group) -> Spec:
    """Return the step's settings with the overrides of a group's layers."""
    for pattern, changes in spec.override.items():
        if any(matches(pattern, param) for param in group.producers):
            spec = replace(spec, override={}, **{**dict.fromkeys(_PARTS), **dict(changes)})
    return spec


def _curve(spec: Spec, ranking: Ranking) -> budget.Curve:
    own = _own(spec, ranking.group)
    return budget.curve(ranking.group, ranking.costs, own.round_to, own.max_ratio)


def _allocated(found: Analysis, spec: Spec, curves: Sequence[budget.Curve]) -> dict[str, int]:
    resource, part = spec.how_much
    fixed = {c.group.name: own for c in curves if (own := _own(spec, c.group)).ratio is not None and own is not spec}
    removed: dict[str, int] = {}
    for c in curves:
        if c.group.name in fixed:
            removed |= budget.evenly([c], fixed[c.group.name].ratio or 0.0)
    free = [c for c in curves if c.group.name not in fixed]
    if spec.scope == "layer" and resource == "channels":
        return removed | budget.evenly(free, part)
    footprint = budget.Footprint.of(found.model, found.graph, [c.group for c in curves], resource)
    choose = budget.evenly_to if spec.scope == "layer" else budget.cheapest
    return choose(free, footprint, part, removed)


def _decision(spec: Spec, ranking: Ranking, count: int) -> Decision:
    group = ranking.group
    gone = tuple(sorted(number for order in ranking.orders for number in order[:count]))
    if not gone:
        return Decision(layer=group.name, reason=KEEPS_ALL)
    width = Width(keep=len(group.units) - len(gone), of=len(group.units), remove=gone)
    return Decision(layer=group.name, method=spec.criterion, spec=width)


def _compensated(
    model: Model, units: Sequence[Unit], traced: Traced, spec: Spec, hooks: Hooks
) -> tuple[Model, tuple[LayerResult, ...]]:
    """Return the model at full width whose layers no longer read the units, and how far each is off."""
    lost = _lost_columns(model, units)
    values, done, results = model.values(), dict[str, Dense](), list[LayerResult]()
    known = collect_shared(traced, values, frozenset({"gram"}), lost)

    def before(site: Site, reader: Reader) -> Tensor | None:
        if site.param not in lost or site.param in done:
            return None
        hooks.progress(len(done), len(lost), f"prune {short(site.param)}")
        matrix, layout = model.weights[site.param].dense(), model.layouts[site.param]
        needs = frozenset({"gram", "cross"}) if spec.compensate else frozenset({"gram"})
        stats = known.get(site.param) or observe(reader, needs)
        changed = _without(matrix, lost[site.param], stats, spec)
        done[site.param] = Dense(values=changed)
        results.append(LayerResult(layer=site.param, error_rel=output_error(matrix, changed, stats)))
        return layout.to_param(changed)

    walk(traced, values, Visitor(before=before), reference=values if spec.compensate else None)
    return model.with_weights(done), tuple(results)


def _lost_columns(model: Model, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Return for each weight which columns of which rows the units are: a mask (out, in), True where they go."""
    found: dict[str, Tensor] = {}
    for unit in units:
        for part in unit.parts:
            if part.axis == "columns":
                rows, columns = model.layouts[part.param].matrix_shape
                mask = found.setdefault(part.param, torch.zeros(rows, columns, dtype=torch.bool))
                run = rows // model.layouts[part.param].groups
                mask[part.block * run : (part.block + 1) * run, part.index] = True
    return found


def _without(matrix: Tensor, lost: Tensor, stats: LayerStats, spec: Spec) -> Tensor:
    """Return a weight without the lost columns, the others solved for where there are statistics to do it with."""
    if stats.gram is None or not spec.compensate:
        return matrix * ~lost
    blocks = []
    for number, gram in enumerate(stats.gram):
        run = len(matrix) // len(stats.gram)
        rows = slice(number * run, (number + 1) * run)
        w, keep = matrix[rows].double(), (~lost[rows][0]).nonzero().flatten()
        cross = None if stats.cross is None else w @ (TRUST * stats.cross[number] + (1 - TRUST) * gram)
        full = torch.zeros_like(w)
        full[:, keep] = obs.resolve(w, gram, keep, cross)
        blocks.append(full)
    return torch.cat(blocks).to(matrix.dtype)


def _rewritten(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    if not attributes:
        return ()
    return ("widths rewritten in the network: " + ", ".join(f"{name} = {value}" for name, value in attributes.items()),)
