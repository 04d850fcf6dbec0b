"""Bench rows as a verdict, a table, JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..optimizer import report
from ..optimizer import verdict as words
from .rows import ROW_KEYS, Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BUSY = 0.05
"""Share of the time without a core above which we warn. At 0.5 a true ratio of 0.35 came out as 0.17 to 0.18."""


def verdict(rows: Sequence[Row], reason: str = "") -> str:
    """Return one sentence per artifact, the slowest first; `reason` is added where one is slower.

    A difference counts when the whole 95 % interval lies beyond `optimizer.verdict.EQUAL_WITHIN`.
    """
    return words.speed([row.report() for row in rows], reason)


def caution(rows: Sequence[Row]) -> str:
    """Return why these numbers should not be trusted, in one sentence; "" if nothing speaks against them."""
    doubts = {row.artifact: found for row in rows if (found := words.doubt(row.report()))}
    if doubts:
        return "; ".join(f"{name}: {found}" for name, found in doubts.items()) + "."
    waited = max((row.waited or 0.0 for row in rows), default=0.0)
    if waited > BUSY:
        return (
            f"The machine was busy: {100 * waited:.0f} % of the time a core was missing; measure again on an idle one."
        )
    if not all(row.stable for row in rows):
        return "Latencies had not settled when the warm-up ended; measure longer or on an idle machine."
    return ""


def write(rows: Sequence[Row], folder: Path, environment: Mapping[str, object]) -> tuple[Path, Path]:
    """Write bench.json (rows, every sample in ms by round, the machine) and bench.csv; return their paths.

    Beside them are bench.html, the page of these rows, and a line more in history.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": words.BENCH_SCHEMA,
        "verdict": verdict(rows),
        "caution": caution(rows),
        "environment": dict(environment),
        "rows": [
            row.report() | {"stable": row.stable, "waited": row.waited, "samples_ms": _samples_ms(row)} for row in rows
        ],
    }
    json_path, csv_path = folder / "bench.json", folder / "bench.csv"
    json_path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_KEYS)
        writer.writerows(_csv_row(row) for row in rows)
    found = report.of_bench([row.report() for row in rows], environment, caution(rows))
    report.write_page(found, folder / "bench.html")
    return json_path, csv_path


CSV_KEYS = (
    *("artifact", "runtime", "scenario", "batch", "threads", "latency_ms_p50", "latency_ms_p90", "latency_ms_p99"),
    *("latency_ms_p50_low", "latency_ms_p50_high", "throughput_per_s", "peak_rss_bytes", "energy_j"),
    *("ratio_to_baseline", "ratio_low", "ratio_high", "runs", "stable", "waited"),
)


def show(rows: Sequence[Row], console: Console, reason: str = "") -> None:
    """Print the verdict, then the table."""
    console.print(verdict(rows, reason), markup=False, highlight=False)
    console.print(table(rows))
    if caution(rows):
        console.print(caution(rows), markup=False, highlight=False)


def table(rows: Sequence[Row]) -> Table:
    """Return a rich table; marks say which row did not settle, and which is not to be trusted (`verdict.doubt`)."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    marks = [_marks(row) for row in rows]
    told = [meaning for mark, meaning in _MEANINGS.items() if any(mark in found for found in marks)]
    caption = ", ".join(told) or None
    result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption)
    result.add_column("artifact", min_width=8, overflow="fold")
    for name in ("batch", "thr.", "p50 ms", "p90", "p99", "per s", "MB", "x baseline (95 %)"):
        result.add_column(name, justify="right", no_wrap=True)
    for row, mark in zip(rows, marks, strict=True):
        result.add_row(Text(row.artifact + mark), *_cells(row))
    return result


_MEANINGS = {"*": "* did not settle during the warm-up", "!": "! not VALID, or clocks drifted"}


def _marks(row: Row) -> str:
    return "*" * (not row.stable) + "!" * bool(words.doubt(row.report(), briefly=True))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row.batch),
        str(row.threads or "all"),
        f"{row.latency_ms_p50:.3f}",
        f"{row.latency_ms_p90:.3f}",
        f"{row.latency_ms_p99:.3f}",
        f"{row.throughput_per_s:,.0f}",
        "-" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:.0f}",
        "-" if row.ratio_to_baseline is None else f"{row.ratio_to_baseline:.2f} ({_range(row.ratio_ci95)})",
    )


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.2f}..{interval[1]:.2f}"


def _samples_ms(row: Row) -> list[list[float]]:
    """Return milliseconds by round, to the nanosecond, which is the resolution of the clock."""
    return [[round(float(second) * 1e3, 6) for second in burst] for burst in row.samples]


def _csv_row(row: Row) -> list[object]:
    low, high = row.ci95 or (None, None)
    ratio_low, ratio_high = row.ratio_ci95 or (None, None)
    values = {key: getattr(row, key) for key in ROW_KEYS} | {
        "latency_ms_p50_low": low,
        "latency_ms_p50_high": high,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "runs": row.samples.size,
        "stable": row.stable,
        "waited": row.waited,
    }
    return [values[key] for key in CSV_KEYS]
