"""The proof of honest intervals counts what lies in the first interval, and says when it does not hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paredown.bench import repeat


def _document(ratio: float, half: float = 0.01) -> dict[str, object]:
    base = {"artifact": "a.onnx", "runtime": "onnxruntime", "scenario": "edge", "batch": 1, "threads": 1}
    first = base | {"ratio_to_baseline": 1.0, "ratio_ci95": [1.0, 1.0], "waited": 0.0, "details": {"processes": 6}}
    interval = [ratio * (1 - half), ratio * (1 + half)]
    second = first | {"artifact": "b.onnx", "ratio_to_baseline": ratio, "ratio_ci95": interval}
    return {"rows": [first, second], "environment": {"os": "x"}, "seconds": 6.0}


@pytest.mark.parametrize(
    ("ratios", "half", "inside", "holds"),
    [
        ([0.5] * 9 + [0.6], 0.01, 9, True),
        ([0.5] * 8 + [0.6, 0.4], 0.01, 8, False),
        ([0.5] * 10, 0.031, 10, False),
        ([0.5, 0.504, 0.496], 0.01, 3, True),
    ],
)
def test_nine_in_ten_and_three_percent(ratios: list[float], half: float, inside: int, holds: bool) -> None:
    (found,) = repeat.verdicts([_document(ratio, half) for ratio in ratios])
    assert (found["inside_first"], found["holds"]) == (inside, holds)
    assert found["half_width_first"] == pytest.approx(half)
    assert found["processes"] == [6] * len(ratios)


def test_the_file_holds_every_run(tmp_path: Path) -> None:
    repeat.write([_document(0.5), _document(0.502)], tmp_path / "results")
    document = json.loads((tmp_path / "results" / "intervals.json").read_text())
    assert document["times"] == 2
    assert document["environment"] == {"os": "x"}
    assert document["pairs"][0]["ratios"] == [0.5, 0.502]


def test_what_stands_after_two_dashes_goes_to_the_benchmark() -> None:
    asked, options = repeat.arguments(["a.onnx", "b.onnx", "--times", "3", "--out", "r", "--", "--batch", "32"])
    assert ([path.name for path in asked.artifacts], asked.times, options) == (
        ["a.onnx", "b.onnx"],
        3,
        ["--batch", "32"],
    )
    assert repeat.arguments(["a.onnx", "b.onnx", "--out", "r"])[1] == []
