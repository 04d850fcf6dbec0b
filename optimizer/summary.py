"""The rows of a report: what a model weighs, what became of each layer, what a step took."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

from . import activations, cost, packed
from .errors import AccuracyError
from .graph import Graph
from .metric import Metric, drop
from .model import Model
from .packed import Computed
from .recipe import Recipe, Step, step_module
from .steps import Decision, LayerResult
from .weight import Codebook, Dense, LowRank, Sum, Uniform, Weight, format_name

NO_KERNELS = {
    "fallback": "portable bodies",
    "reason": "the kernels for packed weights are not built here (optimize doctor says how to mend it), so that every "
    "layer is decoded to floats",
}


def bits_per_weight(model: Model) -> float | None:
    """Return 8 x bytes of all compressed weights with tables and scales, over the number of weights they stand for."""
    compressed = [weight for weight in model.weights.values() if not isinstance(weight, Dense)]
    count = sum(weight.shape[0] * weight.shape[1] for weight in compressed)
    return sum(weight.bits() for weight in compressed) / count if count else None


def sizes(model: Model, graph: Graph, metric: Metric | None, seed: int) -> dict[str, Any]:
    return {
        "metric": metric.report() if metric else None,
        "metric_ci95": metric.interval(seed) if metric else None,
        "size_bytes": model.size_bytes(),
        "parameters": model.parameters(),
        "macs": cost.macs(graph, model.weights),
    }


def merged(before: Sequence[LayerResult], now: Sequence[LayerResult]) -> list[LayerResult]:
    """Return one result per layer over all steps: that of the step which compressed it, if one did."""
    found = {result.layer: result for result in before}
    for result in now:
        if not result.reason or result.layer not in found:
            found[result.layer] = result
    return list(found.values())


def layer_rows(model: Model, results: Sequence[LayerResult]) -> list[dict[str, Any]]:
    rows, integers = [], activations.layers(model)
    for result in results:
        weight = model.weights[result.layer]
        rows.append(
            {
                "name": result.layer,
                "shape": list(model.layouts[result.layer].shape),
                "channels_kept": weight.shape[0],
                "rank": _rank(weight),
                "format": format_name(weight),
                "bits": _bits(weight),
                "size_bytes": weight.bits() // 8,
                "error_rel": result.error_rel,
                "mode": "int8" if result.layer in integers else _planned_mode(model, result.layer),
            }
        )
    return rows


def tell_modes(parts: dict[str, Any], model: Model, modes: Mapping[str, Computed], kernels: str) -> None:
    """Write into a report how layers compute in the exported file, why some are decoded, and the kernels there are."""
    parts["environment"]["kernels"] = kernels or None
    parts["layers"] = [row | {"mode": modes[row["name"]].mode} for row in parts["layers"]]
    reasons = {name: _why_floats(model, name, found) for name, found in modes.items() if "decoded" in found.mode}
    rows = [_with_reason(row, reasons) for row in parts["decisions"]]
    told = {row["layer"] for row in rows}
    rows += [{"layer": name, "fallback": "floats", "reason": why} for name, why in reasons.items() if name not in told]
    packs = any(found.mode.startswith(("exact", "int8 dynamic")) for found in modes.values())
    parts["decisions"] = [*rows, {"layer": "*", **NO_KERNELS}] if packs and not kernels else rows


def _why_floats(model: Model, name: str, found: Computed) -> str:
    also = "" if found.mode == "decoded" else "also "
    because = packed.decoded_because(model.weights[name], model.layouts[name], found.decoded_for)
    return f"{also}decoded to floats at load: {because}"


def _with_reason(row: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, Any]:
    if row["layer"] not in reasons or "kept" not in row:
        return dict(row)
    return {**row, "reason": f"{row['reason']}; {reasons[row['layer']]}"}


def _planned_mode(model: Model, name: str) -> str | None:
    """Return how a layer computes before any file says it; None: that depends on the file."""
    if name in model.dynamic:
        return "int8 dynamic"
    return "dense" if _is_float(model.weights[name]) else None


def _rank(weight: Weight) -> int | None:
    """Return the rank of a low rank, or of the one in a sum."""
    match weight:
        case LowRank():
            return weight.left.shape[1]
        case Sum():
            return next((rank for term in weight.terms if (rank := _rank(term)) is not None), None)
        case _:
            return None


def _bits(weight: Weight) -> float:
    """Return the bits of a code; for products and sums all stored bits over the weights that they stand for."""
    match weight:
        case Dense():
            return 8 * weight.values.element_size()
        case Uniform() | Codebook():
            return weight.code_bits
        case LowRank() | Sum():
            return round(weight.bits() / math.prod(weight.shape), 1)
        case _:
            assert_never(weight)


def _is_float(weight: Weight) -> bool:
    return isinstance(weight, Dense) or (
        isinstance(weight, LowRank) and _is_float(weight.left) and _is_float(weight.right)
    )


def decision_rows(
    planned: Sequence[tuple[Step, Sequence[Decision]]], without_feedback: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row per layer that a step compresses, then one per layer that none does."""
    taken = {decision.layer for _, decisions in planned for decision in decisions if decision.method}
    made = [(step, d) for step, decisions in planned for d in decisions if d.method]
    kept = {d.layer: (step, d) for step, decisions in planned for d in decisions if d.layer not in taken}
    rows = [decision_row(step, decision) for step, decision in (*made, *kept.values())]
    reason = "an embedding looks rows up, so that there is no error to feed back"
    return rows + [{"layer": x, "fallback": "without error feedback", "reason": reason} for x in without_feedback]


def decision_row(step: Step, decision: Decision) -> dict[str, Any]:
    if decision.method:
        return {"layer": decision.layer, "kept": step_module(step.name).shown(decision), "reason": "as the recipe says"}
    untouched = step_module(step.name).UNTOUCHED
    key = "fallback" if untouched == "dense" else "kept"
    return {"layer": decision.layer, key: untouched, "reason": decision.reason}


def why_slower(parts: Mapping[str, Any]) -> str:
    """Return the likeliest reason why a smaller file is slower, from the rows of its report."""
    if any(row.get("fallback") == NO_KERNELS["fallback"] for row in parts["decisions"]):
        return NO_KERNELS["reason"]
    if any("decoded" in (row["mode"] or "") for row in parts["layers"]):
        return "layers that are decoded to floats when the file is loaded run at the speed of floats"
    if any(row["step"] == "prune" for row in parts["steps"]):
        return "narrow convolutions are padded to 16 channels by many processors: prune with round_to: 16"
    return "the runtime has no faster form of these operators at this size"


def dropped(before: Metric | None, after: Metric | None, seed: int) -> dict[str, Any]:
    """Return what the metric lost, with its interval and unit; None of each where it was not measured twice."""
    if before is None or after is None:
        return {"drop": None, "drop_ci95": None, "drop_unit": None}
    lost = drop(before, after, seed)
    return {"drop": lost.value, "drop_ci95": lost.ci95, "drop_unit": lost.unit}


def gate(recipe: Recipe, before: Metric | None, after: Metric | None) -> AccuracyError | None:
    """Return the error where the metric lost more than `gates.max_drop`."""
    limit = recipe.gates.max_drop
    if limit is None or before is None or after is None:
        return None
    lost = drop(before, after, recipe.seed)
    if lost.value <= limit:
        return None
    return AccuracyError(
        f"{before.name} fell by {lost.value:.2f} {lost.unit}".rstrip() + f", gates.max_drop allows {limit:g}",
        where=recipe.at("gates"),
        fix="use more bits, or keep the worst layers of the report dense with skip",
    )


def reset_peak_rss() -> None:
    """Start a new peak for this step, where the system can (Linux)."""
    with contextlib.suppress(OSError):  # not Linux, or a sandbox
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), "")
        if line:
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
