"""The highest rate that holds: bracketed by steps of two, then bisected geometrically."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

Holds: TypeAlias = Callable[[float], bool]
MAX_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """`holds` is the highest rate that held, 0 where none did; `fails` is the lowest that failed above it, inf where
    none did; `tried` has every rate with its answer, in order."""

    holds: float
    fails: float
    tried: tuple[tuple[float, bool], ...]


def bracket(holds: Holds, start: float, tolerance: float) -> Bracket:
    """Return rates that hold and fail with fails / holds <= 1 + tolerance; after MAX_STEPS probes the best so far.

    A failure below a rate that held is taken at its word: noise makes the answer lower, never higher.
    """
    low, high, rate, tried = 0.0, math.inf, start, list[tuple[float, bool]]()
    while len(tried) < MAX_STEPS and high > low * (1 + tolerance):
        held = holds(rate)
        tried.append((rate, held))
        low, high = (rate, high) if held else (low, rate)
        rate = _next(low, high)
    return Bracket(holds=low, fails=high, tried=tuple(tried))


def _next(low: float, high: float) -> float:
    if math.isinf(high):
        return 2 * low
    return high / 2 if low == 0 else math.sqrt(low * high)
