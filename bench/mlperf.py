"""What the LoadGen scenarios share: options, a queue per artifact, calibration by a probe, and rows.

The samples that LoadGen sends are single (batch 1 of the file); batches form in the queue (`batching.py`), whose
hand-over between threads is part of every latency. Artifacts are tested one after the other, each for the whole time
that a run of valid length takes, so drift of the machine between two tests is not in the interval of their ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..exporters.runner import Open, Runner, RunnerOptions
from ..optimizer.errors import RecipeError
from . import arrivals, intervals, loadgen
from .batching import Batcher, Policy
from .feeds import Feeds, MakeFeeds, checked_feeds, random_feeds
from .measure import Seconds
from .peak import Job, peak_rss_bytes
from .rows import Progress, Row, artifact_names, check_artifacts

POOL = 32
"""Different samples that requests are drawn from."""
ROUNDS = 30
"""Consecutive parts of a run that an interval resamples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a LoadGen scenario measures. `batch` stays 1: the scenario forms batches of up to `max_batch` itself.

    samples_per_query: of MultiStream. workers: threads that call the runtime, each with `threads` of its own. `logs`:
    folder for LoadGen's log files. A run shorter than 60 s and 1,500 queries is said not to be of valid length.
    """

    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    min_seconds: float = loadgen.FULL_SECONDS
    min_queries: int = loadgen.FULL_QUERIES
    max_batch: int = 8
    max_delay_ms: float = 1.0
    workers: int = 1
    samples_per_query: int = 8
    probe_seconds: float = 1.0
    seed: int = 0
    kernels: bool = True
    peak_rss: bool = True
    dims: Mapping[str, int] = field(default_factory=dict)
    feeds: MakeFeeds | None = None
    logs: Path | None = None

    def __post_init__(self) -> None:
        if tuple(self.batch) != (1,):
            what = f"batch={list(self.batch)}, but this scenario forms batches itself"
            raise RecipeError(what, where="bench", fix="use --max-batch or --samples-per-query")
        for name in ("min_seconds", "min_queries", "samples_per_query", "probe_seconds"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name}={getattr(self, name)} is not positive", where="bench", fix="raise it")
        if not self.threads or min(self.threads) < 0:
            raise RecipeError(f"threads={list(self.threads)}", where="bench", fix="list numbers of at least 0")
        self.policy()

    def policy(self) -> Policy:
        return Policy(max_batch=self.max_batch, max_delay_ms=self.max_delay_ms, workers=self.workers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class System:
    """One artifact behind its queue, with the samples it is sent."""

    path: Path
    name: str
    runner: Runner
    batcher: Batcher
    pool: Sequence[Feeds]
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trial:
    """A LoadGen run of one artifact, and what else its scenario wants in the row's details."""

    system: System
    test: loadgen.Test
    result: loadgen.Result
    details: Mapping[str, object] = field(default_factory=dict)


def opened(path: Path, spec: Spec, open_: Open, threads: int, policy: Policy) -> System:
    """Return an artifact behind a running queue, which the caller closes."""
    runner = open_(path, RunnerOptions(threads=threads, kernels=spec.kernels))
    return System(
        path=path,
        name=path.name,
        runner=runner,
        batcher=Batcher(runner, policy, dims=spec.dims),
        pool=pool_of(runner, spec),
        threads=threads,
    )


def pool_of(runner: Runner, spec: Spec) -> list[Feeds]:
    """Return the samples that requests are drawn from, the same for every artifact with the same inputs."""
    if spec.feeds is not None:
        return [checked_feeds(runner, 1, spec.feeds)]
    return [random_feeds(runner, 1, spec.dims, spec.seed + index) for index in range(POOL)]


def run(test: loadgen.Test, policy: Policy, job: tuple[Sequence[Path], Spec, Open, Progress]) -> list[Row]:
    """Return a row per thread count and artifact of one scenario with fixed settings, calibrated by a probe."""
    artifacts, spec, open_, progress = job
    loadgen.module()
    check_artifacts(artifacts)
    rows: list[Row] = []
    for threads in spec.threads:
        trials: list[Trial] = []
        for path in artifacts:
            done = len(rows) + len(trials)
            progress(done / len(artifacts) / len(spec.threads), f"{test.kind.lower()} {path.name}")
            system = opened(path, spec, open_, threads, policy)
            with system.batcher:
                chosen = calibrated(test, system, spec)
                trials.append(tested(system, chosen, spec))
        rows += rows_of(trials, spec, open_)
    progress(1.0, "done")
    return rows


def tested(system: System, test: loadgen.Test, spec: Spec) -> Trial:
    """Run one LoadGen test."""
    logs = None if spec.logs is None else spec.logs / f"{test.kind.lower()}-{label(system)}"
    return Trial(system=system, test=test, result=loadgen.run(test, system.batcher, system.pool, logs))


def label(system: System) -> str:
    return f"{system.path.parent.name}-{system.path.stem}-{system.threads}"


def calibrated(test: loadgen.Test, system: System, spec: Spec) -> loadgen.Test:
    """Return the test with expectations on the safe side of what a probe of `probe_seconds` shows.

    Latency at half of the fastest query, rate at 1.5 times what a full queue does: LoadGen ends early otherwise.
    """
    clients = test.samples_per_query if test.kind != "Offline" else 4 * spec.max_batch * spec.workers
    probe = probed(system, clients, spec.probe_seconds)
    return replace(
        test,
        expected_ms=500 * float(probe.latencies.min()),
        expected_per_s=1.5 * probe.throughput_per_s,
    )


def probed(system: System, clients: int, seconds: float) -> arrivals.Load:
    """Return a short closed loop, after one that warms up; ExportError where the artifact fails."""
    answer = system.batcher.ask(system.pool[0])
    if answer.error is not None:
        raise answer.error
    clock = system.batcher.clock
    arrivals.closed_loop(system.batcher, system.pool, clients, seconds / 2, clock)
    return arrivals.closed_loop(system.batcher, system.pool, clients, seconds, clock)


def rows_of(trials: Sequence[Trial], spec: Spec, open_: Open) -> list[Row]:
    """Return the rows of one condition; the first trial is the baseline."""
    names = artifact_names([trial.system.path for trial in trials])
    return [_row(trial, trials[0], name, spec, open_) for trial, name in zip(trials, names, strict=True)]


def _row(trial: Trial, baseline: Trial, name: str, spec: Spec, open_: Open) -> Row:
    kind, result, system = trial.test.kind, trial.result, trial.system
    streams = kind in ("SingleStream", "MultiStream")
    seconds, reference = _rounds(result), _rounds(baseline.result)
    rng = np.random.default_rng([spec.seed, system.threads])
    p50 = intervals.median_interval(seconds, rng) if streams else None
    return Row(
        artifact=name,
        runtime=system.runner.name,
        scenario=kind.lower(),
        batch=system.batcher.policy.max_batch,
        threads=system.threads,
        latency_ms_p50=result.latency_ms[50],
        latency_ms_p90=result.latency_ms[90],
        latency_ms_p99=result.latency_ms[99],
        ci95=None if p50 is None else (p50[0] * 1e3, p50[1] * 1e3),
        throughput_per_s=result.throughput_per_s,
        peak_rss_bytes=_peak(trial, spec, open_),
        ratio_to_baseline=intervals.ratio(seconds, reference) if streams else None,
        ratio_ci95=intervals.ratio_interval(seconds, reference, rng) if streams else None,
        samples=seconds,
        details=_details(trial, baseline, name),
    )


def _details(trial: Trial, baseline: Trial, name: str) -> dict[str, object]:
    test, result = trial.test, trial.result
    ratio = result.throughput_per_s / baseline.result.throughput_per_s
    return {
        "valid": result.valid,
        "invalid_because": result.reason,
        "valid_length": test.full_length,
        "loadgen_version": result.version,
        "samples_per_query": test.samples_per_query if test.kind == "MultiStream" else 1,
        "scheduled_rate_per_s": test.rate_per_s if test.kind == "Server" else None,
        **_rated(trial, baseline, ratio),
        "settings": _settings(trial),
        "loadgen": dict(result.log),
        **trial.details,
        "summary": _summary(trial, name, ratio),
    }


def _rated(trial: Trial, baseline: Trial, ratio: float) -> dict[str, object]:
    """Return the ratio of throughputs where that is what the scenario measures; Server finds its interval itself."""
    if trial.test.kind == "Offline":
        return {"throughput_ratio_to_baseline": ratio, "throughput_ratio_ci95": _offline_interval(trial, baseline)}
    return {"throughput_ratio_to_baseline": ratio} if trial.test.kind == "Server" else {}


def _offline_interval(trial: Trial, baseline: Trial) -> tuple[float, float] | None:
    own, first = _paces(trial.result), _paces(baseline.result)
    if len(own) != len(first):
        return None
    found = intervals.ratio_interval(own, first, np.random.default_rng(trial.test.seed))
    return None if found is None else (1 / found[1], 1 / found[0])


def _paces(result: loadgen.Result) -> Seconds:
    """Return the seconds per sample of ROUNDS consecutive parts of a run, [rounds, 1]."""
    ends = np.array(result.finished)[:: max(1, len(result.finished) // ROUNDS)]
    return np.diff(ends)[:, None] / max(1, len(result.finished) // ROUNDS)


def _settings(trial: Trial) -> dict[str, object]:
    test, policy = trial.test, trial.system.batcher.policy
    return {
        "min_seconds": test.min_seconds,
        "min_queries": test.min_queries,
        "expected_latency_ms": test.expected_ms,
        "expected_rate_per_s": test.expected_per_s,
        "max_batch": policy.max_batch,
        "max_delay_ms": policy.max_delay_ms,
        "workers": policy.workers,
    }


def _summary(trial: Trial, name: str, ratio: float) -> str:
    test, result = trial.test, trial.result
    word = "VALID" if result.valid else f"INVALID ({result.reason})"
    if not test.full_length:
        word += f", but not a run of valid length ({loadgen.FULL_SECONDS:.0f} s and {loadgen.FULL_QUERIES:,} queries)"
    bound = f", p99 {result.latency_ms[99]:.2f} of {test.p99_ms:g} ms" if test.kind == "Server" else ""
    rate = f"{result.throughput_per_s:,.1f} samples/s{bound}, {ratio:.2f} times the first's"
    return f"{name}, LoadGen {test.kind}: {rate}; {word}."


def _rounds(result: loadgen.Result) -> Seconds:
    """Return the latencies as ROUNDS consecutive parts of equal length; one part where there are too few."""
    every = np.array(result.seconds)
    size = every.size // ROUNDS
    return every[: size * ROUNDS].reshape(ROUNDS, size) if size else every.reshape(1, -1)


def _peak(trial: Trial, spec: Spec, open_: Open) -> int | None:
    if not spec.peak_rss:
        return None
    batch, system = trial.system.batcher.policy.max_batch, trial.system
    options = RunnerOptions(threads=system.threads, kernels=spec.kernels)
    feeds = random_feeds(system.runner, batch, spec.dims, spec.seed)
    return peak_rss_bytes(Job(path=system.path, options=options, open_=open_, feeds=feeds))
