"""Time artifacts in several fresh processes, because a process keeps its luck: memory layout, threads, heap.

Two files that take exactly as long may differ by some percent all through one process, and by others in the next. Each
process is therefore one observation of the ratio (a cluster), however many runs it makes. Within a process all
artifacts alternate (`measure.sample`); they are opened in random order, as who comes first gets other memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..exporters.runner import Open, RunnerOptions
from ..optimizer.errors import ExportError, RecipeError
from . import intervals
from .board.sampling import frame
from .child import ChildError, ask
from .feeds import Feeds
from .measure import Samples, Sampling, Seconds, sample

Fresh: TypeAlias = Literal["process", "session"]
START_SECONDS = 600.0
"""How long opening the artifacts may take in a process, on top of its measuring time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One batch size: what each artifact is fed, and for how long it is timed in one process."""

    feeds: tuple[Feeds, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one process does; it travels by pickle, so `open_` must be a function of an importable module."""

    paths: tuple[Path, ...]
    options: RunnerOptions
    open_: Open
    cells: tuple[Cell, ...]
    state: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When there are enough processes: at least `least`, until every ratio is known to `half_width` or time is up.

    half_width: of the 95 % interval, relative, with what moves `between` benchmarks. most: of processes.
    extra_seconds: of all that follow the least.
    """

    least: int
    most: int
    half_width: float
    between: float
    extra_seconds: float


def gather(work: Work, limits: Limits, fresh: Fresh, between: Callable[[], None]) -> list[tuple[Samples, ...]]:
    """Return, for each cell, what each process measured. `between` is called after each process."""
    once = _in_process if fresh == "process" else _in_session
    found: list[list[Samples]] = [[] for _ in work.cells]
    end = math.inf
    for number in range(limits.most):
        if number == limits.least:
            end = time.monotonic() + limits.extra_seconds
        if number >= limits.least and (time.monotonic() >= end or _known(found, limits)):
            break
        for cell, samples in zip(found, once(numbered(work, number)), strict=True):
            cell.append(samples)
        between()
    return [tuple(cell) for cell in found]


def _known(found: Sequence[Sequence[Samples]], limits: Limits) -> bool:
    return all(known_well([one.seconds for one in cell], limits) for cell in found)


def known_well(processes: Sequence[Sequence[Seconds]], limits: Limits) -> bool:
    """Return whether the ratio of each artifact to the first is known well enough from what processes timed."""
    least = [
        intervals.log_least([(seconds[index], seconds[0]) for seconds in processes])
        for index in range(1, len(processes[0]))
    ]
    return all(intervals.half_width(pairs, limits.between) <= limits.half_width for pairs in least)


def numbered(work: Work, number: int) -> Work:
    """Return the work with seeds of one process."""
    seeds = np.random.SeedSequence([work.seed, number]).generate_state(1 + len(work.cells))
    cells = [
        replace(cell, sampling=replace(cell.sampling, seed=int(seed) ^ cell.sampling.seed))
        for cell, seed in zip(work.cells, seeds[1:], strict=True)
    ]
    return replace(work, seed=int(seeds[0]), cells=tuple(cells))


def _in_session(work: Work) -> list[Samples]:
    order = np.random.default_rng(work.seed).permutation(len(work.paths))
    opened = {int(index): work.open_(work.paths[index], work.options) for index in order}
    runners = [opened[index] for index in range(len(work.paths))]
    found = []
    for cell in work.cells:
        calls = [frame(runner, feeds, work.state) for runner, feeds in zip(runners, cell.feeds, strict=True)]
        found.append(sample(calls, cell.sampling))
    return found


def _in_process(work: Work) -> list[Samples]:
    longest = sum(cell.sampling.max_seconds + cell.sampling.warmup_seconds for cell in work.cells) * len(work.paths)
    try:
        answer = ask(timed, work, timeout=START_SECONDS + 4 * longest)
    except ChildError as problem:
        names = ", ".join(path.name for path in work.paths)
        if "pickle" in str(problem).lower() or "local object" in str(problem):
            what = f"a fresh process cannot be given {getattr(work.open_, '__qualname__', work.open_)}"
            raise RecipeError(
                what, where="bench", fix="name a function of a module, or use fresh: session"
            ) from problem
        raise ExportError(f"the process that measures stopped: {problem}", where=names) from problem
    return [samples_of(one) for one in answer]


def timed(work: Work) -> list[dict[str, Any]]:
    """Do the work in this process and return it as plain values."""
    return [
        {
            "seconds": [part.tolist() for part in one.seconds],
            "orders": one.orders,
            "stable": one.stable,
            "waited": one.waited,
        }
        for one in _in_session(work)
    ]


def samples_of(plain: Mapping[str, Any]) -> Samples:
    """Return samples that came as plain values from another process or machine."""
    return Samples(
        seconds=tuple(np.array(part) for part in plain["seconds"]),
        orders=tuple(tuple(order) for order in plain["orders"]),
        stable=bool(plain["stable"]),
        waited=plain["waited"],
    )


def joined(clusters: Sequence[Samples], index: int) -> np.ndarray:
    """Return the seconds of one artifact in all processes, (rounds, burst), each burst cut to the shortest."""
    parts = [one.seconds[index] for one in clusters]
    burst = min(part.shape[1] for part in parts)
    return np.concatenate([part[:, :burst] for part in parts])
