"""Scenario server: the highest rate of Poisson arrivals whose 99th percentile holds, confirmed by LoadGen.

Our own open-loop generator searches that rate by short probes, several times, the artifacts in turn: their spread
is the interval of the ratio. LoadGen's Server scenario then runs at the middle of the rates that held, for the full
time, and a little lower again as long as its verdict is INVALID. The throughput of a row is that of the last LoadGen
run. Latencies count from when a request was due in both, so coordinated omission is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from ..exporters.runner import Open
from ..optimizer.errors import InfeasibleError, RecipeError
from . import arrivals, intervals, loadgen, mlperf
from .mlperf import System, Trial
from .rows import Progress, Row, check_artifacts, silent
from .search import Bracket, bracket

PROBE_QUERIES = 800
"""Least requests of a probe, which holds the bound where eight of them do not; more in proportion."""
STEP_DOWN = 0.97
CONFIRMATIONS = 6
LEAST_SHARE = 0.02
"""Of the throughput of a full queue, the lowest rate that is tried: fewer requests no longer meet each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec(mlperf.Spec):
    """As mlperf.Spec. p99_ms: the bound. concurrency: numbers of clients of a closed-loop sweep before the search.

    rate_per_s: no search; one LoadGen run at this rate. searches: how often the rate is searched; the interval of the
    ratio needs five. tolerance: how close a search brings a rate that holds and one that fails, as a share.
    """

    p99_ms: float = 15.0
    concurrency: tuple[int, ...] = ()
    rate_per_s: float | None = None
    searches: int = 6
    tolerance: float = 0.03
    search_seconds: float = 4.0
    sweep_seconds: float = 3.0

    def __post_init__(self) -> None:
        mlperf.Spec.__post_init__(self)
        for name in ("p99_ms", "searches", "tolerance", "search_seconds", "sweep_seconds"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name}={getattr(self, name)} is not positive", where="bench", fix="raise it")
        if self.concurrency and min(self.concurrency) < 1:
            raise RecipeError(f"concurrency={list(self.concurrency)}", where="bench", fix="list numbers from 1 on")
        if self.rate_per_s is not None and not self.rate_per_s > 0:
            raise RecipeError(f"rate_per_s={self.rate_per_s} is not positive", where="bench", fix="raise it")


def run(artifacts: Sequence[Path], spec: Spec, open_: Open, progress: Progress = silent) -> list[Row]:
    """Return a row per thread count and artifact; InfeasibleError where no rate holds the bound."""
    loadgen.module()
    check_artifacts(artifacts)
    rows: list[Row] = []
    for count, threads in enumerate(spec.threads):
        with contextlib.ExitStack() as stack:
            systems = [mlperf.opened(path, spec, open_, threads, spec.policy()) for path in artifacts]
            for system in systems:
                stack.enter_context(system.batcher)
            trials = _trials(systems, spec, _Steps(progress, count / len(spec.threads), 1 / len(spec.threads)))
        rows += mlperf.rows_of(trials, spec, open_)
    progress(1.0, "done")
    return rows


def _trials(systems: Sequence[System], spec: Spec, steps: _Steps) -> list[Trial]:
    details = [_swept(system, spec, steps) for system in systems]
    found = [[_given(spec.rate_per_s)] for _ in systems] if spec.rate_per_s else searched(systems, spec, steps)
    rates = [[step.holds for step in each] for each in found]
    trials = []
    for index, system in enumerate(systems):
        steps.say(0.6 + 0.4 * index / len(systems), f"{system.name}: LoadGen Server")
        trial, tried = confirmed(system, spec, float(np.median(rates[index])))
        more = {
            "p99_bound_ms": spec.p99_ms,
            "searched_rates_per_s": rates[index],
            "probes": [{"rate_per_s": rate, "held": held} for each in found[index] for rate, held in each.tried],
            "confirmations": tried,
        }
        trials.append(replace(trial, details={**details[index], **more}))
    return [_with_interval(trial, trials[0], rates[index], rates[0]) for index, trial in enumerate(trials)]


def searched(systems: Sequence[System], spec: Spec, steps: _Steps) -> list[list[Bracket]]:
    """Return the brackets that `searches` searches found of each system, the systems in turn."""
    found: list[list[Bracket]] = [[] for _ in systems]
    capacities = [_capacity(system, spec) for system in systems]
    starts = [0.7 * capacity for capacity in capacities]
    for number in range(spec.searches):
        for index, system in enumerate(systems):
            steps.say(0.1 + 0.5 * number / spec.searches, f"{system.name}: search {number + 1} of {spec.searches}")
            holds = Probe(system=system, spec=spec, number=number, least=LEAST_SHARE * capacities[index])
            found[index].append(bracket(holds, starts[index], spec.tolerance))
            starts[index] = float(np.median([each.holds for each in found[index]]))
    return found


def confirmed(system: System, spec: Spec, rate: float) -> tuple[Trial, list[dict[str, float]]]:
    """Return the LoadGen run at the highest rate that is VALID, from `rate` down; the last one if none is."""
    tried: list[dict[str, float]] = []
    while True:
        trial = mlperf.tested(system, _test(spec, rate), spec)
        valid, p99_ms = trial.result.valid, trial.result.latency_ms[99]
        tried.append({"rate_per_s": rate, "valid": valid, "p99_ms": p99_ms})
        if valid or spec.rate_per_s is not None or len(tried) == CONFIRMATIONS:
            return trial, tried
        rate *= STEP_DOWN


@dataclass(frozen=True, slots=True)
class _Steps:
    """Progress of one thread count: its share of the whole begins at `base` and is `part` long."""

    progress: Progress
    base: float
    part: float

    def say(self, share: float, text: str) -> None:
        self.progress(self.base + self.part * share, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a rate holds: one open-loop run. The search `number` gives each rate arrivals of its own.

    Raises InfeasibleError below the rate `least`.
    """

    system: System
    spec: Spec
    number: int
    least: float

    def __call__(self, rate: float) -> bool:
        spec, system = self.spec, self.system
        if rate < self.least:
            what = f"its 99th percentile is above {spec.p99_ms:g} ms even at {2 * rate:.1f} requests per second"
            raise InfeasibleError(what, where=system.name, fix="raise --p99-ms, or measure on an idle machine")
        count = max(PROBE_QUERIES, int(spec.search_seconds * rate))
        due = arrivals.poisson(rate, count, np.random.default_rng([spec.seed, self.number, int(1000 * rate)]))
        bound = 1e-3 * spec.p99_ms
        stop = arrivals.Stop(inside=max(50, int(10 * rate * bound)), bound=bound, late=count // 100)
        load = arrivals.open_loop(system.batcher, system.pool, due, stop)
        late = int(np.count_nonzero(load.latencies > bound))
        return not load.stopped and not load.errors and late <= stop.late


def _given(rate: float) -> Bracket:
    return Bracket(holds=rate, fails=float("inf"), tried=())


def _capacity(system: System, spec: Spec) -> float:
    return mlperf.probed(system, 4 * spec.max_batch * spec.workers, spec.probe_seconds).throughput_per_s


def _test(spec: Spec, rate: float) -> loadgen.Test:
    return loadgen.Test(
        kind="Server",
        min_seconds=spec.min_seconds,
        min_queries=spec.min_queries,
        rate_per_s=rate,
        p99_ms=spec.p99_ms,
        seed=spec.seed,
    )


def _swept(system: System, spec: Spec, steps: _Steps) -> dict[str, object]:
    if not spec.concurrency:
        return {}
    steps.say(0.0, f"{system.name}: {len(spec.concurrency)} numbers of clients")
    mlperf.probed(system, 1, spec.probe_seconds)
    return {"concurrency": [level(system, clients, spec.sweep_seconds) for clients in spec.concurrency]}


def level(system: System, clients: int, seconds: float) -> dict[str, object]:
    """Return throughput, latency and Little's law of so many clients that wait for their answers."""
    load = arrivals.closed_loop(system.batcher, system.pool, clients, seconds, system.batcher.clock)
    p50, p90, p99 = (float(value) for value in 1e3 * np.percentile(load.latencies, [50, 90, 99]))
    return {
        "clients": clients,
        "throughput_per_s": load.throughput_per_s,
        "latency_ms_p50": p50,
        "latency_ms_p90": p90,
        "latency_ms_p99": p99,
        "mean_inside": load.inside,
        "little_ratio": load.little(),
        "little_within_5_percent": bool(abs(load.little() - 1) <= 0.05),
    }


def _with_interval(trial: Trial, first: Trial, rates: Sequence[float], baseline: Sequence[float]) -> Trial:
    ratio = trial.result.throughput_per_s / first.result.throughput_per_s
    return replace(trial, details={**trial.details, "throughput_ratio_ci95": ratio_interval(rates, baseline, ratio)})


def ratio_interval(rates: Sequence[float], baseline: Sequence[float], ratio: float) -> list[float] | None:
    """Return the interval of a throughput ratio: Student's t of the log ratios of paired searches.

    Widened to hold `ratio`, that of the confirmed runs, which step down in steps of their own. None with fewer than
    five searches.
    """
    if len(rates) < intervals.MIN_ROUNDS:
        return None
    logs = np.log(np.array(rates) / np.array(baseline))
    half = float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / np.sqrt(len(logs)))
    low, high = float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))
    return [min(low, ratio), max(high, ratio)]
