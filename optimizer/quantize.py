"""The quantize step: fold normalizations, then quantize layer after layer on what the compressed prefix feeds it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor

from . import activations, activations_dynamic, correct, fold, residual, tree
from .activations_range import Range, Rule
from .codes import Format
from .data import Calibration, rebatch, split
from .entry import foreign_module
from .errors import Error, InfeasibleError, RecipeError, nearest
from .graph import Graph, Site
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

UNTOUCHED = "dense"
MICRO_BATCH = 64
"""Samples per operator call while calibrating; all samples are alive at once whatever it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to quantize. Every field of the quantizer's own Spec may stand beside these.

    layers, skip, override: globs over layer names ("layer3.*", "*.fc"); override maps a glob to changed fields.
    feedback: what the quantizer's own `feedback` is where nobody says (compensate each column's error in later ones).
    fold_norm: fold batch normalization first. correct_bias: match each layer's mean output to the original's.
    reestimate: match the spread of folded normalizations too. Both corrections are kept only where the part
    `held_out` of the calibration data, which nothing else sees, has a smaller output error with them.
    activations: "int8" lets layers of 8-bit uniform weights compute in integers, on grids of their inputs and outputs
    whose ends `range` and `percentile` choose (`activations_range.Rule`); "dynamic" lets linear layers and
    convolutions round their inputs at run time, each run of 128, or each image, by its largest value.
    """

    quantizer: str = "lnq"
    layers: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    override: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    feedback: bool = True
    fold_norm: bool = True
    correct_bias: bool = True
    reestimate: bool = True
    held_out: float = 0.125
    activations: Literal["float", "int8", "dynamic"] = "float"
    range: Range = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        Rule(range=self.range, percentile=self.percentile)
        if not 0 < self.held_out < 1:
            raise RecipeError(f"held_out={self.held_out} is out of range", fix="use a part between 0 and 1")


class Quantizer(Protocol):
    """What a file in `quantizers/` offers."""

    Spec: type
    needs: frozenset[str]

    def quantize(self, w: Float[Tensor, "out in"], stats: LayerStats | None, spec: Any) -> Weight: ...


def quantizer_module(name: str) -> Quantizer:
    """Return `quantizers/<name>.py`, or somebody else's module where the name has a dot."""
    known = sorted(p.stem for p in (Path(__file__).parent / "quantizers").glob("*.py") if p.stem != "__init__")
    if "." not in name and name not in known:
        raise RecipeError(f'unknown quantizer "{name}"', fix=nearest(name, known))
    if "." in name:
        return cast(Quantizer, foreign_module(name, "quantizer"))
    return cast(Quantizer, importlib.import_module(f"{__package__}.quantizers.{name}"))


def spec_types(fields: Mapping[str, Any]) -> tuple[type, ...]:
    """Return the dataclasses whose fields a `quantize:` mapping may hold."""
    return Spec, quantizer_module(str(fields.get("quantizer", "lnq"))).Spec


def names(model: Model, spec: Spec, ground: Ground) -> Sequence[str]:
    """Return every weight, those of the graph first and in its order."""
    return weight_names(model, ground)


def plan(model: Model, spec: Spec, extras: tuple[Any, ...], ground: Ground) -> tuple[Decision, ...]:
    """Resolve globs and overrides to one decision per layer, in graph order; `extras` is the quantizer's Spec.

    Raises RecipeError for a glob that matches nothing, an unknown field, or a layer that is compressed already.
    """
    uses, (options,) = ground.graph.of_param(), extras
    check_globs((*spec.layers, *spec.skip, *spec.override), list(dict.fromkeys((*uses, *names(model, spec, ground)))))
    decisions = []
    for name in names(model, spec, ground):
        reason = _kept_because(name, spec, uses)
        if reason:
            decisions.append(Decision(layer=name, reason=reason))
            continue
        if not _is_float(model.weights[name]):
            raise RecipeError(
                f'layer "{short(name)}" is compressed already', fix="quantize each layer in one step only"
            )
        quantizer, layer_spec = _resolve(name, spec, options)
        decisions.append(Decision(layer=name, method=quantizer, spec=layer_spec))
    if spec.activations == "int8":
        activations.check(decisions)
    if spec.activations == "dynamic":
        return activations_dynamic.mark(decisions, uses)
    return tuple(decisions)


def apply(model: Model, spec: Spec, decisions: Sequence[Decision], calibration: Calibration, hooks: Hooks) -> Result:
    """Return the quantized model; a part of the calibration data is held out to judge corrections."""
    activations.check_none(model, spec.activations)
    if not any(decision.method for decision in decisions):
        return Result(model=model, layers=tuple(_kept(decisions)), notes=())
    exact = replace(model, dynamic=frozenset())
    fit, held = (rebatch(part, MICRO_BATCH) for part in split(calibration, spec.held_out, hooks.seed))
    folded = _fold(exact, decisions, trace(exact.module(), fit.batches[:1]).graph) if spec.fold_norm else exact
    module = folded.module()
    traced = trace(module, fit.batches)
    quantized = _quantize(folded, decisions, traced, hooks)
    kinds = tuple(_corrections(spec))
    if kinds:
        hooks.progress(1, 1, "corrections")
        data = correct.Data(fit=traced, held_out=trace(module, held.batches))
        corrected, notes = correct.choose(folded, quantized.model, data, kinds)
        quantized = replace(quantized, model=corrected, notes=(*quantized.notes, *notes))
    quantized = replace(quantized, model=replace(quantized.model, dynamic=model.dynamic))
    if any(decision.activations == "dynamic" for decision in decisions):
        rounding, notes = activations_dynamic.apply(quantized.model, decisions, traced.graph)
        return replace(quantized, model=rounding, notes=(*quantized.notes, *notes))
    if spec.activations != "int8":
        return quantized
    hooks.progress(1, 1, "ranges of activations")
    acting, notes = activations.apply(quantized.model, fit.batches, Rule(range=spec.range, percentile=spec.percentile))
    return replace(quantized, model=acting, notes=(*quantized.notes, *notes))


def describe(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain data for plan.yaml."""
    if not decision.method:
        return {"keep": decision.reason}
    fields = {key: value for key, value in _flat(decision.spec).items() if (key, value) != ("residual", None)}
    rounded = {"activations": "dynamic"} if decision.activations == "dynamic" else {}
    return {"quantizer": decision.method, **rounded, **fields}


def restore(layer: str, data: Mapping[str, Any]) -> Decision:
    """Return the decision that `describe` wrote."""
    if "keep" in data:
        return Decision(layer=layer, reason=str(data["keep"]))
    name = str(data.get("quantizer", ""))
    fields = {key: value for key, value in data.items() if key not in ("quantizer", "activations")}
    spec = _changed(quantizer_module(name).Spec(format=Format()), fields, layer)
    activations = data.get("activations", "float")
    if activations not in ("float", "dynamic"):
        raise RecipeError(f'activations="{activations}" is not supported', where=layer, fix="use float or dynamic")
    return Decision(layer=layer, method=name, spec=spec, activations=activations)


def shown(decision: Decision) -> str:
    """Return a decision in a few words."""
    extra = getattr(decision.spec.format, "residual", None)
    shown = f"{decision.method}, {decision.spec.format.bits} bits" + (f" + rank {extra.rank}" if extra else "")
    return shown + (", inputs int8" if decision.activations == "dynamic" else "")


def _quantize(model: Model, decisions: Sequence[Decision], traced: Traced, hooks: Hooks) -> Result:
    uses = traced.graph.of_param()
    pending = {d.layer: d for d in decisions if d.method}
    values = model.values()
    shared = collect_shared(traced, values, frozenset({"gram"}), pending)
    done: dict[str, Weight] = {}
    errors: dict[str, LayerResult] = {}
    notes: list[str] = []

    def before(site: Site, reader: Reader) -> Tensor | None:
        decision = pending.pop(site.param, None)
        if decision is None:
            return None
        hooks.progress(len(done), len(done) + len(pending) + 1, f"quantize {short(site.param)}")
        matrix = site.layout.to_matrix(values[site.param])
        stats = shared.get(site.param) or observe(reader, frozenset({"gram"}))
        old = model.weights[site.param]
        old = old if isinstance(old, LowRank) else Dense(values=matrix)
        weight = _solve(decision, old, stats, hooks.cache)
        done[site.param] = weight
        if reason := residual.lacking(weight, old, stats, decision.spec.format.residual):
            notes.append(f"{short(site.param)} has no residual: {reason}")
        error = output_error(matrix, weight.dense(), stats)
        errors[site.param] = LayerResult(layer=site.param, error_rel=error)
        return site.layout.to_param(weight.dense())

    walk(traced, values, Visitor(before=before))
    layouts = {param: sites[0].layout for param, sites in uses.items() if param in done}
    changed = replace(model.with_weights(done), layouts={**model.layouts, **layouts})
    kept = _kept(decision for decision in decisions if decision.layer not in done)
    return Result(model=changed, layers=(*errors.values(), *kept), notes=tuple(notes))


def _kept(decisions: Iterable[Decision]) -> Iterator[LayerResult]:
    """Yield what becomes of layers that nothing quantizes."""
    return (LayerResult(layer=decision.layer, error_rel=0.0, reason=decision.reason) for decision in decisions)


def _fold(model: Model, decisions: Sequence[Decision], graph: Graph) -> Model:
    wanted = {decision.layer for decision in decisions if decision.method}
    return fold.apply(model, tuple(f for f in fold.plan(model, graph) if f"{f.into}.weight" in wanted))


def _solve(decision: Decision, old: Dense | LowRank, stats: LayerStats, cache: Cache | None) -> Weight:
    """Quantize a matrix, with a residual if its decision says so, or both factors of a low rank."""
    known = cache.get(decision.layer) if cache else None
    if known is not None:
        return known
    module, spec = quantizer_module(decision.method), decision.spec

    def quantize(matrix: Tensor, seen: LayerStats) -> Weight:
        asked = spec.format.feedback and seen.gram is not None
        return module.quantize(matrix, seen, replace(spec, format=replace(spec.format, feedback=asked)))

    try:
        weight = residual.solve(old, stats, spec.format.residual, quantize)
    except Error as error:
        raise type(error)(error.what, where=f'layer "{short(decision.layer)}"', fix=error.fix) from error
    if not torch.isfinite(weight.dense()).all():
        raise InfeasibleError(f'layer "{short(decision.layer)}" has non-finite weights after {decision.method}')
    if cache:
        cache.put(decision.layer, weight)
    return weight


def _is_float(weight: Weight) -> bool:
    """Return whether a weight, or both factors of a low rank, are as they came."""
    parts = (weight.left, weight.right) if isinstance(weight, LowRank) else (weight,)
    return all(isinstance(part, Dense) for part in parts)


def _kept_because(name: str, spec: Spec, uses: Mapping[str, Sequence[Site]]) -> str:
    if name not in uses:
        return "no operator that paredown knows multiplies it"
    if any(matches(pattern, name) for pattern in spec.skip):
        return "skipped by the recipe"
    if not any(matches(pattern, name) for pattern in spec.layers):
        return "not among the recipe's layers"
    if len({site.layout for site in uses[name]}) > 1:
        return "used in two orientations"
    return ""


def _resolve(name: str, spec: Spec, options: Any) -> tuple[str, Any]:
    quantizer, chosen = spec.quantizer, options
    for pattern, changes in spec.override.items():
        if matches(pattern, name):
            changes = dict(changes)
            where = f'override "{pattern}"'
            if changes.get("quantizer", quantizer) != quantizer:
                quantizer = str(changes["quantizer"])
                chosen = quantizer_module(quantizer).Spec(format=chosen.format)
            changes.pop("quantizer", None)
            chosen = _changed(chosen, changes, where)
    return quantizer, chosen


def _changed(spec: Any, changes: Mapping[str, Any], where: str) -> Any:
    """Return a quantizer's Spec with fields changed, those of its format included."""
    node = tree.of_plain({**_flat(spec), **changes}, where)
    return tree.build_all((type(spec),), node, where)[0]


def _flat(spec: Any) -> dict[str, Any]:
    data = dataclasses.asdict(spec)
    return {**data.pop("format"), **data}


def _corrections(spec: Spec) -> Iterable[correct.Kind]:
    if spec.correct_bias:
        yield "bias"
    if spec.reestimate:
        yield "normalization"
