"""Does a service stay as it is? A model under Poisson load for half an hour: errors, memory, latency by thirds.

Each window of a run (15 s) becomes one line of a file as it ends: requests, errors, percentiles from when requests were
due, resident memory. A run that was stopped goes on where it was; what counts is measured afterwards from all windows.
`python -m paredown.bench.soak model.onnx --rate 400 --out soak.jsonl`
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import psutil

from ..exporters.runner import Open
from ..optimizer.errors import InputError
from . import arrivals, mlperf
from .mlperf import System

WINDOW_SECONDS = 15.0
WARM_WINDOWS = 4
"""Windows before memory counts: allocators and caches fill in the first minute."""
MAX_GROWTH, MAX_DRIFT = 0.02, 0.10
BINS = np.geomspace(1e-5, 100.0, 1401)
"""Bounds of a histogram of latencies in seconds, 1.2 % apart: windows can be added up, and percentiles read off."""

Line: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What happened in one window. counts: latencies by bin of BINS, sparse, as [bin, count]."""

    started: float
    seconds: float
    requests: int
    errors: int
    stopped: bool
    latency_ms_p50: float
    latency_ms_p99: float
    rss_bytes: int
    counts: tuple[tuple[int, int], ...]


def windows(system: System, rate: float, seed: int, count: int) -> Iterator[Window]:
    """Yield `count` windows of open-loop Poisson load at `rate` requests per second."""
    rng, process = np.random.default_rng(seed), psutil.Process()
    for _ in range(count):
        started = time.time()
        due = arrivals.poisson(rate, max(1, round(rate * WINDOW_SECONDS)), rng)
        load = arrivals.open_loop(system.batcher, system.pool, due, arrivals.Stop(inside=max(1000, int(5 * rate))))
        yield _window(load, started, process.memory_info().rss)


def judged(lines: Sequence[Line]) -> dict[str, object]:
    """Return the verdict on all windows: no error, RSS growth and drift of the p99 within their limits.

    RSS growth: the median of the last tenth of the windows over that of the tenth after the warm-up. Drift: the p99 of
    all requests in the last third over that in the first. Raises InputError with fewer than 12 windows.
    """
    if len(lines) < 3 * WARM_WINDOWS:
        what = f"{len(lines)} windows of {WINDOW_SECONDS:g} s are too few"
        raise InputError(what, where="soak", fix=f"run {3 * WARM_WINDOWS} or more")
    rss = np.array([float(str(line["rss_bytes"])) for line in lines])
    part, third = max(1, len(lines) // 10), len(lines) // 3
    growth = float(np.median(rss[-part:]) / np.median(rss[WARM_WINDOWS : WARM_WINDOWS + part])) - 1
    first, last = percentile(lines[:third], 99), percentile(lines[-third:], 99)
    errors = sum(int(str(line["errors"])) for line in lines)
    overloaded = any(bool(line["stopped"]) for line in lines)
    return {
        "windows": len(lines),
        "seconds": sum(float(str(line["seconds"])) for line in lines),
        "requests": sum(int(str(line["requests"])) for line in lines),
        "errors": errors,
        "overloaded": overloaded,
        "rss_growth": growth,
        "p99_ms_first_third": 1e3 * first,
        "p99_ms_last_third": 1e3 * last,
        "p99_drift": last / first - 1,
        "passed": not errors and not overloaded and growth <= MAX_GROWTH and abs(last / first - 1) <= MAX_DRIFT,
    }


def percentile(lines: Sequence[Line], percent: float) -> float:
    """Return a percentile of the latencies of several windows, in seconds; from a histogram, good to 1.2 %."""
    total = np.zeros(len(BINS) + 1)
    for line in lines:
        for place, count in line["counts"]:  # type: ignore[attr-defined]
            total[place] += count
    index = int(np.searchsorted(np.cumsum(total), percent / 100 * total.sum()))
    return float(BINS[min(index, len(BINS) - 1)])


def read(path: Path, setting: Line) -> list[dict[str, object]]:
    """Return the windows of a file that an earlier run began; InputError if that ran something else.

    A last line that was cut off when the run was stopped is left out.
    """
    if not path.exists():
        return []
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n")[:-1]]
    if lines and lines[0] != {"setting": setting}:
        raise InputError("it holds a run with other settings", where=str(path), fix="name another --out")
    return lines[1:]


def soak(path: Path, spec: mlperf.Spec, open_: Open, of: tuple[float, float, Path]) -> dict[str, object]:
    """Run or go on with a soak of (rate, seconds, file of windows); return the verdict."""
    rate, seconds, out = of
    setting: Line = {"artifact": path.name, "rate_per_s": rate, "policy": asdict(spec.policy())}
    found, count = read(out, setting), round(seconds / WINDOW_SECONDS)
    text = "".join(json.dumps(line) + "\n" for line in ({"setting": setting}, *found))
    out.write_text(text, encoding="utf-8")
    system = mlperf.opened(path, spec, open_, spec.threads[0], spec.policy())
    with system.batcher, out.open("a", encoding="utf-8") as file:
        mlperf.probed(system, 1, spec.probe_seconds)
        for window in windows(system, rate, spec.seed + len(found), count - len(found)):
            file.write(json.dumps(asdict(window)) + "\n")
            file.flush()
    return {**setting, **judged(read(out, setting))}


def _window(load: arrivals.Load, started: float, rss: int) -> Window:
    places, counts = np.unique(np.searchsorted(BINS, load.latencies), return_counts=True)
    p50, p99 = (float(value) for value in 1e3 * np.percentile(load.latencies, [50, 99]))
    return Window(
        started=started,
        seconds=load.seconds,
        requests=len(load.latencies),
        errors=load.errors,
        stopped=load.stopped,
        latency_ms_p50=p50,
        latency_ms_p99=p99,
        rss_bytes=rss,
        counts=tuple((int(place), int(count)) for place, count in zip(places, counts, strict=True)),
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paredown.bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--max-delay-ms", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"), help="file of windows, gone on with")
    return parser.parse_args()


def _main() -> dict[str, object]:
    from ..exporters import onnx

    chosen = _options()
    spec = mlperf.Spec(max_batch=chosen.max_batch, max_delay_ms=chosen.max_delay_ms, workers=chosen.workers)
    return soak(chosen.artifact, spec, onnx.open, (chosen.rate, chosen.seconds, chosen.out))


if __name__ == "__main__":
    verdict = _main()
    print(json.dumps(verdict, indent=1))
    raise SystemExit(0 if verdict["passed"] else 1)
