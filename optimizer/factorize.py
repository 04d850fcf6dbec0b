"""The factorize step: linear layers and convolutions become two thinner ones, by whitened SVD, where that saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import correct, cost, fold, tree
from .data import Calibration, rebatch, split
from .errors import RecipeError
from .graph import Graph, Site
from .lowrank import Spectrum, break_even, rank_of_ratio, spectrum
from .model import Model
from .stats import LayerStats, collect_shared, observe
from .steps import (
    Cache,
    Decision,
    Ground,
    Hooks,
    LayerResult,
    Result,
    check_globs,
    matches,
    output_error,
    short,
    weight_names,
)
from .walk import Reader, Traced, Visitor, trace, walk
from .weight import Dense, LowRank, Weight

MICRO_BATCH = 64
"""Samples per operator call while calibrating; all samples are alive at once whatever it is."""
METHOD = "whitened_svd"
UNTOUCHED = "dense"
NEEDS = frozenset({"gram"})
_WAYS = ("energy", "ratio", "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How far to factorize one layer; exactly one of the three.

    energy: part of the energy of its outputs to keep. ratio: part of its weights to remove. rank: that rank.
    """

    energy: float | None = None
    ratio: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in _WAYS if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given together" if given else "neither energy, ratio nor rank is given"
            raise RecipeError(what, fix="write one of energy, ratio and rank")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"energy={self.energy} is out of range", fix="use a part such as 0.98")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise RecipeError(f"ratio={self.ratio} is out of range", fix="use the part to remove, such as 0.3")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank={self.rank} is out of range", fix="use 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to factorize, and one of `energy`, `ratio` and `rank` (see Target); energy 0.98 where none is given.

    layers, skip, override: globs over layer names ("layer3.*", "*.fc"); override maps a glob to changed fields, and one
    of the three in it takes the place of the step's. fold_norm: fold batch normalization first, so that an error counts
    as it shows behind it. correct_bias, reestimate, held_out: as in the quantize step (`correct`).
    """

    layers: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    override: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    energy: float | None = None
    ratio: float | None = None
    rank: int | None = None
    fold_norm: bool = True
    correct_bias: bool = True
    reestimate: bool = True
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise RecipeError(f"held_out={self.held_out} is out of range", fix="use a part between 0 and 1")
        for name in _WAYS:
            if getattr(self, name) is not None:
                Target(**{name: getattr(self, name)})


def names(model: Model, spec: Spec, ground: Ground) -> Sequence[str]:
    """Return every weight, those of the graph first and in its order."""
    return weight_names(model, ground)


def plan(model: Model, spec: Spec, extras: tuple[Any, ...], ground: Ground) -> tuple[Decision, ...]:
    """Resolve globs and overrides to one decision per layer; what a rank saves is known here, what an energy is not.

    Raises RecipeError for a glob that matches nothing, two ways to choose a rank, or a layer that is compressed.
    """
    uses = ground.graph.of_param()
    check_globs((*spec.layers, *spec.skip, *spec.override), list(dict.fromkeys((*uses, *names(model, spec, ground)))))
    decisions = []
    for name in names(model, spec, ground):
        target = _resolve(name, spec)
        reason = _kept_because(name, spec, uses.get(name, ()))
        if not reason and not isinstance(model.weights[name], Dense):
            raise RecipeError(f'layer "{short(name)}" is compressed already', fix="factorize before other steps")
        if not reason:
            reason = _wasteful(ground.graph, name, _known_rank(target, model.weights[name].shape))
        chosen = Decision(layer=name, method=METHOD, spec=target)
        decisions.append(Decision(layer=name, reason=reason) if reason else chosen)
    return tuple(decisions)


def apply(model: Model, spec: Spec, decisions: Sequence[Decision], calibration: Calibration, hooks: Hooks) -> Result:
    """Return the model with low ranks, each fitted to the inputs that the layers before it, made so, give it."""
    fit, held = (rebatch(part, MICRO_BATCH) for part in split(calibration, spec.held_out, hooks.seed))
    wanted = {decision.layer for decision in decisions if decision.method}
    if spec.fold_norm:
        graph = trace(model.module(), fit.batches[:1]).graph
        model = fold.apply(model, tuple(f for f in fold.plan(model, graph) if f"{f.into}.weight" in wanted))
    module = model.module()
    traced = trace(module, fit.batches)
    result = _factorize(model, decisions, traced, hooks)
    kinds = tuple(_corrections(spec))
    if not kinds or all(layer.reason for layer in result.layers):
        return result
    hooks.progress(1, 1, "corrections")
    data = correct.Data(fit=traced, held_out=trace(module, held.batches))
    corrected, notes = correct.choose(model, result.model, data, kinds)
    return replace(result, model=corrected, notes=(*result.notes, *notes))


def describe(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain data for plan.yaml."""
    if not decision.method:
        return {"keep": decision.reason}
    return {name: value for name, value in dataclasses.asdict(decision.spec).items() if value is not None}


def restore(layer: str, data: Mapping[str, Any]) -> Decision:
    """Return the decision that `describe` wrote."""
    if "keep" in data:
        return Decision(layer=layer, reason=str(data["keep"]))
    return Decision(layer=layer, method=METHOD, spec=tree.build(Target, tree.of_plain(dict(data), layer), layer))


def shown(decision: Decision) -> str:
    """Return a decision in a few words."""
    ((name, value),) = describe(decision).items()
    words = {"energy": f"keeping {value:g} of the energy", "ratio": f"removing {value:g} of the weights"}
    return f"low rank, {words.get(name, f'rank {value}')}"


def _factorize(model: Model, decisions: Sequence[Decision], traced: Traced, hooks: Hooks) -> Result:
    uses, values = traced.graph.of_param(), model.values()
    pending = {d.layer: d for d in decisions if d.method}
    shared = collect_shared(traced, values, NEEDS, pending)
    done: dict[str, Weight] = {}
    results: dict[str, LayerResult] = {}

    def before(site: Site, reader: Reader) -> Tensor | None:
        decision = pending.pop(site.param, None)
        if decision is None:
            return None
        hooks.progress(len(results), len(results) + len(pending) + 1, f"factorize {short(site.param)}")
        matrix = site.layout.to_matrix(values[site.param])
        stats = shared.get(site.param) or observe(reader, NEEDS)
        weight, reason = _solve(decision, matrix, stats, (traced.graph, hooks.cache))
        error = output_error(matrix, weight.dense(), stats)
        results[site.param] = LayerResult(layer=site.param, error_rel=error, reason=reason)
        if reason:
            return None
        done[site.param] = weight
        return site.layout.to_param(weight.dense())

    walk(traced, values, Visitor(before=before))
    layouts = {param: uses[param][0].layout for param in done}
    kept = [LayerResult(layer=d.layer, error_rel=0.0, reason=d.reason) for d in decisions if d.layer not in results]
    changed = replace(model.with_weights(done), layouts={**model.layouts, **layouts})
    return Result(model=changed, layers=(*results.values(), *kept), notes=_notes(results.values()))


def _solve(
    decision: Decision, matrix: Float[Tensor, "out in"], stats: LayerStats, run: tuple[Graph, Cache | None]
) -> tuple[Weight, str]:
    """Return the low rank of a layer, or the layer as it is and why; `run`: the graph, and where layers are kept."""
    graph, cache = run
    known = cache.get(decision.layer) if cache is not None else None
    if known is not None:
        return known, ""
    if not torch.isfinite(matrix).all():
        return Dense(values=matrix), "it has weights that are not finite"
    assert stats.gram is not None
    found = spectrum(matrix, stats.gram.sum(0))
    if not found.total > 0:
        return Dense(values=matrix), "its outputs are zero on the calibration data"
    rank = _rank(decision.spec, found)
    reason = _wasteful(graph, decision.layer, rank)
    if reason:
        return Dense(values=matrix), reason
    left, right = (Dense(values=factor.to(matrix.dtype).contiguous()) for factor in found.factors(rank))
    weight = LowRank(left=left, right=right)
    if cache is not None:
        cache.put(decision.layer, weight)
    return weight, ""


def _kept_because(name: str, spec: Spec, sites: Sequence[Site]) -> str:
    if not sites:
        return "no operator that paredown knows multiplies it"
    if any(matches(pattern, name) for pattern in spec.skip):
        return "skipped by the recipe"
    if not any(matches(pattern, name) for pattern in spec.layers):
        return "not among the recipe's layers"
    if len({site.layout for site in sites}) > 1:
        return "used in two orientations"
    reasons = (_undivided(site) for site in sites)
    return next((reason for reason in reasons if reason), "")


def _undivided(site: Site) -> str:
    """Return why this use of a weight cannot be two operators, "" if it can."""
    if site.kind == "embedding":
        return "an embedding looks rows up and multiplies nothing"
    if site.kind == "recurrent":
        return "a recurrent operator takes its matrix whole"
    if site.layout.groups > 1:
        return "a grouped convolution has thin matrices already"
    return "" if cost.divides(site) else "an operator uses only some of its rows"


def _resolve(name: str, spec: Spec) -> Target:
    """Return what is asked of a layer; the last matching override that names a way to choose a rank decides."""
    ways = {way: getattr(spec, way) for way in _WAYS if getattr(spec, way) is not None} or {"energy": 0.98}
    for pattern, changes in spec.override.items():
        stray = next((key for key in changes if key not in _WAYS), None)
        if stray:
            raise RecipeError(f'{stray} cannot differ by layer (override "{pattern}")', fix="write it in the step")
        own = {way: changes[way] for way in _WAYS if changes.get(way) is not None}
        if own and matches(pattern, name):
            ways = own
    return Target(**ways)


def _known_rank(target: Target, shape: tuple[int, int]) -> int | None:
    """Return the rank that a target asks for whatever the data are: 0 if there is none, None if data decide."""
    if target.ratio is not None:
        return rank_of_ratio(*shape, target.ratio)
    return target.rank


def _rank(target: Target, found: Spectrum) -> int:
    rows, columns = found.weight.shape
    known = _known_rank(target, (rows, columns))
    return found.rank_of_energy(target.energy or 1.0) if known is None else known


def _wasteful(graph: Graph, name: str, rank: int | None) -> str:
    """Return why a rank is not worth while for a layer, "" if it is or is not known yet."""
    if rank is None:
        return ""
    sites = graph.of_param()[name]
    rows, columns = sites[0].layout.matrix_shape
    if rank < 1:
        return f"no rank of {rows} x {columns} removes so much"
    if rank > break_even(rows, columns):
        return f"rank {rank} of {rows} x {columns} saves no weights"
    dense, low = (cost.layer_macs(graph, sites, r) for r in (None, rank))
    return "" if low < dense else f"rank {rank} of {rows} x {columns} saves no multiplications"


def _corrections(spec: Spec) -> Iterable[correct.Kind]:
    if spec.correct_bias:
        yield "bias"
    if spec.reestimate:
        yield "normalization"


def _notes(results: Iterable[LayerResult]) -> tuple[str, ...]:
    """Return a sentence for each layer that turned out not to be worth it."""
    return tuple(f"{short(result.layer)} stays dense: {result.reason}" for result in results if result.reason)
