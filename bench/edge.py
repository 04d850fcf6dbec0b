"""Scenario edge: one stream of requests, back to back, per batch size and thread count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..exporters.runner import Open, Runner, RunnerOptions
from ..optimizer.errors import Error, ExportError, RecipeError
from . import energy, intervals, streaming
from .board.energy import Energy
from .board.sampling import frame
from .board.watch import Watch, device_of
from .feeds import Feeds, MakeFeeds, checked_feeds, random_feeds
from .intervals import Interval
from .measure import Samples, Sampling, Seconds
from .peak import Job, peak_rss_bytes
from .rows import Progress, Row, artifact_names, check_artifacts, silent
from .sessions import Cell, Fresh, Limits, Work, gather, joined

MORE = 3
"""At most so many times `processes` are started while the interval is wider than `half_width`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to measure; the fields are the keys of the recipe's `bench`.

    `dims` gives the sizes of named dimensions other than the batch, `inputs` a value for all elements of an input;
    `feeds` replaces random inputs by real ones. `min_seconds`, `min_count`, `max_seconds` and `warmup_seconds` are per
    artifact, batch size and thread count, over the least number of processes.

    processes: how many fresh processes at least; more follow while a ratio's interval is wider than `half_width`
    (relative), for up to `extra_seconds` per artifact and batch size, and up to MORE times as many. between_runs: the
    part of the interval that no benchmark can see in itself, a relative standard deviation (`intervals`). fresh:
    "session" opens the files anew in this process instead, which leaves out the luck of a process. meter: see
    `board/energy.py`. state: output -> the input that it becomes in the next frame. frame_ms: duration of a frame, for
    the real-time factor; 0 for models without one.
    """

    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    min_seconds: float = 3.0
    min_count: int = 50
    max_seconds: float = 60.0
    warmup_seconds: float = 3.0
    processes: int = 8
    half_width: float = 0.02
    between_runs: float = intervals.BETWEEN
    extra_seconds: float = 10.0
    fresh: Fresh = "process"
    seed: int = field(default=0, metadata={"hidden": True})
    exact: bool = False
    kernels: bool = True
    peak_rss: bool = True
    meter: str = "auto"
    frame_ms: float = 0.0
    state: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, int | float] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    feeds: MakeFeeds | None = field(default=None, metadata={"hidden": True})

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("threads", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise RecipeError(f"{name}={list(values)}", where="bench", fix=f"list numbers of at least {least}")
        if self.processes < 1:
            raise RecipeError(f"processes={self.processes} is out of range", fix="use 1 or more")
        for name, value, good in (
            ("between_runs", self.between_runs, 0 <= self.between_runs < 1),
            ("extra_seconds", self.extra_seconds, self.extra_seconds >= 0),
            ("frame_ms", self.frame_ms, self.frame_ms >= 0),
        ):
            if not good:
                raise RecipeError(f"{name}={value} is out of range", fix="use 0 or more")
        if not self.half_width > (least_width := intervals.unseen(self.between_runs)):
            what = f"half_width={self.half_width} is out of reach: two runs differ by {least_width:.4f} in any case"
            raise RecipeError(what, fix="raise it, or lower between_runs to what paredown.bench.repeat measures here")
        energy.check_meter(self.meter)
        limits = {name: getattr(self, name) for name in ("min_seconds", "min_count", "max_seconds")}
        Sampling(**limits)  # validates them

    def sampling(self, threads: int, batch: int) -> Sampling:
        """Return the limits of one cell in one process, with a seed of its own."""
        return Sampling(
            min_seconds=self.min_seconds / self.processes,
            min_count=math.ceil(self.min_count / self.processes),
            max_seconds=self.max_seconds / self.processes,
            min_rounds=math.ceil(Sampling().min_rounds / self.processes),
            warmup_seconds=self.warmup_seconds / self.processes,
            seed=int(np.random.SeedSequence([self.seed, threads, batch]).generate_state(1)[0]),
        )

    def limits(self, artifacts: int) -> Limits:
        """Return how many processes may follow; one process is what it is."""
        return Limits(
            least=self.processes,
            most=self.processes * (MORE if self.processes > 1 else 1),
            half_width=self.half_width,
            between=self.between_runs,
            extra_seconds=self.extra_seconds * artifacts * len(self.batch),
        )


def run(artifacts: Sequence[Path], spec: Spec, open_: Open, progress: Progress = silent) -> list[Row]:
    """Return a row per thread count, batch size and artifact; the first artifact is the baseline.

    All artifacts are open at once and alternate, in several fresh processes (`sessions`); peak memory comes from a
    process for each, energy from a phase of its own. Raises InputError for an artifact that is absent or does not take
    the batch, ExportError for one that does not run, RuntimeMissingError for a meter that was named and is not there.
    """
    check_artifacts(artifacts)
    rows: list[Row] = []
    for number, threads in enumerate(spec.threads):
        batches = ", ".join(map(str, spec.batch))
        progress(number / len(spec.threads), f"batch {batches}, {threads or 'default'} thread{'s' * (threads != 1)}")
        options = RunnerOptions(threads=threads, exact=spec.exact, kernels=spec.kernels)
        rows += _measure(_Bench(spec=spec, options=options, paths=tuple(artifacts), open_=open_))
    progress(1.0, "done")
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """One thread count."""

    spec: Spec
    options: RunnerOptions
    paths: tuple[Path, ...]
    open_: Open


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One cell, measured here or on a board: what each process timed, and of each artifact what else is known.

    seen: what all rows say of the machine; own: what only this artifact's row says. The first is the baseline.
    """

    names: Sequence[str]
    runtimes: Sequence[str]
    batch: int
    threads: int
    clusters: tuple[Samples, ...]
    energies: Sequence[Energy]
    peaks: Sequence[int | None]
    seen: Mapping[str, object]
    own: Sequence[Mapping[str, object]]


def _measure(bench: _Bench) -> list[Row]:
    spec, threads = bench.spec, bench.options.threads
    runners = [bench.open_(path, bench.options) for path in bench.paths]
    feeds = [[feeds_of(runner, spec, batch) for runner in runners] for batch in spec.batch]
    for cell in feeds:
        for runner, feed, name in zip(runners, cell, artifact_names(bench.paths), strict=True):
            _try_once(runner, feed, name, spec.state)
    cells = [
        Cell(feeds=tuple(cell), sampling=spec.sampling(threads, batch))
        for batch, cell in zip(spec.batch, feeds, strict=True)
    ]
    work = Work(
        paths=bench.paths,
        options=bench.options,
        open_=bench.open_,
        cells=tuple(cells),
        state=dict(spec.state),
        seed=spec.seed,
    )
    with Watch(device_of(runners[0].name)) as watch:
        clusters = gather(work, spec.limits(len(bench.paths)), spec.fresh, watch.time_reference)
    seen = watch.summary()
    rows: list[Row] = []
    for batch, cell, found in zip(spec.batch, feeds, clusters, strict=True):
        rows += rows_of(spec, _measured(bench, runners, (batch, cell), found, seen))
    return rows


def _measured(
    bench: _Bench,
    runners: Sequence[Runner],
    cell: tuple[int, Sequence[Feeds]],
    clusters: tuple[Samples, ...],
    seen: Mapping[str, object],
) -> Measured:
    """Return a timed cell with its energy and memory."""
    batch, feeds = cell
    calls = [frame(runner, feed, bench.spec.state) for runner, feed in zip(runners, feeds, strict=True)]
    return Measured(
        names=artifact_names(bench.paths),
        runtimes=[runner.name for runner in runners],
        batch=batch,
        threads=bench.options.threads,
        clusters=clusters,
        energies=energy.measure(calls, bench.spec.meter, device_of(runners[0].name)),
        peaks=[_peak(bench, path, feed) for path, feed in zip(bench.paths, feeds, strict=True)],
        seen=seen,
        own=[{} for _ in runners],
    )


def rows_of(spec: Spec, measured: Measured) -> list[Row]:
    """Return a row per artifact, with intervals."""
    return [_row(spec, measured, index) for index in range(len(measured.names))]


def _row(spec: Spec, measured: Measured, index: int) -> Row:
    batch, clusters = measured.batch, measured.clusters
    seconds = joined(clusters, index)
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]))
    rng = np.random.default_rng([spec.seed, measured.threads, batch])
    pairs = [(one.seconds[index], one.seconds[0]) for one in clusters]
    ratio, ratio_interval = intervals.compared(pairs, spec.between_runs if index else 0.0, rng)
    median = _median_interval([seconds for seconds, _ in pairs], p50, spec, rng)
    waits = [one.waited for one in clusters if one.waited is not None]
    found = measured.energies[index]
    return Row(
        artifact=measured.names[index],
        runtime=measured.runtimes[index],
        scenario="edge",
        batch=batch,
        threads=measured.threads,
        latency_ms_p50=p50 * 1e3,
        latency_ms_p90=p90 * 1e3,
        latency_ms_p99=p99 * 1e3,
        ci95=None if median is None else (median[0] * 1e3, median[1] * 1e3),
        throughput_per_s=batch * seconds.size / float(seconds.sum()),
        peak_rss_bytes=measured.peaks[index],
        ratio_to_baseline=ratio,
        ratio_ci95=ratio_interval,
        samples=seconds,
        stable=sum(one.stable for one in clusters) > len(clusters) / 2,
        waited=float(np.mean(waits)) if waits else None,
        energy_j=energy.per_sample(found, batch),
        details={
            **_processes(spec, clusters, pairs),
            **measured.seen,
            **energy.details(found),
            **streaming.real_time(seconds, spec.frame_ms),
            **measured.own[index],
        },
    )


def _processes(spec: Spec, clusters: Sequence[Samples], pairs: Sequence[tuple[Seconds, Seconds]]) -> dict[str, object]:
    over = "processes" if spec.fresh == "process" else "sessions"
    return {
        "processes": len(clusters),
        "interval": f"over fresh {over}" if len(clusters) >= intervals.MIN_PROCESSES else "within one process",
        "rounds_per_process": [len(one.seconds[0]) for one in clusters],
        "between_runs": spec.between_runs,
        "ratio_typical": intervals.typical(pairs),
    }


def _median_interval(processes: Sequence[Seconds], p50: float, spec: Spec, rng: np.random.Generator) -> Interval | None:
    """Return the interval of the p50 in seconds; of one or two processes that within the first."""
    if len(processes) < intervals.MIN_PROCESSES:
        return intervals.median_interval(processes[0], rng)
    medians = np.log([float(np.median(seconds)) for seconds in processes])
    return intervals.process_interval(p50, medians, spec.between_runs)


def feeds_of(runner: Runner, spec: Spec, batch: int) -> Feeds:
    if spec.feeds is not None:
        feeds = checked_feeds(runner, batch, spec.feeds)
    else:
        feeds = random_feeds(runner, batch, spec.dims, spec.seed)
    return streaming.with_constants(runner, feeds, spec.inputs, spec.state)


def _try_once(runner: Runner, feeds: Feeds, name: str, state: Mapping[str, str]) -> None:
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feeds.items())
    try:
        outputs: Any = runner.run(feeds)
    except Error:
        raise
    except Exception as problem:
        raise ExportError(
            f"the artifact does not run with {shapes}: {problem}",
            where=name,
            fix="give the sizes of its inputs in dims",
        ) from problem
    streaming.check_state(outputs, feeds, state, name)


def _peak(bench: _Bench, path: Path, feeds: Feeds) -> int | None:
    if not bench.spec.peak_rss:
        return None
    return peak_rss_bytes(Job(path=path, options=bench.options, open_=bench.open_, feeds=feeds))
