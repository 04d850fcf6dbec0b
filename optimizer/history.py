"""history.jsonl: one line per run and per `bench --out`, kept in the output folder whatever replaces the rest of it."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .report_value import Report, at, number, rows, text
from .verdict import doubt, is_bench

FILE = "history.jsonl"
MEASURED = ("artifact", "scenario", "batch", "threads", "latency_ms_p50", "ratio_to_baseline", "throughput_per_s")
"""Keys that a line keeps of each bench row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The lines of a folder, oldest first, and how many could not be read."""

    entries: tuple[Report, ...] = ()
    unreadable: int = 0


def entry(report: Report, recipe: str = "") -> dict[str, object]:
    """Return the line of a report: when, on which machine, what came out. `recipe`: the text of recipe.yaml, if any."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kind": "bench" if is_bench(report) else "run",
        "recipe": hashlib.sha256(recipe.encode()).hexdigest()[:12] if recipe else None,
        "fingerprint": machine.fingerprint(report) or None,
        "machine": text(report, "environment", "cpu", "model") or None,
        "git_commit": at(report, "environment", "git_commit"),
        "metric": number(report, "final", "metric", "value"),
        "metric_name": text(report, "final", "metric", "name") or None,
        "size_bytes": number(report, "final", "size_bytes"),
        "failure": text(report, "failure") or None,
        "bench": [{key: row.get(key) for key in MEASURED} | _doubt(row) for row in rows(report, "bench")],
    }


def append(report: Report, folder: Path) -> None:
    """Add the line of a report to the history of a folder; the file is replaced whole."""
    recipe = folder / "recipe.yaml"
    line = entry(report, recipe.read_text(encoding="utf-8") if recipe.is_file() and not is_bench(report) else "")
    path = folder / FILE
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    before += "" if not before or before.endswith("\n") else "\n"
    new = path.with_name(f".{FILE}.new")
    new.write_text(before + json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    new.replace(path)


def carry(old: Path, new: Path) -> None:
    """Give the folder that is to replace `old` its history."""
    if (old / FILE).is_file():
        (new / FILE).write_bytes((old / FILE).read_bytes())


def read(folder: Path) -> History:
    """Return the history of a folder, empty where there is none."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    found = [_parsed(line) for line in lines if line.strip()]
    known = tuple(item for item in found if item is not None)
    return History(entries=known, unreadable=len(found) - len(known))


def letters(entries: Sequence[Report]) -> dict[str, str]:
    """Return a name for each machine, "A" for the first: hashes are no reading matter."""
    marks = dict.fromkeys(text(item, "fingerprint") for item in entries)
    return {mark: chr(ord("A") + index) if index < 26 else f"#{index + 1}" for index, mark in enumerate(marks)}


def _doubt(row: Report) -> dict[str, str]:
    found = doubt(row, briefly=True)
    return {"doubt": found} if found else {}


def _parsed(line: str) -> Report | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
