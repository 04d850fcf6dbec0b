"""Two reports side by side: speeds of different machines are refused, or marked as not comparable."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paredown.optimizer import machine, report
from paredown.optimizer.errors import RecipeError

from .example_report import Json, full_report, hostile_report, null_report, served_report, slower_report
from .tiny import optimize

REFUSED = (
    "the reports are of different machines: {}; measure both on one, or add --across-machines to compare sizes and "
    "accuracy alone"
)


def _diff(first: Json | Path, second: Json | Path, *, across_machines: bool = False) -> dict[str, str]:
    """Return the lines that were printed, by their first cell; "" is the whole text."""
    console = Console(file=io.StringIO(), record=True, width=400)
    report.diff(first, second, console, across_machines=across_machines)
    shown = console.export_text()
    return {line.split("  ")[0].strip(): line.rstrip() for line in shown.splitlines() if line} | {"": shown}


def _changed(**cpu: object) -> Any:
    """Return the full report, of another machine."""
    other: Any = copy.deepcopy(full_report())
    other["environment"]["cpu"] |= cpu
    return other


def test_diff_marks_what_differs(tmp_path: Path) -> None:
    other: Any = slower_report() | {"environment": full_report()["environment"]}
    other["layers"] = [row | {"bits": 3.2} if row["name"] == "fc" else row for row in other["layers"]]
    report.write(other, tmp_path)
    lines = _diff(full_report(), tmp_path)
    assert lines[""].startswith("A  Faster")
    assert lines["latency p50, model.onnx, batch 1, 1 thread"].endswith("*")
    assert not lines["latency p50, original.onnx, batch 1, 1 thread"].endswith("*")
    assert not lines["weights on disk"].endswith("*")
    assert "3.2 bits" in lines["fc"]
    assert "layer1.0.conv1" not in lines[""]


def test_a_difference_inside_intervals_is_called_so() -> None:
    lines = _diff(full_report(0.56), full_report(0.565))
    assert lines["times the original, model.onnx, batch 1, 1 thread"].endswith("within intervals")
    assert lines["samples per s, model.onnx, batch 1, 1 thread"].endswith("*")


@pytest.mark.parametrize("example", [full_report, slower_report, served_report, hostile_report, null_report])
def test_diff_takes_nulls_on_either_side(example: Callable[[], Json]) -> None:
    shown = _diff(example(), null_report(), across_machines=True)[""]
    assert shown.splitlines()[1].startswith("B  Speed not measured")


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (_changed(model="AMD EPYC", cores=64), "cpu model Intel(R) Xeon(R) Processor and AMD EPYC, cores 2 and 64"),
        (
            _changed(flags=["avx2", "avx_vnni"]),
            "instruction sets (avx512_vnni, amx_int8 only in the first, avx_vnni only in the second)",
        ),
        (full_report() | {"environment": None}, "the second does not say which"),
    ],
)
def test_other_machines_are_refused_in_one_sentence(other: Json, differing: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _diff(full_report(), other)
    assert str(caught.value) == "diff: " + REFUSED.format(differing)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("path", "first", "second", "says"),
    [
        (("cpu", "governor"), "powersave", "performance", "governor powersave and performance"),
        (("cpu", "governor"), None, "performance", "governor not recorded and performance"),
        (("power_mode",), "MAXN", "15W", "power mode MAXN and 15W"),
        (("kernels",), "avx2", "avx512vnni", "kernels avx2 and avx512vnni"),
        (("threads_env",), {}, {"OMP_NUM_THREADS": "1"}, "thread variables none and OMP_NUM_THREADS=1"),
        (("packages", "onnxruntime"), "1.30.0", "1.31.1", "onnxruntime version 1.30.0 and 1.31.1"),
        (("packages", "paredown"), "0.5", "0.6", ""),
        (("git_commit",), "a", "b", ""),
    ],
)
def test_what_a_speed_depends_on(path: tuple[str, ...], first: object, second: object, says: str) -> None:
    sides = [_changed(), _changed()]
    for side, value in zip(sides, (first, second), strict=True):
        inner = side["environment"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    assert machine.differences(*sides) == ([says] if says else [])
    assert (machine.fingerprint(sides[0]) == machine.fingerprint(sides[1])) is (says == "")


def test_a_fact_that_an_earlier_version_did_not_record_is_no_difference() -> None:
    other = _changed()
    other["environment"]["power_mode"] = "MAXN"
    assert machine.differences(full_report(), other) == []


def test_the_power_mode_of_a_row_counts() -> None:
    other = _changed()
    other["bench"][0]["details"] = {"state": {"before": {"power_mode": "15W"}}}
    assert machine.facts(other)["power mode"] == "15W"


def test_across_machines_compares_sizes_and_accuracy_alone() -> None:
    other = _changed(model="AMD EPYC")
    other["final"]["size_bytes"] = 131072
    lines = _diff(full_report(), other, across_machines=True)
    speeds = [line for name, line in lines.items() if name.endswith("1 thread")]
    assert len(speeds) == 20
    assert all(line.endswith("not comparable") for line in speeds)
    assert lines["weights on disk"].endswith("*")
    assert not lines["top1"].endswith(("*", "comparable"))
    assert "Different machines: cpu model Intel(R) Xeon(R) Processor and AMD EPYC." in lines[""]


def test_the_command_refuses_benchmarks_of_other_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For bench.json by its folder, as for report.json."""
    served = served_report()
    for name, cores in (("one", 2), ("two", 4)):
        (tmp_path / name).mkdir()
        environment = _changed(cores=cores)["environment"]
        rows = [row | {"samples_ms": [[1.0]]} for row in served["bench"]]  # type: ignore[attr-defined]
        document = {"schema": "paredown.bench/1", "environment": environment, "rows": rows}
        (tmp_path / name / "bench.json").write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)
    refused = optimize(monkeypatch, "diff", "one", "two")
    assert (refused.code, refused.error) == (2, ["optimize: diff: " + REFUSED.format("cores 2 and 4")])
    told = optimize(monkeypatch, "diff", "one", "two", "--across-machines")
    assert (told.code, told.error) == (0, [])
    assert "not comparable" in told.out
    assert "results" not in told.out
    same = optimize(monkeypatch, "diff", "one", "one/bench.json")
    assert same.code == 0
    assert "*" not in same.out
    assert "samples_ms" not in json.dumps(report.read(tmp_path / "one"))
