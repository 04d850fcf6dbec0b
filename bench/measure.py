"""Time several calls fairly: alternating in one process, in rounds of random order, until time and count suffice."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..optimizer.errors import RecipeError

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
    rng = np.random.default_rng(spec.seed)
    with _no_garbage_collection():
        bursts = [_burst(call, spec, clock) for call in calls]
        stable = _warm_up(calls, bursts, spec, clock)
        return _measure(calls, bursts, spec, (rng, clock, stable))


def settled(medians: Sequence[float], rounds: int, spread: float) -> bool:
    """Return whether the last `rounds` medians lie within `spread` of each other, relative to their middle."""
    last = list(medians)[-rounds:]
    return len(last) == rounds and max(last) - min(last) <= spread * float(np.median(last))


def _burst(call: Call, spec: Sampling, clock: Clock) -> int:
    """Return how many runs make one burst; the first run, which allocates, is not counted."""
    call()
    seconds = float(np.median(_time(call, 3, clock)))
    wanted = spec.burst_seconds / seconds if seconds > 0 else spec.max_burst
    return int(np.clip(np.ceil(wanted), 1, spec.max_burst))


def _warm_up(calls: Sequence[Call], bursts: Sequence[int], spec: Sampling, clock: Clock) -> bool:
    medians: list[list[float]] = [[] for _ in calls]
    end = clock() + spec.warmup_seconds * len(calls)
    while clock() < end:
        for call, burst, row in zip(calls, bursts, medians, strict=True):
            row.append(float(np.median(_time(call, burst, clock))))
        if all(settled(row, spec.warmup_rounds, spec.warmup_spread) for row in medians):
            return True
    return False


def _measure(
    calls: Sequence[Call], bursts: Sequence[int], spec: Sampling, run: tuple[np.random.Generator, Clock, bool]
) -> Samples:
    rng, clock, stable = run
    rounds: list[list[Seconds]] = [[] for _ in calls]
    orders: list[tuple[int, ...]] = []
    start, wall, waiting = clock(), time.perf_counter(), _seconds_without_core()
    while not _enough(rounds, clock() - start, spec):
        order = tuple(int(index) for index in rng.permutation(len(calls)))
        for index in order:
            rounds[index].append(_time(calls[index], bursts[index], clock))
        orders.append(order)
    waited = None if waiting is None else ((_seconds_without_core() or 0.0) - waiting) / (time.perf_counter() - wall)
    return Samples(seconds=tuple(np.stack(row) for row in rounds), orders=tuple(orders), stable=stable, waited=waited)


def _enough(rounds: Sequence[Sequence[Seconds]], elapsed: float, spec: Sampling) -> bool:
    count = len(rounds[0])
    if count < spec.min_rounds:
        return elapsed >= spec.max_seconds * len(rounds) and count >= max(spec.min_rounds // 4, 1)
    if elapsed >= spec.max_seconds * len(rounds):
        return True
    return all(
        sum(float(part.sum()) for part in row) >= spec.min_seconds and sum(map(len, row)) >= spec.min_count
        for row in rounds
    )


def _time(call: Call, count: int, clock: Clock) -> Seconds:
    seconds = np.empty(count)
    for index in range(count):
        start = clock()
        call()
        seconds[index] = clock() - start
    return seconds


def _seconds_without_core() -> float | None:
    """Return how long all threads of this process have waited for a core so far (Linux schedstat, second field)."""
    try:
        stats = [path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat")]
        return sum(int(fields[1]) for fields in stats) * 1e-9 if stats else None
    except (OSError, IndexError, ValueError):
        return None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
