"""Scenario stages: one client, from encoded bytes to the answer, and how long each stage of that takes.

Requests go through the queue that a server would have. `queue` is all of a request's stay there outside the runtime:
the hand-over to the worker, waiting, and the way back. The runtime of a CPU has no transfers, so host_to_device and
device_to_host are absent, not zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..exporters.runner import Open, RunnerOptions
from ..optimizer.errors import RecipeError
from . import intervals
from .batching import Batcher, Policy
from .measure import Clock, Samples, Sampling, sample
from .pipeline import Pipeline, feeds_of, output_of, resolve
from .rows import Progress, Row, artifact_names, check_artifacts, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """pipeline: "path.py:function", relative to the current folder, or a Pipeline. batch stays 1: an item at a time."""

    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    pipeline: str | Pipeline = ""
    min_seconds: float = 5.0
    seed: int = 0
    kernels: bool = True
    dims: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if tuple(self.batch) != (1,):
            raise RecipeError(f"batch={list(self.batch)}", where="bench", fix="stages runs one item at a time")

    def sampling(self) -> Sampling:
        return Sampling(min_seconds=self.min_seconds, max_seconds=max(60.0, 2 * self.min_seconds), seed=self.seed)


def run(
    artifacts: Sequence[Path],
    spec: Spec,
    open_: Open,
    progress: Progress = silent,
    clock: Clock = time.perf_counter,
) -> list[Row]:
    """Return a row per thread count and artifact, with stages; the artifacts alternate (`measure.sample`)."""
    check_artifacts(artifacts)
    if not spec.pipeline:
        what = "the scenario stages needs to know what happens around the model"
        raise RecipeError(what, where="--pipeline", fix="name path.py:function")
    pipeline = resolve(spec.pipeline, Path.cwd()) if isinstance(spec.pipeline, str) else spec.pipeline
    rows: list[Row] = []
    for threads in spec.threads:
        progress(len(rows) / len(artifacts) / len(spec.threads), f"stages, {threads} thread{'s' * (threads != 1)}")
        options = RunnerOptions(threads=threads, kernels=spec.kernels)
        services = [
            _Service(pipeline, Batcher(open_(path, options), Policy(), clock=clock), clock) for path in artifacts
        ]
        samples = sample([service.call for service in services], spec.sampling(), clock)
        for service in services:
            service.batcher.close()
        rows += _rows(artifact_names(artifacts), services, samples, (spec, threads))
    progress(1.0, "done")
    return rows


class _Service:
    """One artifact within its pipeline; keeps the seconds of every stage of every call."""

    def __init__(self, pipeline: Pipeline, batcher: Batcher, clock: Clock) -> None:
        self.batcher = batcher
        self.seconds: list[dict[str, float]] = []
        self._pipeline, self._clock = pipeline, clock

    def call(self) -> object:
        """Answer the next item."""
        took: dict[str, float] = {}
        item = self._pipeline.items[len(self.seconds) % len(self._pipeline.items)]
        value = self._through(self._pipeline.before, item, took)
        at = self._clock()
        answer = self.batcher.ask(feeds_of(value, self.batcher.runner))
        if answer.error is not None:
            raise answer.error
        took["compute"] = answer.finished - answer.started
        took["queue"] = self._clock() - at - took["compute"]
        found = self._through(self._pipeline.after, output_of(answer.outputs), took)
        self.seconds.append(took)
        return found

    def _through(
        self, stages: Mapping[str, Callable[[object], object]], value: object, took: dict[str, float]
    ) -> object:
        for name, stage in stages.items():
            at = self._clock()
            value = stage(value)
            took[name] = self._clock() - at
        return value

    def medians_ms(self, count: int) -> dict[str, float]:
        """Return the median of each stage over the last `count` calls: those before were warm-up."""
        kept = self.seconds[-count:]
        order = (*self._pipeline.before, "queue", "compute", *self._pipeline.after)
        return {name: 1e3 * float(np.median([took[name] for took in kept])) for name in order}


def _rows(names: Sequence[str], services: Sequence[_Service], samples: Samples, of: tuple[Spec, int]) -> list[Row]:
    return [_row(name, (services[index], index), samples, of) for index, name in enumerate(names)]


def _row(name: str, which: tuple[_Service, int], samples: Samples, of: tuple[Spec, int]) -> Row:
    (service, index), (spec, threads) = which, of
    seconds, baseline = samples.seconds[index], samples.seconds[0]
    p50, p90, p99 = (float(value) for value in 1e3 * np.percentile(seconds, [50, 90, 99]))
    rng = np.random.default_rng([spec.seed, threads])
    interval = intervals.median_interval(seconds, rng)
    stages = service.medians_ms(seconds.size)
    return Row(
        artifact=name,
        runtime=service.batcher.runner.name,
        scenario="stages",
        batch=1,
        threads=threads,
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p99=p99,
        ci95=None if interval is None else (interval[0] * 1e3, interval[1] * 1e3),
        throughput_per_s=seconds.size / float(seconds.sum()),
        peak_rss_bytes=None,
        ratio_to_baseline=intervals.ratio(seconds, baseline),
        ratio_ci95=intervals.ratio_interval(seconds, baseline, rng),
        samples=seconds,
        stable=samples.stable,
        waited=samples.waited,
        stages=stages,
        details=_details(name, stages, p50),
    )


def _details(name: str, stages: Mapping[str, float], end_to_end: float) -> dict[str, object]:
    share, slowest = sum(stages.values()) / end_to_end, max(stages, key=lambda stage: stages[stage])
    shown = ", ".join(f"{stage} {milliseconds:.3f}" for stage, milliseconds in stages.items())
    return {
        "dominant_stage": slowest,
        "stage_sum_to_end_to_end": share,
        "stage_sum_within_10_percent": bool(abs(share - 1) <= 0.1),
        "summary": f"{name}, median ms: {shown}; most in {slowest}; sum {100 * share:.0f} % of end to end.",
    }
