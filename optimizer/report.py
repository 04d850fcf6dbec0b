"""report.json and report.html: assembled in the order of the contract, written, read, shown and compared.

A bench.json, which `optimize bench --out` writes, is read as a report without a model.

A report is plain JSON (schema paredown.report/1). What was not measured is null; NaN and infinity become null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from . import history, machine
from .errors import InputError, RecipeError
from .report_value import Report
from .verdict import BENCH_SCHEMA

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "paredown.report/1"
KEYS: dict[str, tuple[str, ...]] = {
    "schema": (),
    "environment": (),
    "seed": (),
    "command": (),
    "baseline": ("metric", "metric_ci95", "size_bytes", "parameters", "macs"),
    "steps": ("step", "spec", "seconds", "peak_rss_bytes", "metric", "error_rel"),
    "layers": ("name", "shape", "channels_kept", "rank", "format", "bits", "size_bytes", "error_rel", "mode"),
    "final": (*("metric", "metric_ci95", "drop", "drop_ci95", "size_bytes", "parameters", "macs", "bits_per_weight"),),
    "verify": ("runtime", "batch", "max_abs", "rel", "argmax_agreement", "first_bad_layer"),
    "bench": (
        *("artifact", "runtime", "scenario", "batch", "threads", "latency_ms_p50", "latency_ms_p90", "latency_ms_p99"),
        *("ci95", "throughput_per_s", "peak_rss_bytes", "energy_j", "stages", "ratio_to_baseline", "ratio_ci95"),
    ),
    "decisions": ("layer", "reason"),
}
"""The sections of a report, and the keys that every one of its rows has."""
_LISTS = ("steps", "layers", "verify", "bench", "decisions")


def assemble(parts: Report) -> dict[str, object]:
    """Return a full report: every key of the contract in its order, and JSON values only.

    A key that `parts` lacks is null, or [] for a list. Keys beyond the contract are kept, after its own.
    """
    parts = {"schema": SCHEMA, **parts}
    ordered = {key: _section(key, parts.get(key)) for key in KEYS}
    return ordered | {key: _clean(value) for key, value in parts.items() if key not in KEYS}


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write report.json and report.html into `folder`, add a line to its history.jsonl; return the first two."""
    folder.mkdir(parents=True, exist_ok=True)
    full = assemble(report)
    json_path = folder / "report.json"
    json_path.write_text(json.dumps(full, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    return json_path, write_page(full, folder / "report.html")


def write_page(report: Report, path: Path) -> Path:
    """Add the line of a report to the history of a page's folder, and write the page; return it."""
    full = assemble(report)
    history.append(full, path.parent)
    path.write_text(render(full, history.read(path.parent)), encoding="utf-8")
    return path


def read(path: Path) -> dict[str, object]:
    """Return the report of an out folder, of a report.json or of a bench.json; an InputError where it is none."""
    file = _file(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError("there is no report", where=str(file), fix="name the --out folder of a run") from problem
    except ValueError as problem:
        raise InputError(
            f"this is not JSON ({problem})", where=str(file), fix="run again to write it anew"
        ) from problem
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema == BENCH_SCHEMA:
        return assemble(of_bench(found.get("rows"), found.get("environment"), found.get("caution")))
    if schema != SCHEMA:
        raise InputError(f'schema is "{schema}", not "{SCHEMA}"', where=str(file), fix="run again with this version")
    return assemble(found)


def of_bench(rows: object, environment: object, caution: object) -> dict[str, object]:
    """Return the parts of a report that has bench rows and nothing else; samples stay in bench.json."""
    listed = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list | tuple) else []
    kept = [{key: value for key, value in row.items() if key != "samples_ms"} for row in listed]
    known = environment if isinstance(environment, Mapping) else {}
    told = {"bench_caution": caution} if caution else {}
    return {"schema": BENCH_SCHEMA, "environment": {**known, **told}, "bench": kept}


def render(report: Report, known: history.History | None = None) -> str:
    """Return report.html: one self-contained page without scripts or network access. `known`: of earlier runs."""
    from .report_page import page

    return page(assemble(report), known)


def show(report: Report, console: Console) -> None:
    """Print a summary: verdict, before and after, bit widths, layers, decisions, verification."""
    from .report_text import print_report

    print_report(assemble(report), console)


def show_history(folder: Path, console: Console) -> None:
    """Print the runs of a folder; an InputError where there is no history."""
    from .report_text import print_history

    known = history.read(folder)
    if not known.entries:
        where, fix = str(folder / history.FILE), "name the --out folder of a run of this version"
        raise InputError("there is no history", where=where, fix=fix)
    print_history(known, console)


def diff(first: Report | Path, second: Report | Path, console: Console, *, across_machines: bool = False) -> None:
    """Print two reports side by side and mark what differs; a path is an out folder, a report.json or a bench.json.

    Raises RecipeError for reports of different machines unless `across_machines`; then speed is marked as not
    comparable.
    """
    from .report_text import print_diff

    left, right = (read(item) if isinstance(item, Path) else assemble(item) for item in (first, second))
    differing = machine.differences(left, right)
    if differing and not across_machines:
        what = f"the reports are of different machines: {', '.join(differing)}"
        fix = "measure both on one, or add --across-machines to compare sizes and accuracy alone"
        raise RecipeError(what, where="diff", fix=fix)
    print_diff(left, right, console, differing)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    report, bench = path / "report.json", path / "bench.json"
    return bench if bench.is_file() and not report.is_file() else report


def _section(key: str, value: object) -> object:
    if key in _LISTS:
        return [_row(key, row) for row in value] if isinstance(value, list | tuple) else []
    return _row(key, value) if KEYS[key] else _clean(value)


def _row(key: str, value: object) -> object:
    if value is None or not isinstance(value, Mapping):
        value = {}
    ordered = {name: _clean(value.get(name)) for name in KEYS[key]}
    return ordered | {name: _clean(item) for name, item in value.items() if name not in ordered}


def _clean(value: object) -> object:
    """Return JSON values: numpy scalars become numbers, tuples lists, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if hasattr(value, "tolist"):
        return _clean(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
