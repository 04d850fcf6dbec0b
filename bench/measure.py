"""Time several calls fairly: alternating in one process, in rounds of random order, until time and count suffice.

The rules are in `board/sampling.py`, which a remote board runs too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..optimizer.errors import RecipeError
from .board import sampling
from .board.sampling import settled as settled

Seconds: TypeAlias = NDArray[np.float64]
Call: TypeAlias = Callable[[], object]
Clock: TypeAlias = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How long to measure. Every limit is per call, and both minima hold.

    A round gives each call one burst of back-to-back runs; a burst lasts about `burst_seconds`, so that caches hold the
    call's own data as they would in use, yet drift of the machine hits all calls of a round alike. `max_seconds` ends
    the measurement early, but never before `min_rounds` / 4 rounds.
    """

    min_seconds: float = 1.0
    min_count: int = 50
    max_seconds: float = 60.0
    min_rounds: int = 30
    burst_seconds: float = 0.02
    max_burst: int = 64
    warmup_seconds: float = 3.0
    warmup_rounds: int = 5
    warmup_spread: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("min_seconds", "min_count", "max_seconds", "min_rounds", "burst_seconds", "max_burst"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name}={getattr(self, name)} is not positive", fix="use a number above 0")
        if self.max_seconds < self.min_seconds:
            raise RecipeError(
                f"max_seconds={self.max_seconds} is below min_seconds={self.min_seconds}", fix="raise max_seconds"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Seconds of every run: one array (rounds, burst) per call, in the order of the calls.

    `orders`: the order of the calls in each round. `stable`: whether the warm-up settled before its time was up.
    `waited`: the share of the time that our threads were ready but had no core (None where the system does not say). It
    matters because alternation cannot cancel it: a call longer than the scheduler's slice is interrupted, a shorter one
    is not. Seen: four busy processes on two cores turned a true ratio of 0.35 into 0.18, interval 0.17 to 0.18.
    """

    seconds: tuple[Seconds, ...]
    orders: tuple[tuple[int, ...], ...]
    stable: bool
    waited: float | None


def sample(calls: Sequence[Call], spec: Sampling, clock: Clock = time.perf_counter) -> Samples:
    """Return timings of all calls. Cost: about min_seconds per call, plus the warm-up."""
    if not calls:
        raise RecipeError("there is nothing to measure", where="bench", fix="name at least one artifact")
    return Samples(**sampling.sample(calls, spec, clock))
