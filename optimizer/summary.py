"""The rows of a report: what a model weighs, what became of each layer, what a step took."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

from . import activations, cost
from .graph import Graph
from .metric import Metric
from .model import Model
from .recipe import Step, step_module
from .steps import Decision, LayerResult
from .weight import Codebook, Dense, LowRank, Sum, Uniform, Weight, format_name


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
                "mode": "int8" if result.layer in integers else "float" if _is_float(weight) else "decoded to float",
            }
        )
    return rows


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


def decision_row(step: Step, decision: Decision) -> dict[str, Any]:
    if decision.method:
        return {"layer": decision.layer, "kept": step_module(step.name).shown(decision), "reason": "as the recipe says"}
    untouched = step_module(step.name).UNTOUCHED
    key = "fallback" if untouched == "dense" else "kept"
    return {"layer": decision.layer, key: untouched, "reason": decision.reason}


def why_slower(parts: Mapping[str, Any]) -> str:
    """Return the likeliest reason why a smaller file is slower, from the rows of its report."""
    if any(row["mode"] == "decoded to float" for row in parts["layers"]):
        return "a folded codebook runs at the speed of floats until low-bit kernels are registered"
    if any(row["step"] == "prune" for row in parts["steps"]):
        return "narrow convolutions are padded to 16 channels by many processors: prune with round_to: 16"
    return "the runtime has no faster form of these operators at this size"


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
