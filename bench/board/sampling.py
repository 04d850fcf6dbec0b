"""The rules of measuring, on any machine: rounds of random order, bursts, a warm-up until latencies settle.

`limits` is a `measure.Sampling`, or anything with its fields. `measure.sample` calls this too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing import TypeAlias

    Call: TypeAlias = Callable[[], object]
    Clock: TypeAlias = Callable[[], float]


def sample(calls: Sequence[Call], limits: Any, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Return the fields of `measure.Samples`: seconds as one array (rounds, burst) per call, orders, stable, waited."""
    rng = np.random.default_rng(limits.seed)
    with _no_garbage_collection():
        bursts = [_burst(call, limits, clock) for call in calls]
        stable = _warm_up(calls, bursts, limits, clock)
        found = _measure(calls, bursts, limits, (rng, clock))
    return dict(found, stable=stable)


def frame(runner: Any, feeds: Mapping[str, Any], state: Mapping[str, str]) -> Call:
    """Return a call that runs one frame and keeps its state (output name -> input name) for the next."""
    if not state:
        return lambda: runner.run(feeds)
    current = dict(feeds)

    def run() -> None:
        outputs = runner.run(current)
        for output, name in state.items():
            current[name] = outputs[output]

    return run


def settled(medians: Sequence[float], rounds: int, spread: float) -> bool:
    """Return whether the last `rounds` medians lie within `spread` of each other, relative to their middle."""
    last = list(medians)[-rounds:]
    return len(last) == rounds and max(last) - min(last) <= spread * float(np.median(last))


def _burst(call: Call, limits: Any, clock: Clock) -> int:
    """Return how many runs make one burst; the first run, which allocates, is not counted."""
    call()
    seconds = float(np.median(_time(call, 3, clock)))
    wanted = limits.burst_seconds / seconds if seconds > 0 else limits.max_burst
    return int(np.clip(np.ceil(wanted), 1, limits.max_burst))


def _warm_up(calls: Sequence[Call], bursts: Sequence[int], limits: Any, clock: Clock) -> bool:
    medians: list[list[float]] = [[] for _ in calls]
    end = clock() + limits.warmup_seconds * len(calls)
    while clock() < end:
        for index, call in enumerate(calls):
            medians[index].append(float(np.median(_time(call, bursts[index], clock))))
        if all(settled(row, limits.warmup_rounds, limits.warmup_spread) for row in medians):
            return True
    return False


def _measure(calls: Sequence[Call], bursts: Sequence[int], limits: Any, run: Any) -> dict[str, Any]:
    rng, clock = run
    rounds: list[list[Any]] = [[] for _ in calls]
    orders = []
    start, wall, waiting = clock(), time.perf_counter(), _seconds_without_core()
    spent = [0.0 for _ in calls]
    while not _enough(rounds, (clock() - start, spent), limits):
        order = tuple(int(index) for index in rng.permutation(len(calls)))
        for index in order:
            rounds[index].append(_time(calls[index], bursts[index], clock))
            spent[index] += float(rounds[index][-1].sum())
        orders.append(order)
    waited = None if waiting is None else ((_seconds_without_core() or 0.0) - waiting) / (time.perf_counter() - wall)
    return {"seconds": tuple(np.stack(row) for row in rounds), "orders": tuple(orders), "waited": waited}


def _enough(rounds: Sequence[Sequence[Any]], times: tuple[float, Sequence[float]], limits: Any) -> bool:
    (elapsed, spent), count = times, len(rounds[0])
    if count < limits.min_rounds:
        return bool(elapsed >= limits.max_seconds * len(rounds) and count >= max(limits.min_rounds // 4, 1))
    if elapsed >= limits.max_seconds * len(rounds):
        return True
    runs = [count * len(row[0]) for row in rounds]
    return bool(min(spent) >= limits.min_seconds and min(runs) >= limits.min_count)


def _time(call: Call, count: int, clock: Clock) -> Any:
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
