"""Baselines as rows of the table: what is kept, what is missing and why, the ratio to ours, and who is told to win."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paredown.bench import baselines, baselines_run, compare, edge
from paredown.bench.rows import Row
from paredown.exporters import onnx as target
from paredown.exporters import onnx_baselines, trtexec
from paredown.optimizer import verdict
from paredown.optimizer.errors import ExportError, RecipeError
from paredown.optimizer.metric import evaluate

from .conftest import World

QUICK = edge.Spec(
    min_seconds=0.5, min_count=20, warmup_seconds=0.2, peak_rss=False, processes=3, fresh="session", meter="none"
)
SLOW, OURS, FAST = (lambda _: 0.004), (lambda _: 0.002), (lambda _: 0.001)


@pytest.fixture
def made(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world in which int8 and fp16 can be made, as runners of known speed, and matmulnbits cannot."""

    def make(name: str, _original: Path, path: Path, _feeds: Any) -> str:
        if name == "matmulnbits":
            raise ExportError("it has no product with a constant matrix for MatMulNBits", where=name)
        world.add(path.name, FAST if name == "int8" else SLOW)
        path.write_bytes(b"1" * (100 if name == "int8" else 400))
        return f"made by {name}"

    monkeypatch.setattr(onnx_baselines, "make", make)
    monkeypatch.setattr(target, "open", lambda path, _options=None: world.runners[path.name])
    world.add("baseline.onnx", SLOW).write_bytes(b"1" * 800)
    world.add("model.onnx", OURS).write_bytes(b"1" * 200)
    return world


def _wanted(world: World, *names: str) -> baselines.Wanted:
    feeds = ({"x": np.zeros((2, 3, 8, 8), np.float32)},)
    return baselines.Wanted(names=names, original=world.folder / "baseline.onnx", folder=world.folder, feeds=feeds)


def _rows(world: World, prepared: baselines.Prepared, *files: str) -> list[Row]:
    artifacts = (*(world.folder / name for name in files), *prepared.paths)
    return baselines.complete(edge.run(artifacts, QUICK, world.open), artifacts, prepared)


def test_baselines_are_rows_of_the_same_rounds(made: World) -> None:
    prepared = baselines.prepare(_wanted(made, "int8", "fp16"))
    rows = _rows(made, prepared, "baseline.onnx", "model.onnx")
    assert [row.artifact for row in rows] == ["baseline.onnx", "model.onnx", "baseline.int8.onnx", "baseline.fp16.onnx"]
    assert [row.details["size_bytes"] for row in rows] == [800, 200, 100, 400]
    assert [row.details.get("peer") for row in rows] == [None, None, "int8", "fp16"]
    assert len({len(row.samples) for row in rows}) == 1
    assert rows[2].details["how"] == "made by int8"
    assert rows[2].details["ratio_to_ours"] == pytest.approx(0.5, rel=0.05)
    assert rows[3].details["ratio_to_ours"] == pytest.approx(2.0, rel=0.05)


def test_what_cannot_be_made_is_a_decision_and_no_error(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtexec.shutil, "which", lambda _: None)
    prepared = baselines.prepare(_wanted(made, "matmulnbits", "trtexec", "int8"))
    assert [path.name for path in prepared.paths] == ["baseline.int8.onnx"]
    why = "it has no product with a constant matrix for MatMulNBits"
    assert prepared.decisions() == [
        {"layer": "*", "fallback": "no baseline matmulnbits", "reason": why},
        {"layer": "*", "fallback": "no baseline trtexec", "reason": "trtexec is not on this machine"},
    ]


def test_trtexec_is_a_row_with_both_times_and_no_ratio(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(path: Path, shapes: Any, _seconds: float) -> trtexec.Times:
        asked.append((path.name, dict(shapes)))
        return trtexec.Times(with_transfers=np.full(50, 0.003), compute=np.full(50, 0.002))

    monkeypatch.setattr(trtexec, "measure", measure)
    prepared = baselines.prepare(replace(_wanted(made, "trtexec"), batch=(2, 4)))
    rows = _rows(made, prepared, "baseline.onnx", "model.onnx")
    assert asked == [("baseline.onnx", {"x": (size, 3, 8, 8)}) for size in (2, 4)]
    row = rows[-1]
    assert (row.artifact, row.batch, row.latency_ms_p50, row.ratio_to_baseline) == ("trtexec", 4, 3.0, None)
    assert row.details["compute_ms_p50"] == 2.0
    assert row.throughput_per_s == pytest.approx(4 / 0.003)
    assert "not measured" not in compare.verdict(rows).lower()


def test_a_faster_baseline_is_told_after_ours(made: World) -> None:
    prepared = baselines.prepare(_wanted(made, "int8", "fp16"))
    reports = [row.report() for row in _rows(made, prepared, "baseline.onnx", "model.onnx")]
    first, second = verdict.speed(reports).splitlines()
    assert first.startswith("Faster: model.onnx runs ")
    assert second.startswith("baseline.int8.onnx is ")
    assert second.endswith(
        " times as fast as ours at batch 1, 1 thread, 2.00 times smaller; its accuracy was not compared."
    )
    assert not verdict.is_slower(reports)


@pytest.mark.parametrize(
    ("behind", "ends", "told"),
    [
        (0.1, [-0.3, 0.5], ", and no less accurate."),
        (-1.0, [-1.5, -0.5], ", and no less accurate."),
        (1.0, [0.5, 1.5], None),
        (0.0, None, ", and no less accurate."),
        (0.1, None, None),
    ],
)
def test_only_a_baseline_that_is_no_less_accurate_is_told(behind: float, ends: Any, told: str | None) -> None:
    rows: list[dict[str, object]] = [
        {"artifact": "baseline.onnx", "batch": 1, "threads": 1, "details": {"size_bytes": 800}},
        {"artifact": "model.onnx", "batch": 1, "threads": 1, "details": {"size_bytes": 200}},
        {
            "artifact": "baseline.int8.onnx",
            "batch": 1,
            "threads": 1,
            "details": {
                "peer": "int8",
                "size_bytes": 200,
                "behind_ours": behind,
                "behind_ours_ci95": ends,
                "ratio_to_ours": 0.8,
                "ratio_to_ours_ci95": [0.79, 0.81],
            },
        },
    ]
    wanted = "baseline.int8.onnx is 1.25 times as fast as ours at batch 1, 1 thread"
    assert verdict.rivals(rows) == ([] if told is None else [wanted + told])


def test_a_tie_is_not_told() -> None:
    details = {"peer": "fp16", "ratio_to_ours": 0.97, "ratio_to_ours_ci95": [0.95, 0.99], "size_bytes": 199}
    rows: list[dict[str, object]] = [
        {"artifact": "a"},
        {"artifact": "b", "details": {"size_bytes": 200}},
        {"artifact": "c", "details": details},
    ]
    assert verdict.rivals(rows) == []


def test_with_the_original_alone_the_baselines_are_what_is_compared(made: World) -> None:
    prepared = baselines.prepare(_wanted(made, "int8"))
    rows = _rows(made, prepared, "baseline.onnx")
    assert compare.verdict(rows).startswith("Faster: baseline.int8.onnx runs ")


def test_a_file_beside_the_original_is_taken(made: World, tmp_path: Path) -> None:
    made.add("baseline.int8.onnx", FAST).write_bytes(b"12345")
    (made.folder / "baseline.int8.onnx.data").write_bytes(b"678")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    prepared = baselines.prepare(replace(_wanted(made, "int8"), folder=folder, feeds=()))
    (path,) = prepared.paths
    assert baselines.file_bytes(path) == 8
    assert prepared.facts[path]["how"] == "the file beside the original"


def test_int8_without_data_says_that_its_inputs_were_random(made: World, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    prepared = baselines.prepare(replace(_wanted(made, "int8", "fp16"), folder=folder, feeds=()))
    assert [facts["how"] for facts in prepared.facts.values()] == [
        "made by int8; calibrated with random inputs",
        "made by fp16",
    ]


def test_names_are_checked() -> None:
    with pytest.raises(RecipeError, match=r'recipe\.yaml:3: there is no baseline "int4"; did you mean "int8"'):
        baselines.check(("int4",), "recipe.yaml:3")
    with pytest.raises(RecipeError, match='the baseline "int8" is named twice; name it once'):
        baselines.check(("int8", "int8"), "--baseline")


def test_the_score_is_paired_with_the_original_and_with_ours() -> None:
    before, after, found = (evaluate(np.repeat([1.0, 0.0], [n, 100 - n])) for n in (90, 80, 85))
    result = baselines_run.Result(original=Path("a"), ours=Path("b"), before=before, after=after)
    facts = baselines_run._score(found, result, seed=0)
    assert facts["metric"] == {"name": "metric", "value": 0.85, "n": 100}
    assert facts["drop"] == pytest.approx(5.0)
    assert facts["behind_ours"] == pytest.approx(-5.0)
    assert facts["drop_unit"] == "points"
    assert baselines_run._score(None, result, seed=0) == {}
