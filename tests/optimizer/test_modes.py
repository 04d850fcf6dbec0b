"""How layers compute, told where people look: the report, the plan, the terminal, and what a missing library means."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from paredown.kernels import native
from paredown.optimizer import report, store
from paredown.optimizer.report_summary import computing

from .tiny import edit, optimize, project

RUN = ("run", "recipe.yaml", "--out", "out")
STEP = "quantizer: kmeans, bits: 4"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project(tmp_path))
    return tmp_path


def finished(here: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> dict[str, Any]:
    edit(here / "recipe.yaml", STEP, changed)
    outcome = optimize(monkeypatch, *RUN)
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads((here / "out" / "report.json").read_text())
    return found


def shown(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=300)
    report.show(found, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_a_run_with_rounded_inputs_tells_where(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    found = finished(here, monkeypatch, f"{STEP}, group: 24, activations: dynamic")
    modes = {row["name"]: row["mode"] for row in found["layers"]}
    assert modes == {"conv1.weight": "decoded", "conv2.weight": "decoded", "linear.weight": "int8 dynamic"}
    assert store.load(here / "out").dynamic == {"linear.weight"}
    kept = {row["layer"]: row for row in found["decisions"] if "kept" in row and row["layer"] != "*"}
    assert kept["linear.weight"]["kept"] == "kmeans, 4 bits, inputs int8"
    assert kept["linear.weight"]["reason"] == "as the recipe says"
    lacks = "its scales are of groups of 24 inputs, convolutions need one scale per row (group: 0)"
    why = f"as the recipe says; decoded to floats at load: {lacks}"
    assert kept["conv1.weight"]["reason"] == kept["conv2.weight"]["reason"] == why
    notes = [row["reason"] for row in found["decisions"] if row["layer"] == "*"]
    assert f"inputs are not rounded: conv1, conv2 ({lacks})" in notes
    plan = yaml.safe_load((here / "out" / "plan.yaml").read_text())["steps"][0]["quantize"]
    assert [plan[name].get("activations") for name in modes] == [None, None, "dynamic"]
    assert computing(found) == (
        "Layers: 2 decoded to floats at load, 1 packed (int8 dynamic); "
        "kernels: none, the portable bodies of the file ran."
    )
    assert "inputs int8" in shown(found)
    assert computing(found) in " ".join(shown(found).split())
    assert "int8 dynamic" in (here / "out" / "report.html").read_text()


def test_a_missing_library_is_a_row(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    found = finished(here, monkeypatch, STEP)
    assert found["layers"][-1]["mode"] == "exact"
    rows = [row for row in found["decisions"] if row.get("fallback") == "portable bodies"]
    assert [row["layer"] for row in rows] == ["*"]
    assert rows[0]["reason"].startswith("the kernels for packed weights are not built here")
    assert found["environment"]["kernels"] is None
    assert {row["runtime"] for row in found["verify"]} == {"onnxruntime without kernels"}


@pytest.mark.skipif(not native.available(), reason="the CPU kernels were not built here")
def test_the_library_computes_what_the_file_says(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = finished(here, monkeypatch, f"{STEP}, activations: dynamic")
    assert {row["mode"] for row in found["layers"]} == {"int8 dynamic"}
    assert found["environment"]["kernels"] == ", ".join(native.isas())
    assert {row["runtime"] for row in found["verify"]} == {"onnxruntime with kernels"}
    assert not [row for row in found["decisions"] if row.get("fallback") == "portable bodies"]


def test_layers_that_no_step_touched_are_dense(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = finished(here, monkeypatch, f"{STEP}, layers: [linear]")
    assert [row["mode"] for row in found["layers"]] == ["exact", "dense", "dense"]
    assert [row["name"] for row in found["layers"]] == ["linear.weight", "conv1.weight", "conv2.weight"]


def test_without_a_file_only_what_is_sure_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "recipe.yaml", "export: [onnx]\n", "")
    found = finished(here, monkeypatch, f"{STEP}, activations: dynamic, skip: [conv2]")
    modes = {row["name"]: row["mode"] for row in found["layers"]}
    assert modes == {"conv1.weight": "int8 dynamic", "conv2.weight": "dense", "linear.weight": "int8 dynamic"}


@pytest.mark.slow
def test_a_plan_is_replayed_with_its_activations(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(here, monkeypatch, f"{STEP}, activations: dynamic")
    edit(here / "out" / "plan.yaml", "activations: dynamic, ", "")
    again = optimize(monkeypatch, "run", "recipe.yaml", "--plan", "out/plan.yaml", "--out", "again")
    assert again.code == 0, again.err
    assert store.load(here / "again").dynamic == frozenset()


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (f"{STEP}, activations: dynamical", "activations"),
        (
            f"{STEP}, table: fp16, activations: dynamic, layers: [conv1, conv2]",
            "activations: dynamic needs a layer of",
        ),
        (f"{STEP}, table: fp16, activations: dynamic", "activations: dynamic needs a layer of"),
    ],
)
def test_bad_combinations_are_one_line(here: Path, monkeypatch: pytest.MonkeyPatch, changed: str, text: str) -> None:
    edit(here / "recipe.yaml", STEP, changed)
    outcome = optimize(monkeypatch, *RUN)
    assert outcome.code == 2
    (line,) = outcome.error
    assert text in line
