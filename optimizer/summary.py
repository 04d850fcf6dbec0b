"""The rows of a report: what a model weighs, what became of each layer, what a step took."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cost
from .graph import Graph
from .metric import Metric
from .model import Model
from .recipe import Step, step_module
from .steps import Decision, LayerResult
from .weight import Dense, format_name


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
        "macs": cost.macs(graph),
    }


def layer_rows(model: Model, results: Sequence[LayerResult]) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        weight = model.weights[result.layer]
        rows.append(
            {
                "name": result.layer,
                "shape": list(model.layouts[result.layer].shape),
                "channels_kept": weight.shape[0],
                "rank": None,
                "format": format_name(weight),
                "bits": getattr(weight, "code_bits", None) or 8 * weight.values.element_size(),  # type: ignore[union-attr]
                "size_bytes": weight.bits() // 8,
                "error_rel": result.error_rel,
                "mode": "float" if isinstance(weight, Dense) else "decoded to float",
            }
        )
    return rows


def decision_row(step: Step, decision: Decision) -> dict[str, Any]:
    if decision.method:
        return {"layer": decision.layer, "kept": step_module(step.name).shown(decision), "reason": "as the recipe says"}
    return {"layer": decision.layer, "fallback": "dense", "reason": decision.reason}


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
