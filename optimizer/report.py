"""report.json and report.html: assembled in the order of the contract, written, read, shown and compared.

A report is plain JSON (schema paredown.report/1). What was not measured is null; NaN and infinity become null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .report_value import Report

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
    """Write report.json and report.html into `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    full = assemble(report)
    json_path, html_path = folder / "report.json", folder / "report.html"
    json_path.write_text(json.dumps(full, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    html_path.write_text(render(full), encoding="utf-8")
    return json_path, html_path


def read(path: Path) -> dict[str, object]:
    """Return the report of an out folder, or of a report.json; an InputError where it is none."""
    file = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError("there is no report", where=str(file), fix="name the --out folder of a run") from problem
    except ValueError as problem:
        raise InputError(
            f"this is not JSON ({problem})", where=str(file), fix="run again to write it anew"
        ) from problem
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise InputError(f'schema is "{schema}", not "{SCHEMA}"', where=str(file), fix="run again with this version")
    return assemble(found)


def render(report: Report) -> str:
    """Return report.html: one self-contained page without scripts or network access."""
    from .report_page import page

    return page(assemble(report))


def show(report: Report, console: Console) -> None:
    """Print a summary: verdict, before and after, bit widths, layers, decisions, verification."""
    from .report_text import print_report

    print_report(assemble(report), console)


def diff(first: Report | Path, second: Report | Path, console: Console) -> None:
    """Print two reports side by side and mark what differs; a path is an out folder or a report.json."""
    from .report_text import print_diff

    left, right = (read(item) if isinstance(item, Path) else assemble(item) for item in (first, second))
    print_diff(left, right, console)


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
