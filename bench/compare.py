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

DIFFERS = 0.05
"""How far the ratio of medians may be from that of least latencies, relative, before it is told."""


def verdict(rows: Sequence[Row], reason: str = "") -> str:
    """Return one sentence per artifact, the slowest first; `reason` is added where one is slower.

    A difference counts when the whole 95 % interval lies beyond `optimizer.verdict.EQUAL_WITHIN`.
    """
    return words.speed([row.report() for row in rows], reason)


def caution(rows: Sequence[Row]) -> str:
    """Return why these numbers should not be trusted, a sentence for each reason; "" if nothing speaks against them."""
    return " ".join((*_invalid(rows), *_busy(rows), *drifts(rows)))


def drifts(rows: Sequence[Row]) -> list[str]:
    """Return one sentence for each measurement under which the machine changed."""
    found: dict[str, str] = {}
    for row in rows:
        reasons = row.details.get("drift_reasons")
        if row.details.get("drifted") and isinstance(reasons, list):
            threads = f"{row.threads or 'all'} thread{'s' * (row.threads != 1)}"
            found.setdefault("; ".join(map(str, reasons)), threads)
    return [f"The machine drifted at {threads}: {reasons}." for reasons, threads in found.items()]


def notes(rows: Sequence[Row]) -> list[str]:
    """Return what a row says that the table has no column for: medians, real time and energy, a sentence each."""
    return [sentence for row in rows for sentence in (*_typical(row), *_real_time(row), *_energy(row))]


def _invalid(rows: Sequence[Row]) -> list[str]:
    found = {row.artifact: words.doubt(row.report()) for row in rows if not row.details.get("drifted")}
    told = [f"{name}: {doubt}" for name, doubt in found.items() if doubt]
    return ["; ".join(told) + "."] if told else []


def _busy(rows: Sequence[Row]) -> list[str]:
    waited = max((row.waited or 0.0 for row in rows), default=0.0)
    if waited > BUSY:
        share = f"{100 * waited:.0f} % of the time a core was missing"
        return [f"The machine was busy: {share}; measure again on an idle one."]
    if not all(row.stable for row in rows):
        return ["Latencies had not settled when the warm-up ended; measure longer or on an idle machine."]
    return []


def _typical(row: Row) -> list[str]:
    """Say where medians tell another story than least latencies: the runs of one file differ more than the other's."""
    typical, least = row.details.get("ratio_typical"), row.ratio_to_baseline
    if not isinstance(typical, float) or least is None or abs(typical / least - 1) <= DIFFERS:
        return []
    return [f"{row.artifact} at batch {row.batch}: least latencies have the ratio {least:.2f}, medians {typical:.2f}."]


def _real_time(row: Row) -> list[str]:
    if "frame_ms" not in row.details:
        return []
    p50, p99, missed = (row.details[f"{key}"] for key in _REAL_TIME)
    name = row.artifact if row.batch == 1 else f"{row.artifact} at batch {row.batch}"
    frame = f"{name} takes {p50:.2g} of a frame of {row.details['frame_ms']:g} ms, {p99:.2g} at p99"
    return [f"{frame}, and misses {_share(missed)} of its deadlines."]


_REAL_TIME = ("real_time_factor_p50", "real_time_factor_p99", "missed_deadline_share")


def _share(value: object) -> str:
    """Return a share in per cent; three digits where two would round to all, or to 1e+02."""
    if not isinstance(value, float) or not value:
        return "none"
    return "all" if value == 1 else f"{100 * value:.{2 if value < 0.095 else 3}g} %"


def _energy(row: Row) -> list[str]:
    if row.energy_j is None:
        return []
    meter, idle, mean = (row.details.get(key) for key in ("meter", "idle_w", "mean_w"))
    energy = f"{row.artifact} takes {1e3 * row.energy_j:.3g} mJ per sample above idle at batch {row.batch}"
    return [f"{energy} ({meter}: {mean:.3g} W, idle {idle:.3g} W)."]


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
    summaries = [str(row.details["summary"]) for row in rows if "summary" in row.details]
    for sentence in (*summaries, *notes(rows), caution(rows)):
        if sentence:
            console.print(sentence, markup=False, highlight=False)


def table(rows: Sequence[Row]) -> Table:
    """Return a rich table; marks say which row did not settle, and which is not to be trusted (`verdict.doubt`)."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    marks, mixed = [_marks(row) for row in rows], len({row.scenario for row in rows}) > 1
    told = [meaning for mark, meaning in _MEANINGS.items() if any(mark in found for found in marks)]
    caption = ", ".join(told) or None
    result = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption)
    result.add_column("artifact", min_width=8, overflow="fold")
    for name in ("batch", "thr.", "p50 ms", "p90", "p99", "per s", "MB", "x baseline (95 %)"):
        result.add_column(name, justify="right", no_wrap=True)
    for row, mark in zip(rows, marks, strict=True):
        name = f"{row.artifact}, {row.scenario}" if mixed else row.artifact
        result.add_row(Text(name + mark), *_cells(row))
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
