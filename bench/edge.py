"""Scenario edge: one stream of requests, back to back, per batch size and thread count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..exporters.runner import Open, Runner, RunnerOptions
from ..optimizer.errors import Error, ExportError, InputError, RecipeError
from . import intervals
from .feeds import Feeds, MakeFeeds, checked_feeds, random_feeds
from .measure import Call, Samples, Sampling, Seconds, sample
from .peak import Job, peak_rss_bytes

Progress: TypeAlias = Callable[[float, str], None]
"""Called with the done fraction, 0..1, and what is measured next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to measure; the fields are the keys of the recipe's `bench`.

    `dims` gives the sizes of named dimensions other than the batch; `feeds` replaces random inputs by real ones.
    `min_seconds`, `min_count`, `max_seconds` and `warmup_seconds` are per artifact, batch size and thread count.
    """

    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    min_seconds: float = 1.0
    min_count: int = 50
    max_seconds: float = 60.0
    warmup_seconds: float = 3.0
    seed: int = 0
    exact: bool = False
    kernels: bool = True
    peak_rss: bool = True
    dims: Mapping[str, int] = field(default_factory=dict)
    feeds: MakeFeeds | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("threads", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise RecipeError(f"{name}={list(values)}", where="bench", fix=f"list numbers of at least {least}")
        self.sampling(0, 1)  # validates the limits

    def sampling(self, threads: int, batch: int) -> Sampling:
        """Return the limits of one cell, with a seed of its own."""
        return Sampling(
            min_seconds=self.min_seconds,
            min_count=self.min_count,
            max_seconds=self.max_seconds,
            warmup_seconds=self.warmup_seconds,
            seed=int(np.random.SeedSequence([self.seed, threads, batch]).generate_state(1)[0]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One artifact at one batch size and thread count. `samples`: seconds of every run, (rounds, burst).

    `ratio_to_baseline` is latency over the first artifact's latency: below 1 is faster. `ci95` is the interval of the
    p50 in ms. `throughput_per_s` counts samples (batch x runs) over the time spent inside the runs. `stable` is False
    where the warm-up ran out of time before latencies settled; `waited` is the share of time without a core. `runtime`
    is the runner's name, which says whether our kernels computed packed layers.
    """

    artifact: str
    runtime: str
    batch: int
    threads: int
    latency_ms_p50: float
    latency_ms_p90: float
    latency_ms_p99: float
    ci95: intervals.Interval | None
    throughput_per_s: float
    peak_rss_bytes: int | None
    ratio_to_baseline: float
    ratio_ci95: intervals.Interval | None
    samples: Seconds
    stable: bool
    waited: float | None = None
    scenario: str = "edge"
    energy_j: float | None = None
    stages: Mapping[str, float] | None = None

    def report(self) -> dict[str, object]:
        """Return the row of report.json: exactly its keys, in its order."""
        values = ((key, getattr(self, key)) for key in ROW_KEYS)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values}


ROW_KEYS = (
    *("artifact", "runtime", "scenario", "batch", "threads", "latency_ms_p50", "latency_ms_p90", "latency_ms_p99"),
    *("ci95", "throughput_per_s", "peak_rss_bytes", "energy_j", "stages", "ratio_to_baseline", "ratio_ci95"),
)


def silent(_fraction: float, _text: str) -> None:
    """Report no progress."""


def run(artifacts: Sequence[Path], spec: Spec, open_: Open, progress: Progress = silent) -> list[Row]:
    """Return a row per thread count, batch size and artifact; the first artifact is the baseline.

    All artifacts are open at once and alternate (`measure.sample`); peak memory comes from a process for each.
    Raises InputError for an artifact that is absent or does not take the batch, ExportError for one that does not run.
    """
    _check(artifacts)
    rows: list[Row] = []
    cells = len(spec.threads) * len(spec.batch)
    for threads in spec.threads:
        options = RunnerOptions(threads=threads, exact=spec.exact, kernels=spec.kernels)
        cell = _Cell(spec=spec, options=options, paths=tuple(artifacts), open_=open_)
        runners = [open_(path, options) for path in artifacts]
        for batch in spec.batch:
            progress(
                len(rows) / (cells * len(artifacts)),
                f"batch {batch}, {threads or 'default'} thread{'s' * (threads != 1)}",
            )
            rows += _measure(cell, runners, batch)
    progress(1.0, "done")
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    spec: Spec
    options: RunnerOptions
    paths: tuple[Path, ...]
    open_: Open


def _measure(cell: _Cell, runners: Sequence[Runner], batch: int) -> list[Row]:
    feeds = [_feeds(runner, cell.spec, batch) for runner in runners]
    names = _names(cell.paths)
    for runner, feed, name in zip(runners, feeds, names, strict=True):
        _try_once(runner, feed, name)
    calls = [_call(runner, feed) for runner, feed in zip(runners, feeds, strict=True)]
    samples = sample(calls, cell.spec.sampling(cell.options.threads, batch))
    peaks = [_peak(cell, path, feed) for path, feed in zip(cell.paths, feeds, strict=True)]
    return [_row(cell, runner, (batch, index), samples, peaks[index]) for index, runner in enumerate(runners)]


def _row(cell: _Cell, runner: Runner, place: tuple[int, int], samples: Samples, peak: int | None) -> Row:
    batch, index = place
    seconds, baseline = samples.seconds[index], samples.seconds[0]
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]) * 1e3)
    rng = np.random.default_rng([cell.spec.seed, cell.options.threads, batch])
    interval = intervals.median_interval(seconds, rng)
    return Row(
        artifact=_names(cell.paths)[index],
        runtime=runner.name,
        batch=batch,
        threads=cell.options.threads,
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p99=p99,
        ci95=None if interval is None else (interval[0] * 1e3, interval[1] * 1e3),
        throughput_per_s=batch * seconds.size / float(seconds.sum()),
        peak_rss_bytes=peak,
        ratio_to_baseline=intervals.ratio(seconds, baseline),
        ratio_ci95=intervals.ratio_interval(seconds, baseline, rng),
        samples=seconds,
        stable=samples.stable,
        waited=samples.waited,
    )


def _call(runner: Runner, feeds: Feeds) -> Call:
    return lambda: runner.run(feeds)


def _feeds(runner: Runner, spec: Spec, batch: int) -> Feeds:
    if spec.feeds is None:
        return random_feeds(runner, batch, spec.dims, spec.seed)
    return checked_feeds(runner, batch, spec.feeds)


def _try_once(runner: Runner, feeds: Feeds, name: str) -> None:
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feeds.items())
    try:
        runner.run(feeds)
    except Error:
        raise
    except Exception as problem:
        raise ExportError(
            f"the artifact does not run with {shapes}: {problem}",
            where=name,
            fix="give the sizes of its inputs in dims",
        ) from problem


def _peak(cell: _Cell, path: Path, feeds: Feeds) -> int | None:
    if not cell.spec.peak_rss:
        return None
    return peak_rss_bytes(Job(path=path, options=cell.options, open_=cell.open_, feeds=feeds))


def _names(paths: Sequence[Path]) -> list[str]:
    """Return file names; with their folder's name where two are equal. Never more of the path than that."""
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def _check(artifacts: Sequence[Path]) -> None:
    if not artifacts:
        raise InputError("there is nothing to measure", where="bench", fix="name at least one artifact")
    for path in artifacts:
        if not path.exists():
            raise InputError("there is no such artifact", where=str(path), fix="export first")
    if len(set(_names(artifacts))) < len(artifacts):
        raise InputError(
            "two artifacts have the same folder and file name: " + ", ".join(_names(artifacts)),
            where="bench",
            fix="rename one, so that the table can tell them apart",
        )
