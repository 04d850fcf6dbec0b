"""Charts of the page: drawn where there is data, a reason where there is none; doubtful rows are visibly so."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest

from paredown.optimizer import report, verdict
from paredown.optimizer.history import History
from paredown.optimizer.report_bars import energies, stages
from paredown.optimizer.report_curves import distributions, loads, runs
from paredown.optimizer.report_format import joules
from paredown.optimizer.report_plot import Curve, Dot, Frame, log_ticks, plot

from .example_report import full_report, history_lines, null_report, served_report

HEADINGS = {
    "Latency distributions": "latency distributions",
    "Throughput against latency": "throughput against latency",
    "Stages of a request": "stages",
    "Energy per inference": "energy per inference",
    "History": "history",
}


def _text(html: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def _headings(html: str) -> set[str]:
    return set(re.findall(r"<h2>(.*?)</h2>", html))


def _served() -> Any:
    return served_report()


def _without(*keys: str) -> Any:
    """Return the full report, whose rows lack some keys: as an earlier version wrote it."""
    found: Any = full_report()
    found["bench"] = [{key: value for key, value in row.items() if key not in keys} for row in found["bench"]]
    return found


# --- where there is data, and where there is none


def test_every_chart_is_drawn_where_there_is_data() -> None:
    html = report.render(served_report(), History(entries=tuple(history_lines())))
    assert set(HEADINGS) <= _headings(html)
    assert "Not shown" not in html
    assert html.count("<figure") == 2 + 1 + 4


def test_no_chart_is_empty_and_each_absence_has_a_reason() -> None:
    html = report.render(_without("quantiles_ms"))
    assert not set(HEADINGS) & _headings(html)
    assert (
        "Not shown: latency distributions (these rows are of a version that kept no quantiles); throughput against "
        "latency (only a server scenario varies the load, this is edge); stages (requests of edge have one stage); "
        "energy per inference (no meter was read); history (this is the first run in its folder)."
    ) in _text(html)


def test_a_meter_that_is_unavailable_gives_its_reason() -> None:
    found: Any = full_report()
    for row in found["bench"]:
        row["details"] = {"energy": "unavailable: no meter covers the CPU"}
    assert "energy per inference (unavailable: no meter covers the CPU)" in _text(report.render(found))


@pytest.mark.parametrize("draw", [distributions, loads, stages, energies])
def test_rows_of_nulls_draw_nothing(draw: Any) -> None:
    bench: Any = null_report()["bench"]
    assert draw(bench) == draw([]) == draw([{"quantiles_ms": [None] * 101, "stages": {"compute": None}}]) == []


# --- distributions


def test_a_distribution_runs_through_its_quantiles_to_p99() -> None:
    values = [1.0 + share / 100 for share in range(101)]
    chart = distributions([{"artifact": "a", "batch": 1, "quantiles_ms": values}])[0]
    points = [tuple(map(float, pair.split())) for pair in chart.lines[0].path.removeprefix("M").split("L")]
    assert len(points) == 100
    x_of = np.interp(1.5, [1.0, 2.0], [chart.left, chart.right])
    y_of = np.interp(50, [0, 100], [chart.bottom, chart.top])
    assert points[50] == pytest.approx((x_of, y_of), abs=0.1)
    assert chart.lines[0].note == "p50 1.500 ms, p99 1.990 ms, slowest 2.000 ms"


def test_a_distribution_of_another_length_is_not_guessed() -> None:
    assert distributions([{"artifact": "a", "quantiles_ms": [1.0, 2.0]}]) == []


def test_artifacts_keep_their_colour_and_the_original_is_grey() -> None:
    found = distributions(_served()["bench"])
    assert [[line.tone for line in chart.lines] for chart in found] == [[0, 1], [0, 1]]


# --- load


def test_load_shows_sweep_probes_and_target() -> None:
    load = loads(_served()["bench"])[0]
    original, model = load.plot.lines
    assert [dot.label for dot in model.dots if not dot.square] == ["1", "2", "4", "8", "16"]
    assert {dot.hollow for dot in model.dots if dot.square} == {True}
    assert [dot.hollow for dot in original.dots if dot.square].count(False) == 1
    assert load.plot.rule is not None
    assert load.plot.top < load.plot.rule < load.plot.bottom
    assert (load.rows[1]["held"], load.rows[1]["target"], load.rows[1]["law"]) == ("651.2", "15 ms", "3.2 %")
    assert original.label == "original.onnx, not VALID"


def test_a_probe_that_never_answered_is_left_out() -> None:
    probes = [
        {"scheduled_per_s": 9, "latency_ms_p99": None, "held": False},
        {"scheduled_per_s": 5, "latency_ms_p99": 2.0, "held": True},
    ]
    (load,) = loads([{"artifact": "a", "scenario": "server", "details": {"probes": probes}}])
    assert [(dot.square, dot.hollow) for dot in load.plot.lines[0].dots] == [(True, False)]


# --- bars


def test_stages_are_in_the_order_of_a_request_on_one_scale() -> None:
    (group,) = stages(_served()["bench"])
    original, model = group.bars
    assert [part.stage for part in original.segments][3:6] == ["host to device", "queue", "compute"]
    assert sum(part.width for part in original.segments) == pytest.approx(100)
    assert sum(part.width for part in model.segments) == pytest.approx(100 * 8.835 / 11.82, abs=0.1)
    assert group.sentence == "Longest stage of original.onnx: compute, 58 %; of model.onnx: compute, 48 %."
    assert original.note == "sum 11.8 ms, end to end p50 12.1 ms"


def test_stages_that_do_not_add_up_are_remarked_on() -> None:
    row = {"artifact": "a", "latency_ms_p50": 10.0, "stages": {"other": 2.0, "compute": 5.0}}
    (group,) = stages([row])
    assert group.bars[0].note.endswith("end to end p50 10.0 ms: the sum is 30 % less")
    assert [name for name, _, _ in group.table] == ["compute", "other"]


def test_energy_is_a_number_or_a_reason() -> None:
    found = energies(_served()["bench"])
    assert [row.shown for row in found] == ["\N{EN DASH}", "\N{EN DASH}", "17.1 mJ", "9.58 mJ"]
    assert [row.note for row in found] == ["unavailable: no meter covers the CPU"] * 2 + ["", ""]
    assert [row.width for row in found] == [None, None, 100.0, pytest.approx(56.0)]
    assert (found[2].meter, found[2].mean, found[2].idle) == ("rapl", "21.4 W", "12.5 W")
    assert [joules(value) for value in (None, 2.5, 0.0171, 3e-5)] == [
        "\N{EN DASH}",
        "2.5 J",
        "17.1 mJ",
        "30 \N{MICRO SIGN}J",
    ]


# --- history


def test_history_never_joins_machines() -> None:
    found = runs(History(entries=tuple(history_lines()), unreadable=2))
    assert found is not None
    for chart in found.plots:
        assert [len(line.dots) for line in chart.lines] == [3, 2]
        assert [line.label[-9:] for line in chart.lines] == ["machine A", "machine B"]
    assert [row["run"] for row in found.rows] == ["5", "4", "3", "2", "1"]
    assert found.rows[3]["doubt"] == "clocks drifted"
    assert [dot.hollow for dot in found.plots[2].lines[0].dots] == [False, True, False]
    assert found.note == "2 lines of history.jsonl could not be read."


def test_one_run_has_no_history() -> None:
    assert runs(History(entries=tuple(history_lines()[:1]))) is None


def test_runs_without_a_benchmark_have_a_history_too() -> None:
    found = runs(History(entries=({"size_bytes": 2000}, {"size_bytes": 1000})))
    assert found is not None
    assert [chart.frame.title for chart in found.plots] == ["weights on disk (kB)"]


# --- doubt


def test_a_doubtful_row_is_marked_in_verdict_table_and_page() -> None:
    example = _served()
    assert verdict.headline(example) == "Faster, but not VALID: 1.62 times the load (server, batch 8, 2 threads)"
    assert verdict.speed(example["bench"]) == (
        "Faster, but not VALID (1,204 queries, of which 1,500 are needed): model.onnx serves 1.62 times as many per "
        "second as original.onnx at server, batch 8, 2 threads (95 % interval 1.59 to 1.65); faster, but clocks "
        "drifted (the CPU clock moved by 14 % (2.1 to 2.4 GHz)), at batch 1, 1 thread (1.79 times as fast)."
    )
    html = report.render(example)
    assert html.count('class="doubted"') == 2
    assert '<header class="same">' in html


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({}, ""),
        ({"valid": True, "drifted": False}, ""),
        ({"valid": False, "invalid_because": None}, "not VALID"),
        ({"drifted": True, "drift_reasons": ["a", "b."]}, "clocks drifted (a; b)"),
        (
            {"valid": False, "invalid_because": "x", "drifted": True, "drift_reason": "y"},
            "not VALID (x) and clocks drifted (y)",
        ),
    ],
)
def test_doubts(details: Any, said: str) -> None:
    assert verdict.doubt({"details": details}) == said


def test_a_bench_page_has_no_sections_of_a_run() -> None:
    html = report.render(served_report())
    assert not {"Layers", "Verification", "Steps", "Decisions", "Reproduce"} & _headings(html)
    assert "also in bench.json" in html
    assert "size not measured" not in html


# --- axes


@pytest.mark.parametrize(("low", "high"), [(4.1, 48.0), (1.0, 1.0), (0.003, 900.0), (9.99, 10.01), (1e-7, 5e4)])
def test_log_ticks_enclose_and_grow(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert found[0] <= low * (1 + 1e-6)
    assert found[-1] >= high * (1 - 1e-6)
    assert 2 <= len(found) <= 13
    assert all(after > before for before, after in itertools.pairwise(found))
    assert {f"{value / 10 ** math.floor(math.log10(value) + 1e-9):.3g}" for value in found} <= {"1", "2", "5"}


@pytest.mark.parametrize("log_y", [False, True])
def test_one_point_lies_inside(log_y: bool) -> None:
    chart = plot(
        Frame(title="", x_label="", y_label="", log_y=log_y),
        [Curve(label="", tone=0, dots=(Dot(x=3.0, y=7.0),))],
    )
    (dot,) = chart.lines[0].dots
    assert chart.left <= dot.x <= chart.right
    assert chart.top <= dot.y <= chart.bottom
    assert chart.lines[0].path == ""
