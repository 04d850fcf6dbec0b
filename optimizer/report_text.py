"""A report in the terminal, alone or next to another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import report_format as fmt
from .history import FILE, History, letters
from .report_curves import machines, run_row
from .report_diff import Cell, differs, result_cells, speed_cells
from .report_summary import computing, label, lines, widths
from .report_value import Report, at, decision, is_fraction, layer_name, number, rows, text
from .verdict import condition, headline, peer, reason_when_slower, speed

MAX_LAYERS = 40
_COLOURS = {"good": "green", "bad": "red", "same": ""}


def print_report(report: Report, console: Console) -> None:
    """Print the summary of one report; its first line is the verdict."""
    console.print(f"[bold]{escape(headline(report))}[/bold]", highlight=False)
    if text(report, "failure"):
        console.print(f"[red]{escape(text(report, 'failure'))}[/red]", highlight=False)
    console.print(escape(speed(rows(report, "bench"), reason_when_slower(report))), highlight=False)
    if text(report, "environment", "bench_caution"):
        console.print(f"[yellow]{escape(text(report, 'environment', 'bench_caution'))}[/yellow]", highlight=False)
    if computing(report):
        console.print(escape(computing(report)), highlight=False)
    for table in (
        _summary(report),
        _peers(report),
        _widths(report),
        _layers(report),
        _decisions(report),
        _verify(report),
    ):
        if table.row_count:
            console.print()
            console.print(table)


def print_diff(first: Report, second: Report, console: Console, differing: Sequence[str] = ()) -> None:
    """Print two reports side by side; a star marks lines that differ. `differing`: why speed is not comparable."""
    console.print(f"[bold]A[/bold]  {escape(headline(first))}", highlight=False)
    console.print(f"[bold]B[/bold]  {escape(headline(second))}", highlight=False)
    if differing:
        told = f"Different machines: {', '.join(differing)}. Speed, memory and energy are not comparable."
        console.print(f"[yellow]{escape(told)}[/yellow]", highlight=False)
    tables = [
        _two("results", result_cells(first), result_cells(second)),
        _speeds(speed_cells(first), speed_cells(second), comparable=not differing),
        _two("settings", _setting_cells(first), _setting_cells(second)),
        _two("steps", _step_cells(first), _step_cells(second)),
        _two("layers that differ", *_only_different(_layer_cells(first), _layer_cells(second))),
    ]
    for table in tables:
        if table.row_count:
            console.print()
            console.print(table)


def print_history(known: History, console: Console) -> None:
    """Print a line per run, oldest first; figures of different machines are not to be held against each other."""
    names = letters(known.entries)
    columns = ("run", "time (UTC)", "", "recipe", "machine", "metric", "size", "x original", "per s", "remark")
    table = _table("history", *columns, left=5)
    for index, item in enumerate(known.entries, 1):
        row = run_row(index, item, names)
        ratio = _with_note(row["ratio"], row["ratio_note"]) if row["ratio"] != fmt.DASH else fmt.DASH
        known_as = (escape(row[key]) for key in ("run", "time", "kind", "recipe", "machine", "metric", "size"))
        table.add_row(*known_as, ratio, row["throughput"], escape(row["doubt"]))
    console.print(table)
    for name, model in machines(known.entries, names):
        console.print(escape(f"machine {name}: {model}"), highlight=False)
    if known.unreadable:
        console.print(f"{known.unreadable} lines of {FILE} could not be read.", highlight=False)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table


def _summary(report: Report) -> Table:
    table = _table("before and after", "", "original", "optimized", "change")
    for line in lines(report):
        colour = _COLOURS[line.tone]
        change = _with_note(line.change, line.change_note)
        table.add_row(
            escape(label(line)),
            _with_note(line.before, line.before_note),
            _with_note(line.after, line.after_note),
            f"[{colour}]{change}[/{colour}]" if colour else change,
        )
    return table


def _peers(report: Report) -> Table:
    """Return what others made of the original beside ours; empty where nothing of it was measured."""
    bench = rows(report, "bench")
    columns = ("file", "condition", "p50", "original", "ours", "bytes", "metric", "drop")
    table = _table("what others make of the original", *columns, left=2)
    for row in bench if any(peer(row) for row in bench) else ():
        table.add_row(
            escape(text(row, "artifact")),
            condition(row),
            fmt.milliseconds(number(row, "latency_ms_p50")),
            fmt.times(number(row, "ratio_to_baseline")),
            fmt.times(number(row, "details", "ratio_to_ours")),
            fmt.size(number(row, "details", "size_bytes")),
            fmt.score(number(row, "details", "metric", "value"), fraction=is_fraction(report)),
            fmt.plain(number(row, "details", "drop")),
        )
    return table


def _with_note(value: str, note: str) -> str:
    return escape(f"{value} ({note})" if note else value)


def _widths(report: Report) -> Table:
    table = _table("bit widths", "bits", "layers", "weights", "share", "size")
    for width in widths(rows(report, "layers")):
        share, held = f"{100 * width.share:.1f} %", fmt.count(width.weights)
        table.add_row(fmt.plain(width.bits), str(width.layers), held, share, fmt.size(width.bytes))
    return table


def _layers(report: Report) -> Table:
    found = rows(report, "layers")
    more = f" (first {MAX_LAYERS} of {len(found)}; all are in report.html)" if len(found) > MAX_LAYERS else ""
    table = _table("layers" + more, "name", "format", "mode", "shape", "bits", "size", "error", left=3)
    for layer in found[:MAX_LAYERS]:
        table.add_row(
            escape(text(layer, "name")),
            escape(text(layer, "format") or fmt.DASH),
            escape(text(layer, "mode") or fmt.DASH),
            escape(fmt.mapping(at(layer, "shape"))),
            fmt.plain(number(layer, "bits")),
            fmt.size(number(layer, "size_bytes")),
            fmt.plain(number(layer, "error_rel")),
        )
    return table


def _decisions(report: Report) -> Table:
    table = _table("decisions", "layer", "decision", "reason", left=3)
    for row in rows(report, "decisions"):
        kind, value = decision(row)
        shown = f"{kind} {value}".strip() or fmt.DASH
        table.add_row(escape(layer_name(row)), escape(shown), escape(text(row, "reason")))
    return table


def _verify(report: Report) -> Table:
    table = _table("verification", "runtime", "batch", "max abs", "relative", "same argmax", "file", "first bad layer")
    for row in rows(report, "verify"):
        agreement = number(row, "argmax_agreement")
        table.add_row(
            escape(text(row, "runtime") or fmt.DASH),
            text(row, "batch") or fmt.DASH,
            fmt.plain(number(row, "max_abs")),
            fmt.plain(number(row, "rel")),
            fmt.DASH if agreement is None else f"{100 * agreement:.2f} %",
            fmt.size(number(row, "size_bytes")),
            escape(text(row, "first_bad_layer") or "none"),
        )
    return table


def _two(title: str, first: Sequence[tuple[str, str]], second: Sequence[tuple[str, str]]) -> Table:
    table = _table(title, "", "A", "B", "differs", left=1)
    for name in dict.fromkeys([*dict(first), *dict(second)]):
        left, right = dict(first).get(name, fmt.DASH), dict(second).get(name, fmt.DASH)
        mark = "" if left == right else "[yellow]*[/yellow]"
        if (left, right) != (fmt.DASH, fmt.DASH):
            table.add_row(escape(name), escape(left), escape(right), mark)
    return table


def _speeds(first: Mapping[str, Cell], second: Mapping[str, Cell], *, comparable: bool) -> Table:
    table = _table("speed", "", "A", "B", "differs", left=1)
    for name in dict.fromkeys([*first, *second]):
        left, right = first.get(name), second.get(name)
        mark = differs(left, right) if comparable else "not comparable"
        shown = [escape(fmt.DASH if cell is None else cell.shown) for cell in (left, right)]
        table.add_row(escape(name), *shown, f"[yellow]{mark}[/yellow]" if mark else "")
    return table


def _only_different(
    first: Sequence[tuple[str, str]], second: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    same = set(first) & set(second)
    left, right = ([cell for cell in cells if cell not in same] for cells in (first, second))
    return left, right


def _setting_cells(report: Report) -> list[tuple[str, str]]:
    environment = at(report, "environment")
    found = [("command", text(report, "command")), ("seed", text(report, "seed"))]
    if isinstance(environment, dict):
        found += [(str(key), fmt.mapping(value)) for key, value in environment.items()]
    return [(name, value or fmt.DASH) for name, value in found]


def _step_cells(report: Report) -> list[tuple[str, str]]:
    found = enumerate(rows(report, "steps"), start=1)
    return [(f"{index}. {text(step, 'step')}", _step(step)) for index, step in found]


def _step(step: Report) -> str:
    parts = [fmt.mapping(at(step, "spec")), fmt.seconds(number(step, "seconds"))]
    return "; ".join(part for part in parts if part and part != fmt.DASH) or fmt.DASH


def _layer_cells(report: Report) -> list[tuple[str, str]]:
    return [(text(layer, "name"), _layer(layer)) for layer in rows(report, "layers")]


def _layer(layer: Report) -> str:
    parts = [text(layer, "format"), f"{fmt.plain(number(layer, 'bits'))} bits", fmt.size(number(layer, "size_bytes"))]
    shape = at(layer, "shape")
    return " ".join(part for part in [*parts, fmt.mapping(shape) if shape else ""] if part)
