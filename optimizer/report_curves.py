"""The curves of report.html: latency distributions, throughput against latency, history across runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import report_format as fmt
from .history import History, letters
from .report_plot import TONES, Curve, Dot, Frame, Plot, plot
from .report_value import Report, at, interval, number, rows, text
from .verdict import condition, doubt

MOST_LINES, MOST_RUNS = 8, 40
"""What a chart of the history, and its table, show at most: the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Throughput against latency under one condition, and a row of the table under it per artifact."""

    plot: Plot
    rows: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The history of a folder: charts, and a row of the table per run, the newest first."""

    plots: tuple[Plot, ...]
    rows: tuple[dict[str, str], ...]
    machines: tuple[tuple[str, str], ...]
    note: str


def by_condition(bench: Sequence[Report]) -> dict[str, list[Report]]:
    """Return the bench rows of each condition, in their order."""
    return {name: [row for row in bench if condition(row) == name] for name in dict.fromkeys(map(condition, bench))}


def tones(bench: Sequence[Report]) -> dict[str, int]:
    """Return the colour of each artifact: 0 for the first, which is the original."""
    names = dict.fromkeys(text(row, "artifact") for row in bench)
    return {name: index if index < TONES else 1 + (index - 1) % (TONES - 1) for index, name in enumerate(names)}


def distributions(bench: Sequence[Report]) -> list[Plot]:
    """Return the share of runs by latency per condition, up to p99; [] where no row has quantiles."""
    colours, found = tones(bench), []
    for name, group in by_condition(bench).items():
        curves = [curve for row in group if (curve := _distribution(row, colours)) is not None]
        if curves:
            frame = Frame(title=name or "latency", x_label="latency (ms)", y_label="% of runs", y_range=(0.0, 100.0))
            found.append(plot(frame, curves))
    return found


def loads(bench: Sequence[Report]) -> list[Load]:
    """Return throughput against p99 latency per condition, from sweeps and probes; [] where no row has them."""
    colours, found = tones(bench), []
    for name, group in by_condition(bench).items():
        curves = [curve for row in group if (curve := _load(row, colours)) is not None]
        if curves:
            target = next((ms for row in group if (ms := number(row, "details", "target_p99_ms"))), None)
            frame = Frame(
                title=name or "load",
                x_label="answers per s",
                y_label="p99 latency (ms)",
                x_range=(0.0, 0.0),
                log_y=True,
                rule=target,
                rule_label=f"target {fmt.plain(target)} ms" if target else "",
            )
            found.append(Load(plot=plot(frame, curves), rows=tuple(map(_load_row, group))))
    return found


def runs(history: History) -> Runs | None:
    """Return the charts of a history; None with fewer than two runs."""
    entries = history.entries
    if len(entries) < 2:
        return None
    names = letters(entries)
    metric = next((name for item in reversed(entries) if (name := text(item, "metric_name"))), "metric")
    charts = (
        _series(metric, _scalar(entries, names, "metric")),
        _series("weights on disk (kB)", _scalar(entries, names, "size_bytes", 1e-3)),
        _series("latency over the original's", _measured(entries, names, "ratio_to_baseline")),
        _series("answers per s", _measured(entries, names, "throughput_per_s")),
    )
    note = f"{history.unreadable} lines of history.jsonl could not be read." if history.unreadable else ""
    return Runs(
        plots=tuple(chart for chart in charts if chart is not None),
        rows=tuple(run_row(index, item, names) for index, item in list(enumerate(entries, 1))[: -MOST_RUNS - 1 : -1]),
        machines=tuple(machines(entries, names)),
        note=note,
    )


def _distribution(row: Report, colours: Mapping[str, int]) -> Curve | None:
    quantiles = at(row, "quantiles_ms")
    values = [number({"value": item}, "value") for item in quantiles] if isinstance(quantiles, list | tuple) else []
    known = [value for value in values if value is not None]
    if len(values) != 101 or len(known) != 101:
        return None
    points = tuple((value, float(share)) for share, value in enumerate(known[:100]))
    note = (
        f"p50 {fmt.milliseconds(known[50])}, p99 {fmt.milliseconds(known[99])}, slowest {fmt.milliseconds(known[100])}"
    )
    return Curve(label=_name(row), tone=colours[text(row, "artifact")], points=points, note=note)


def _name(row: Report) -> str:
    doubtful = doubt(row, briefly=True)
    return (text(row, "artifact") or fmt.DASH) + (f", {doubtful}" if doubtful else "")


def _load(row: Report, colours: Mapping[str, int]) -> Curve | None:
    sweep = [_step(item, "throughput_per_s", number(item, "concurrency")) for item in rows(row, "details", "sweep")]
    probes = [_probe(item) for item in rows(row, "details", "probes")]
    line = [dot for dot in sweep if dot is not None]
    dots = (*line, *(dot for dot in probes if dot is not None))
    if not dots:
        return None
    points = tuple((dot.x, dot.y) for dot in line)
    return Curve(label=_name(row), tone=colours[text(row, "artifact")], points=points, dots=dots)


def _step(item: Report, key: str, concurrency: float | None) -> Dot | None:
    x, y = number(item, key), number(item, "latency_ms_p99")
    if x is None or y is None or y <= 0:
        return None
    return Dot(x=x, y=y, label="" if concurrency is None else f"{concurrency:g}")


def _probe(item: Report) -> Dot | None:
    dot = _step(item, "scheduled_per_s", None)
    return None if dot is None else Dot(x=dot.x, y=dot.y, square=True, hollow=item.get("held") is not True)


def _load_row(row: Report) -> dict[str, str]:
    target = number(row, "details", "target_p99_ms")
    errors = [abs(error) for item in rows(row, "details", "sweep") if (error := number(item, "littles_law_error"))]
    ends = interval(row, "details", "throughput_ratio_ci95")
    return {
        "artifact": text(row, "artifact") or fmt.DASH,
        "doubt": doubt(row),
        "held": fmt.plain(number(row, "details", "scheduled_per_s"), 4),
        "target": fmt.DASH if target is None else f"{target:g} ms",
        "ratio": fmt.times(number(row, "details", "throughput_ratio_to_baseline")),
        "ratio_note": fmt.span(ends),
        "law": f"{100 * max(errors):.1f} %" if errors else fmt.DASH,
    }


def _series(title: str, found: Mapping[str, Sequence[Dot]]) -> Plot | None:
    """Return a chart over the number of the run, of the lines that reach furthest; None where nothing was measured."""
    newest = sorted(found, key=lambda label: -found[label][-1].x)[:MOST_LINES]
    curves = [
        Curve(label=label, tone=1 + index % (TONES - 1), points=tuple((d.x, d.y) for d in dots), dots=tuple(dots))
        for index, (label, dots) in enumerate((name, found[name]) for name in found if name in newest)
    ]
    return plot(Frame(title=title, x_label="run", y_label="", whole_x=True), curves) if curves else None


def _scalar(entries: Sequence[Report], names: Mapping[str, str], key: str, scale: float = 1.0) -> dict[str, list[Dot]]:
    """Return a value of each run, one line per machine."""
    found: dict[str, list[Dot]] = {}
    for index, item in enumerate(entries, 1):
        value = number(item, key)
        if value is not None:
            label = f"machine {names[text(item, 'fingerprint')]}"
            found.setdefault(label, []).append(Dot(x=index, y=value * scale, hollow=bool(text(item, "failure"))))
    return found


def _measured(entries: Sequence[Report], names: Mapping[str, str], key: str) -> dict[str, list[Dot]]:
    """Return a value of the bench rows beside the original's: a line per artifact, condition and machine."""
    found: dict[str, list[Dot]] = {}
    for index, item in enumerate(entries, 1):
        for row in _beside(item):
            value = number(row, key)
            if value is not None:
                where = f"machine {names[text(item, 'fingerprint')]}"
                label = ", ".join(part for part in (text(row, "artifact"), condition(row), where) if part)
                found.setdefault(label, []).append(Dot(x=index, y=value, hollow=bool(text(row, "doubt"))))
    return found


def _beside(item: Report) -> list[Report]:
    """Return the bench rows of a run but for those of the original, if there are others."""
    bench = rows(item, "bench")
    return [row for row in bench if text(row, "artifact") != text(bench[0], "artifact")] or bench


def run_row(index: int, item: Report, names: Mapping[str, str]) -> dict[str, str]:
    """Return what the tables of a history show of one run, as text."""
    first: Report = next(iter(_beside(item)), {})
    metric, size = number(item, "metric"), number(item, "size_bytes")
    return {
        "run": str(index),
        "time": text(item, "time").replace("T", " ").removesuffix("+00:00"),
        "kind": text(item, "kind") or fmt.DASH,
        "recipe": text(item, "recipe")[:7] or fmt.DASH,
        "machine": names[text(item, "fingerprint")],
        "metric": fmt.DASH if metric is None else f"{metric:.4g}",
        "size": fmt.size(size),
        "ratio": fmt.times(number(first, "ratio_to_baseline")),
        "ratio_note": condition(first),
        "throughput": fmt.plain(number(first, "throughput_per_s"), 4),
        "doubt": text(item, "failure") or text(first, "doubt"),
    }


def machines(entries: Sequence[Report], names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the letter and the processor of each machine."""
    models = {text(item, "fingerprint"): text(item, "machine") for item in entries}
    return [(name, models[mark] or "not recorded") for mark, name in names.items()]
