"""Scenario server: the highest rate of Poisson arrivals whose 99th percentile holds, confirmed by LoadGen.

Our own open-loop generator brackets the rate by short probes; LoadGen's Server scenario then runs at the highest rate
that held, for the full time, and a little lower again as long as its verdict is INVALID. The throughput of a row is that
of the last LoadGen run. Latencies count from when a request was due in both, so coordinated omission is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..exporters.runner import Open
from ..optimizer.errors import InfeasibleError, RecipeError
from . import arrivals, loadgen, mlperf
from .mlperf import System, Trial
from .rows import Progress, Row, check_artifacts, silent
from .search import Bracket, bracket

PROBE_QUERIES = 800
"""Least requests of a probe: its 99th percentile is then the eighth slowest."""
STEP_DOWN = 0.97
CONFIRMATIONS = 6
LEAST_RATE = 1.0
"""Below one request per second no rate is searched for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec(mlperf.Spec):
    """As mlperf.Spec. p99_ms: the bound. concurrency: numbers of clients of a closed-loop sweep before the search.

    rate_per_s: no search; one LoadGen run at this rate. tolerance: how close the search brings a rate that holds and one
    that fails, as a share.
    """

    p99_ms: float = 15.0
    concurrency: tuple[int, ...] = ()
    rate_per_s: float | None = None
    tolerance: float = 0.03
    search_seconds: float = 4.0
    sweep_seconds: float = 3.0

    def __post_init__(self) -> None:
        mlperf.Spec.__post_init__(self)
        for name in ("p99_ms", "tolerance", "search_seconds", "sweep_seconds"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name}={getattr(self, name)} is not positive", where="bench", fix="raise it")
        if self.concurrency and min(self.concurrency) < 1:
            raise RecipeError(f"concurrency={list(self.concurrency)}", where="bench", fix="list numbers from 1 on")
        if self.rate_per_s is not None and not self.rate_per_s > 0:
            raise RecipeError(f"rate_per_s={self.rate_per_s} is not positive", where="bench", fix="raise it")


def run(artifacts: Sequence[Path], spec: Spec, open_: Open, progress: Progress = silent) -> list[Row]:
    """Return a row per thread count and artifact; InfeasibleError where not even LEAST_RATE holds the bound."""
    loadgen.module()
    check_artifacts(artifacts)
    rows: list[Row] = []
    for threads in spec.threads:
        trials: list[Trial] = []
        for path in artifacts:
            share = (len(rows) + len(trials)) / len(artifacts) / len(spec.threads)
            system = mlperf.opened(path, spec, open_, threads, spec.policy())
            with system.batcher:
                trials.append(_trial(system, spec, lambda text, at=share: progress(at, text)))  # type: ignore[misc]
        rows += _with_ratios(mlperf.rows_of(trials, spec, open_))
    progress(1.0, "done")
    return rows


def _trial(system: System, spec: Spec, say: Say) -> Trial:
    say(f"{system.name}: probe")
    capacity = mlperf.probed(system, 4 * spec.max_batch * spec.workers, spec.probe_seconds).throughput_per_s
    details: dict[str, object] = {"capacity_per_s": capacity}
    if spec.concurrency:
        details["concurrency"] = [_level(system, spec, clients, say) for clients in spec.concurrency]
    found = _searched(system, spec, capacity, say)
    test, result, tried = confirmed(system, spec, found, say)
    details["search"] = [{"rate_per_s": rate, "held": held} for rate, held in found.tried]
    details["confirmations"] = tried
    high = tried[-2]["rate_per_s"] if len(tried) > 1 else found.fails
    details["rate_bracket_per_s"] = [test.rate_per_s, high if np.isfinite(high) else None]  # type: ignore[call-overload]
    details["p99_bound_ms"] = spec.p99_ms
    return Trial(system=system, test=test, result=result, details=details)


def _searched(system: System, spec: Spec, capacity: float, say: Say) -> Bracket:
    if spec.rate_per_s is not None:
        return Bracket(holds=spec.rate_per_s, fails=float("inf"), tried=())
    ceiling, numbers = 1.1 * capacity, iter(range(10_000))

    def holds(rate: float) -> bool:
        if rate < LEAST_RATE:
            what = f"its 99th percentile is above {spec.p99_ms:g} ms at every rate from {LEAST_RATE:g} per second on"
            raise InfeasibleError(what, where=system.name, fix="raise --p99-ms")
        say(f"{system.name}: {rate:,.0f} per second")
        return rate <= ceiling and probe_holds(system, spec, rate, next(numbers))

    return bracket(holds, 0.7 * capacity, spec.tolerance)


def probe_holds(system: System, spec: Spec, rate: float, number: int) -> bool:
    """Return whether the 99th percentile of a probe at this rate stays within the bound."""
    count = max(PROBE_QUERIES, int(spec.search_seconds * rate))
    due = arrivals.poisson(rate, count, np.random.default_rng([spec.seed, number]))
    limit = max(50, int(10 * rate * spec.p99_ms * 1e-3))
    load = arrivals.open_loop(system.batcher, system.pool, due, limit)
    return not load.overloaded and not load.errors and 1e3 * float(np.percentile(load.latencies, 99)) <= spec.p99_ms


def confirmed(
    system: System, spec: Spec, found: Bracket, say: Say
) -> tuple[loadgen.Test, loadgen.Result, list[dict[str, float]]]:
    """Return the LoadGen run at the highest rate that is VALID, from `found.holds` down; the last one if none is."""
    test = loadgen.Test(
        kind="Server",
        min_seconds=spec.min_seconds,
        min_queries=spec.min_queries,
        rate_per_s=found.holds,
        p99_ms=spec.p99_ms,
        seed=spec.seed,
    )
    tried: list[dict[str, float]] = []
    while True:
        say(f"{system.name}: LoadGen at {test.rate_per_s:,.0f} per second")
        result = loadgen.run(test, system.batcher, system.pool, mlperf.log_folder(spec, test.kind, system))
        tried.append({"rate_per_s": test.rate_per_s, "valid": result.valid, "p99_ms": result.latency_ms[99]})
        if result.valid or spec.rate_per_s is not None or len(tried) == CONFIRMATIONS:
            return test, result, tried
        test = replace(test, rate_per_s=STEP_DOWN * test.rate_per_s)


def _level(system: System, spec: Spec, clients: int, say: Say) -> dict[str, object]:
    """Return throughput, latency and Little's law of so many clients that wait for their answers."""
    say(f"{system.name}: {clients} clients")
    load = arrivals.closed_loop(system.batcher, system.pool, clients, spec.sweep_seconds, system.batcher.clock)
    p50, p90, p99 = (float(value) for value in 1e3 * np.percentile(load.latencies, [50, 90, 99]))
    return {
        "clients": clients,
        "throughput_per_s": load.throughput_per_s,
        "latency_ms_p50": p50,
        "latency_ms_p90": p90,
        "latency_ms_p99": p99,
        "mean_inside": load.inside,
        "little_ratio": load.little(),
        "little_within_5_percent": abs(load.little() - 1) <= 0.05,
    }


def _with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Add to details the interval of the throughput ratio: what the brackets of the two searches allow.

    It is as wide as the rates between one that was VALID and one that was seen to fail; it is not a 95 % interval.
    """
    low, high = _ends(rows[0])
    result = []
    for row in rows:
        own = _ends(row)
        span = None if high is None or own[1] is None or low is None else [own[0] / high, own[1] / low]  # type: ignore[operator]
        result.append(replace(row, details={**row.details, "throughput_ratio_bracket": span if row is not rows[0] else [1.0, 1.0]}))
    return result
