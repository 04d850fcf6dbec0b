"""What every scenario measures: a row per artifact and condition, and what the artifacts are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..optimizer.errors import InputError
from . import intervals
from .intervals import Interval
from .measure import Seconds

Progress: TypeAlias = Callable[[float, str], None]
"""Called with the done fraction, 0..1, and what is measured next."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One artifact under one condition. `samples`: seconds of every run or query, (rounds, per round).

    `ratio_to_baseline` is latency over the first artifact's latency: below 1 is faster; over several processes that of
    least latencies, which what else the machine does moves least (`intervals`). `ci95` is the interval of the p50 in
    ms. `throughput_per_s` counts samples (batch x runs) over the time spent on them. `stable` is False where the
    warm-up ran out of time before latencies settled; `waited` is the share of time without a core. `runtime` is the
    runner's name, which says whether our kernels computed packed layers. `batch` is the largest batch where the
    scenario forms batches itself. `energy_j` is joules per sample, idle subtracted, None where no meter is. `stages` is
    the median milliseconds of each stage of a request, None where a scenario has one stage. `details` holds what only
    this scenario measures, with units in the keys.
    """

    artifact: str
    runtime: str
    scenario: str
    batch: int
    threads: int
    latency_ms_p50: float
    latency_ms_p90: float
    latency_ms_p99: float
    ci95: Interval | None
    throughput_per_s: float
    peak_rss_bytes: int | None
    ratio_to_baseline: float | None
    ratio_ci95: Interval | None
    samples: Seconds
    stable: bool = True
    waited: float | None = None
    energy_j: float | None = None
    stages: Mapping[str, float] | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    def report(self) -> dict[str, object]:
        """Return the row of report.json: its keys in their order, `quantiles_ms`, `details` where there are any."""
        keys = (*ROW_KEYS, "quantiles_ms", "details") if self.details else (*ROW_KEYS, "quantiles_ms")
        values = ((key, getattr(self, key)) for key in keys)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values}

    @property
    def quantiles_ms(self) -> list[float] | None:
        """Return the latency that 0, 1, ... 100 % of the samples do not exceed: what a page draws a distribution from.

        Milliseconds, to the nanosecond of the clock; None where there are no samples.
        """
        if not self.samples.size:
            return None
        return [round(float(value) * 1e3, 6) for value in np.percentile(self.samples, range(101))]


ROW_KEYS = (
    *("artifact", "runtime", "scenario", "batch", "threads", "latency_ms_p50", "latency_ms_p90", "latency_ms_p99"),
    *("ci95", "throughput_per_s", "peak_rss_bytes", "energy_j", "stages", "ratio_to_baseline", "ratio_ci95"),
)


def against(row: Row, beside: Row, rng: np.random.Generator) -> tuple[float, Interval | None]:
    """Return the ratio of two rows that alternated in the same rounds, and its interval: over processes, if several."""
    rounds, between = (row.details.get(key) for key in ("rounds_per_process", "between_runs"))
    cuts = list(np.cumsum(rounds)[:-1]) if isinstance(rounds, list) else []
    pairs = list(zip(np.split(row.samples, cuts), np.split(beside.samples, cuts), strict=True))
    return intervals.compared(pairs, between if isinstance(between, float) else intervals.BETWEEN, rng)


def silent(_fraction: float, _text: str) -> None:
    """Report no progress."""


def artifact_names(paths: Sequence[Path]) -> list[str]:
    """Return file names; with their folder's name where two are equal. Never more of the path than that."""
    names = [path.name for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(names, paths, strict=True)
    ]


def check_artifacts(artifacts: Sequence[Path]) -> None:
    """Raise InputError where there is none, one is absent, or two could not be told apart in a table."""
    if not artifacts:
        raise InputError("there is nothing to measure", where="bench", fix="name at least one artifact")
    for path in artifacts:
        if not path.exists():
            raise InputError("there is no such artifact", where=str(path), fix="export first")
    if len(set(artifact_names(artifacts))) < len(artifacts):
        raise InputError(
            "two artifacts have the same folder and file name: " + ", ".join(artifact_names(artifacts)),
            where="bench",
            fix="rename one, so that the table can tell them apart",
        )
