"""Read values out of a report, in which anything may be null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Report: TypeAlias = Mapping[str, object]
Interval: TypeAlias = tuple[float, float]
WHOLE_MODEL = ("", "*", "model")
"""Values of `layer` (null is "") that mean a decision on the whole model."""


def at(report: Report, *path: str) -> object:
    """Return the value under nested keys; None where the path ends early."""
    value: object = report
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(report: Report, *path: str) -> float | None:
    """Return a finite number, else None."""
    value = at(report, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def text(report: Report, *path: str) -> str:
    """Return a string; "" for null."""
    value = at(report, *path)
    return "" if value is None else str(value)


def interval(report: Report, *path: str) -> Interval | None:
    """Return (low, high); None unless both are finite numbers."""
    value = at(report, *path)
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = (number({"value": end}, "value") for end in value)
    return None if low is None or high is None else (low, high)


def rows(report: Report, *path: str) -> list[Report]:
    """Return the mappings of a list; empty for null."""
    value = at(report, *path)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [row for row in value if isinstance(row, Mapping)]


def weights(layer: Report) -> int | None:
    """Return how many weights a row of `layers` stands for."""
    shape = at(layer, "shape")
    if not isinstance(shape, list | tuple) or not shape or not all(isinstance(size, int) for size in shape):
        return None
    return math.prod(shape)


def is_fraction(report: Report) -> bool:
    """Return whether the metric is a fraction, shown in per cent: by its drop's unit, else the rule of metric.py."""
    unit = at(report, "final", "drop_unit")
    if unit is not None:
        return unit == "points"
    values = [number(report, side, "metric", "value") for side in ("baseline", "final")]
    known = [value for value in values if value is not None]
    return bool(known) and all(0 <= value <= 1 for value in known)


def layer_name(row: Report) -> str:
    """Return the layer that a decision is about."""
    return "whole model" if text(row, "layer") in WHOLE_MODEL else text(row, "layer")


def decision(row: Report) -> tuple[str, str]:
    """Return ("kept" or "fallback", what it is now) of a row {layer, kept|fallback, reason}.

    The key names the decision; its value may name the method, as in {"fallback": "int8"}.
    """
    for key in ("fallback", "kept"):
        if row.get(key):
            return key, "" if row[key] is True else str(row[key])
    return text(row, "decision"), ""
