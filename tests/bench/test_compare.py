"""The verdict says plainly what the rows say; files hold every sample."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from paredown.bench import compare
from paredown.bench.rows import Row

BASE = Row(
    artifact="dense.onnx",
    runtime="onnxruntime",
    scenario="edge",
    batch=1,
    threads=1,
    latency_ms_p50=10.0,
    latency_ms_p90=11.0,
    latency_ms_p99=12.0,
    ci95=(9.9, 10.1),
    throughput_per_s=99.0,
    peak_rss_bytes=None,
    ratio_to_baseline=1.0,
    ratio_ci95=(1.0, 1.0),
    samples=np.full((20, 2), 0.01),
    stable=True,
)


def _row(ratio: float, half: float = 0.02, **changes: object) -> Row:
    values = {"artifact": "small.onnx", "ratio_to_baseline": ratio, "ratio_ci95": (ratio - half, ratio + half)}
    return replace(BASE, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            _row(1.32),
            "Slower: small.onnx takes 1.32 times as long as dense.onnx at batch 1, 1 thread "
            "(95 % interval 1.30 to 1.34); low-bit kernels are not registered.",
        ),
        (
            _row(0.5, 0.1),
            "Faster: small.onnx runs 2.00 times as fast as dense.onnx at batch 1, 1 thread "
            "(95 % interval 1.67 to 2.50).",
        ),
        (
            _row(0.9, 0.2),
            "No measurable difference: small.onnx takes 0.90 times as long as dense.onnx at batch 1, 1 thread "
            "(95 % interval 0.70 to 1.10).",
        ),
        (
            _row(1.01, 0.001),
            "No measurable difference: small.onnx takes 1.01 times as long as dense.onnx at batch 1, 1 thread "
            "(95 % interval 1.01 to 1.01).",
        ),
        (
            _row(0.9, ratio_ci95=None),
            "Not measured well enough: small.onnx takes 0.90 times as long as dense.onnx at batch 1, 1 thread, "
            "from too few rounds for an interval.",
        ),
    ],
)
def test_one_sentence(row: Row, sentence: str) -> None:
    assert compare.verdict([BASE, row], "low-bit kernels are not registered.") == sentence


def test_slower_comes_first_and_the_other_cells_follow() -> None:
    rows = [BASE, _row(0.8), replace(BASE, batch=32), _row(1.5, batch=32)]
    verdict = compare.verdict(rows)
    assert verdict.startswith("Slower: small.onnx takes 1.50 times as long as dense.onnx at batch 32, 1 thread")
    assert verdict.endswith("; faster at batch 1, 1 thread (1.25 times as fast).")


def test_slowest_artifact_comes_first() -> None:
    verdict = compare.verdict([BASE, _row(0.5), _row(2.0, artifact="worse.onnx")])
    assert [line.split(":")[0] for line in verdict.splitlines()] == ["Slower", "Faster"]


def test_one_artifact_has_no_verdict() -> None:
    alone = "dense.onnx takes 10 ms (p50) at batch 1, 1 thread; no other file was measured beside it."
    assert compare.verdict([BASE]) == alone
    assert compare.verdict([]) == "Speed was not measured."


def test_files_hold_rows_samples_and_machine(tmp_path: Path) -> None:
    rows = [BASE, _row(0.5)]
    json_path, csv_path = compare.write(rows, tmp_path / "out", {"os": "x"})
    document = json.loads(json_path.read_text())
    assert document["schema"] == "paredown.bench/1"
    assert document["verdict"] == compare.verdict(rows)
    assert document["environment"] == {"os": "x"}
    assert np.shape(document["rows"][1]["samples_ms"]) == (20, 2)
    assert document["rows"][1]["ratio_ci95"] == [0.48, 0.52]
    with csv_path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["ratio_low"] for line in lines] == ["1.0", "0.48"]
    assert [line["runs"] for line in lines] == ["40", "40"]
    assert lines[0]["peak_rss_bytes"] == ""


def test_the_page_stands_beside_the_files(tmp_path: Path) -> None:
    rows = [BASE, _row(0.5, details={"drifted": True, "drift_reason": "the CPU clock moved by 9 %"})]
    for _ in range(2):
        compare.write(rows, tmp_path, {"cpu": {"model": "x"}})
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.csv", "bench.html", "history.jsonl"}
    page = (tmp_path / "bench.html").read_text()
    assert "Faster, but clocks drifted: 2.00 times as fast" in page
    assert "<h2>Latency distributions</h2>" in page
    assert "<h2>History</h2>" in page


def test_quantiles_of_the_samples_are_part_of_a_row() -> None:
    found = _row(0.5, samples=np.linspace(0.001, 0.002, 51).reshape(3, 17)).report()["quantiles_ms"]
    assert found == [round(1 + share / 100, 6) for share in range(101)]
    assert _row(0.5, samples=np.zeros((0, 0))).report()["quantiles_ms"] is None


def test_what_is_not_to_be_trusted_is_said() -> None:
    invalid = _row(0.5, details={"valid": False, "invalid_because": "too few queries"})
    assert compare.caution([BASE, invalid]) == "small.onnx: not VALID (too few queries)."
    assert compare.verdict([BASE, invalid]).startswith("Faster, but not VALID (too few queries): small.onnx runs 2.00")
    console = Console(width=100, record=True, file=io.StringIO())
    compare.show([BASE, invalid], console)
    shown = console.export_text()
    assert "small.onnx!" in shown
    assert "! not VALID, or clocks drifted" in shown


def test_caution_names_what_was_wrong() -> None:
    assert compare.caution([BASE, _row(0.5, waited=0.01)]) == ""
    assert compare.caution([BASE, _row(0.5, waited=0.314)]).startswith("The machine was busy: 31 % of the time")


def test_table_marks_what_did_not_settle() -> None:
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    compare.show([BASE, _row(0.5, stable=False, artifact="a[b].onnx")], console)
    shown = console.export_text()
    console.file.close()
    assert "a[b].onnx*" in shown
    assert "0.48..0.52" in shown
    assert "Latencies had not settled" in shown
    assert shown.startswith("Faster")


def test_the_table_is_whole_on_a_narrow_terminal() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    compare.show([BASE, _row(0.5, throughput_per_s=26_857.0)], console)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["small.onnx", "1", "1", "10.000", "11.000", "12.000", "26,857", "-", "0.50", "(0.48..0.52)"] in lines


def test_drift_is_told_and_nothing_dropped() -> None:
    moved = {"drifted": True, "drift_reasons": ["the CPU clock moved by 33 % (1800 to 2400 MHz)"]}
    rows = [replace(BASE, details=moved), _row(0.5, details=moved)]
    sentence = "The machine drifted at 1 thread: the CPU clock moved by 33 % (1800 to 2400 MHz)."
    assert compare.caution(rows) == sentence
    console = Console(record=True, width=140, file=io.StringIO())
    compare.show(rows, console)
    shown = console.export_text()
    assert sentence in shown
    assert "small.onnx!" in shown
    assert "! not VALID, or clocks drifted" in shown
    assert [row.report()["details"] for row in rows] == [moved, moved]


def test_energy_and_real_time_are_said_below_the_table() -> None:
    details = {"meter": "ina3221", "idle_w": 4.0, "mean_w": 6.25}
    stream = {
        "frame_ms": 8.0,
        "real_time_factor_p50": 0.0412,
        "real_time_factor_p99": 1.07,
        "missed_deadline_share": 0.0125,
    }
    assert compare.notes([BASE, _row(0.5, energy_j=0.0123, details=details | stream)]) == [
        "small.onnx takes 0.041 of a frame of 8 ms, 1.1 at p99, and misses 1.2 % of its deadlines.",
        "small.onnx takes 12.3 mJ per sample above idle at batch 1 (ina3221: 6.25 W, idle 4 W).",
    ]


@pytest.mark.parametrize(
    ("missed", "said"),
    [(0.0, "none"), (0.0125, "1.2 %"), (0.0996, "9.96 %"), (0.5, "50 %"), (0.998, "99.8 %"), (1.0, "all")],
)
def test_missed_deadlines_are_said_in_plain_numbers_with_the_batch(missed: float, said: str) -> None:
    stream = {
        "frame_ms": 8.0,
        "real_time_factor_p50": 1.2,
        "real_time_factor_p99": 1.8,
        "missed_deadline_share": missed,
    }
    row = replace(_row(0.5, details=stream), batch=4)
    assert compare.notes([BASE, row]) == [
        f"small.onnx at batch 4 takes 1.2 of a frame of 8 ms, 1.8 at p99, and misses {said} of its deadlines."
    ]
