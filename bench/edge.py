"""Scenario edge: one stream of requests, back to back, per batch size and thread count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..exporters.runner import Open, Runner, RunnerOptions
from ..optimizer.errors import Error, ExportError, RecipeError
from . import intervals
from .feeds import Feeds, MakeFeeds, checked_feeds, random_feeds
from .measure import Call, Samples, Sampling, sample
from .peak import Job, peak_rss_bytes
from .rows import Progress, Row, artifact_names, check_artifacts, silent


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


def run(artifacts: Sequence[Path], spec: Spec, open_: Open, progress: Progress = silent) -> list[Row]:
    """Return a row per thread count, batch size and artifact; the first artifact is the baseline.

    All artifacts are open at once and alternate (`measure.sample`); peak memory comes from a process for each.
    Raises InputError for an artifact that is absent or does not take the batch, ExportError for one that does not run.
    """
    check_artifacts(artifacts)
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
    names = artifact_names(cell.paths)
    for runner, feed, name in zip(runners, feeds, names, strict=True):
        _try_once(runner, feed, name)
    calls = [_call(runner, feed) for runner, feed in zip(runners, feeds, strict=True)]
    samples = sample(calls, cell.spec.sampling(cell.options.threads, batch))
    peaks = [_peak(cell, path, feed) for path, feed in zip(cell.paths, feeds, strict=True)]
    runtimes = tuple(runner.name for runner in runners)
    condition = Condition(batch=batch, threads=cell.options.threads, seed=cell.spec.seed)
    return rows_of(condition, Measured(names=tuple(names), runtimes=runtimes, samples=samples, peaks=tuple(peaks)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What the artifacts of a cell share; `seed` is that of the intervals."""

    batch: int
    threads: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """What was measured of each artifact in one cell, here or on a board; the first is the baseline."""

    names: tuple[str, ...]
    runtimes: tuple[str, ...]
    samples: Samples
    peaks: tuple[int | None, ...]
    joules: tuple[float | None, ...] = ()
    details: tuple[Mapping[str, object], ...] = ()


def rows_of(condition: Condition, measured: Measured) -> list[Row]:
    """Return a row per artifact, with intervals."""
    return [_row(condition, measured, index) for index in range(len(measured.names))]


def _row(condition: Condition, measured: Measured, index: int) -> Row:
    samples = measured.samples
    seconds, baseline = samples.seconds[index], samples.seconds[0]
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]) * 1e3)
    rng = np.random.default_rng([condition.seed, condition.threads, condition.batch])
    interval = intervals.median_interval(seconds, rng)
    return Row(
        artifact=measured.names[index],
        runtime=measured.runtimes[index],
        scenario="edge",
        batch=condition.batch,
        threads=condition.threads,
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p99=p99,
        ci95=None if interval is None else (interval[0] * 1e3, interval[1] * 1e3),
        throughput_per_s=condition.batch * seconds.size / float(seconds.sum()),
        peak_rss_bytes=measured.peaks[index],
        ratio_to_baseline=intervals.ratio(seconds, baseline),
        ratio_ci95=intervals.ratio_interval(seconds, baseline, rng),
        samples=seconds,
        stable=samples.stable,
        waited=samples.waited,
        energy_j=measured.joules[index] if measured.joules else None,
        details=measured.details[index] if measured.details else {},
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
