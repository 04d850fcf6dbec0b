"""What two reports are compared by: results that no machine changes, and speeds that one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import report_format as fmt
from .report_summary import Line, label, lines
from .report_value import Interval, Report, interval, number, rows, text
from .verdict import condition, doubt, is_bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A value as text, and its 95 % interval where it has one."""

    shown: str
    ci95: Interval | None = None


_MEASURES: tuple[tuple[str, str, str, Callable[[float | None], str]], ...] = (
    ("latency p50", "latency_ms_p50", "ci95", fmt.milliseconds),
    ("latency p99", "latency_ms_p99", "", fmt.milliseconds),
    ("samples per s", "throughput_per_s", "", lambda value: fmt.plain(value, 4)),
    ("load held, per s", "details.scheduled_per_s", "", lambda value: fmt.plain(value, 4)),
    ("times the original", "ratio_to_baseline", "ratio_ci95", fmt.times),
    ("peak memory", "peak_rss_bytes", "", fmt.size),
    ("energy", "energy_j", "", fmt.joules),
)
"""Name, key, key of the interval, and how it is shown."""
_OF_SPEED = ("latency", "peak memory", "load held")


def result_cells(report: Report) -> list[tuple[str, str]]:
    """Return metric and sizes with their changes; speed is among `speed_cells`."""
    if is_bench(report):
        return []
    found = [line for line in lines(report) if not line.label.startswith(_OF_SPEED)]
    return [cell for line in found for cell in _cells(line)]


def speed_cells(report: Report) -> dict[str, Cell]:
    """Return latency, throughput, memory and energy of each artifact under each condition, by a name for people."""
    return {
        ", ".join(part for part in (measure, text(row, "artifact"), condition(row)) if part): cell
        for row in rows(report, "bench")
        for measure, key, ends, show in _MEASURES
        if (cell := _cell(row, key, ends, show)) is not None
    }


def differs(first: Cell | None, second: Cell | None) -> str:
    """Return the mark of a line: "*" where values differ, in words where only noise may set them apart."""
    if first is None or second is None or first.shown == second.shown:
        return "" if first is not None and second is not None else "*"
    if first.ci95 is None or second.ci95 is None:
        return "*"
    apart = first.ci95[1] < second.ci95[0] or second.ci95[1] < first.ci95[0]
    return "*" if apart else "within intervals"


def _cell(row: Report, key: str, ends: str, show: Callable[[float | None], str]) -> Cell | None:
    value = number(row, *key.split("."))
    if value is None:
        return None
    doubtful = doubt(row, briefly=True)
    found = interval(row, ends) if ends else None
    shown = show(value) + (f" ({fmt.span(found)})" if found else "") + (f", {doubtful}" if doubtful else "")
    return Cell(shown=shown, ci95=found)


def _cells(line: Line) -> list[tuple[str, str]]:
    after = f"{line.after} ({line.after_note})" if line.after_note else line.after
    change = f"{line.change} ({line.change_note})" if line.change_note else line.change
    return [(label(line), after), (f"{label(line)}, change", change)]
