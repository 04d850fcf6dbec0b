"""history.jsonl: a line per run and per `bench --out`, which survives whatever replaces the folder."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from paredown.optimizer import history, report
from paredown.optimizer.errors import InputError

from .example_report import full_report, served_report
from .tiny import edit, optimize, project


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_line_says_when_where_with_what_and_what_came_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: []\n")
    report.write(full_report(), tmp_path)
    report.write_page(served_report(), tmp_path / "bench.html")
    run, bench = _lines(tmp_path)
    time = datetime.datetime.fromisoformat(run["time"])
    assert time.utcoffset() == datetime.timedelta(0)
    assert (run["kind"], run["metric"], run["metric_name"], run["size_bytes"]) == ("run", 0.8072, "top1", 149120)
    assert run["recipe"] == hashlib.sha256(b"steps: []\n").hexdigest()[:12]
    assert len(run["fingerprint"]) == 12
    assert run["fingerprint"] == bench["fingerprint"]
    assert run["bench"][1]["ratio_to_baseline"] == 0.56
    assert "quantiles_ms" not in run["bench"][1]
    assert (bench["kind"], bench["recipe"], bench["size_bytes"]) == ("bench", None, None)
    assert bench["bench"][0]["doubt"] == "not VALID"
    assert "doubt" not in run["bench"][0]


def test_the_page_of_a_second_run_shows_the_first(tmp_path: Path) -> None:
    _, page = report.write(full_report(), tmp_path)
    assert "this is the first run in its folder" in page.read_text()
    report.write(full_report(0.5), tmp_path)
    assert "<h2>History</h2>" in page.read_text()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_torn_line_is_kept_counted_and_not_glued_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"kind": "run"}\n[1]\n{"ki')
    report.write(full_report(), tmp_path)
    found = history.read(tmp_path)
    assert (len(found.entries), found.unreadable) == (2, 2)
    assert (tmp_path / "history.jsonl").read_text().splitlines()[2] == '{"ki'


def test_a_report_that_names_no_machine_has_no_fingerprint(tmp_path: Path) -> None:
    report.write({"environment": None}, tmp_path)
    assert _lines(tmp_path)[0]["fingerprint"] is None


def test_history_survives_force_and_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project(tmp_path))
    run = ("run", "recipe.yaml", "--out", "out")
    assert optimize(monkeypatch, *run).code == 0
    assert optimize(monkeypatch, *run, "--force", "--set", "steps.0.quantize.bits=3").code == 0
    first, second = _lines(tmp_path / "out")
    assert first["recipe"] != second["recipe"]
    assert first["size_bytes"] > second["size_bytes"]
    shown = optimize(monkeypatch, "show", "out", "--history")
    assert (shown.code, shown.error) == (0, [])
    assert "machine A:" in shown.out


def test_a_failed_run_leaves_the_history_and_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project(tmp_path))
    run = ("run", "recipe.yaml", "--out", "out", "--force", "--set", "export=[onnx]")
    assert optimize(monkeypatch, *run).code == 0
    edit(tmp_path / "net.py", "(model(x).argmax(1) == 3).double()", "float(type(model).__name__ == 'Net')")
    assert optimize(monkeypatch, *run, "--set", "gates={max_drop: 1}").code == 5
    assert [line["failure"] for line in _lines(tmp_path / "out")] == [None]
    before, failed = _lines(tmp_path / "out.failed")
    assert before["failure"] is None
    assert "score fell by 100.00 points" in failed["failure"]


def test_a_folder_without_history_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    told = optimize(monkeypatch, "show", "out", "--history")
    says = "out/history.jsonl: there is no history; name the --out folder of a run of this version"
    assert (told.code, told.error) == (InputError.exit_code, [f"optimize: {says}"])
