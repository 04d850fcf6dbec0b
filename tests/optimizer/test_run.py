"""The whole pipeline on a tiny network: what is in the folder, what the report says, and what each gate does."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from paredown.exporters import onnx as target
from paredown.optimizer import report, store
from paredown.optimizer.never_slower import Measured, Timing, Whole

from .tiny import Outcome, edit, listing, optimize, project

RUN = ("run", "recipe.yaml", "--out", "out")
FOLDER = {
    *("model.safetensors", "model.json", "model.onnx", "plan.yaml", "recipe.yaml", "report.json", "report.html"),
    "history.jsonl",
    *("source", "source/net.py"),
}
LAYERS = {"conv1.weight": (8, 27), "conv2.weight": (16, 72), "linear.weight": (10, 16)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as the current folder."""
    monkeypatch.chdir(project(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A project with its output folder, and what the command said."""
    folder = project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, optimize(patch, *RUN)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_the_folder_holds_what_is_documented(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    assert (outcome.code, outcome.error) == (0, [])
    assert listing(folder / "out") == FOLDER
    assert listing(folder) == {"net.py", "net.safetensors", "recipe.yaml", "out"} | {f"out/{name}" for name in FOLDER}
    assert "smaller" in outcome.out
    assert outcome.out.endswith("report: out/report.html\n")
    modes = {(folder / "out" / name).stat().st_mode & 0o777 for name in FOLDER if not name.startswith("source")}
    assert len(modes) == 1


def test_the_report_has_the_keys_of_the_contract_in_order(finished: tuple[Path, Outcome]) -> None:
    found = report_of(finished[0] / "out")
    assert list(found)[: len(report.KEYS)] == list(report.KEYS)
    for key, wanted in report.KEYS.items():
        rows = found[key] if isinstance(found[key], list) else [found[key]]
        assert all(list(row)[: len(wanted)] == list(wanted) for row in rows if wanted)
    assert found["schema"] == "paredown.report/1"
    assert found["command"] == "optimize run recipe.yaml --out out"
    assert [len(found[key]) for key in ("steps", "layers", "verify", "bench")] == [1, 3, 2, 0]


def test_the_sizes_are_those_on_disk(finished: tuple[Path, Outcome]) -> None:
    folder, found = finished[0], report_of(finished[0] / "out")
    stored, dense = load_file(folder / "out/model.safetensors"), load_file(folder / "net.safetensors")
    assert found["final"]["size_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["baseline"]["size_bytes"] == sum(tensor.nbytes for tensor in dense.values())
    sizes = {layer: sum(t.nbytes for name, t in stored.items() if name.startswith(f"{layer}:")) for layer in LAYERS}
    assert {row["name"]: row["size_bytes"] for row in found["layers"]} == sizes
    weights = sum(rows * columns for rows, columns in LAYERS.values())
    assert found["final"]["bits_per_weight"] == pytest.approx(8 * sum(sizes.values()) / weights)
    assert 4 < found["final"]["bits_per_weight"] < 5
    assert found["baseline"]["parameters"] == sum(t.numel() for name, t in dense.items() if "running" not in name) - 1
    macs = 27 * 8 * 144 + 72 * 16 * 36 + 16 * 10
    assert (found["baseline"]["macs"], found["final"]["macs"]) == (macs, macs)


def test_the_errors_of_the_layers_are_sane(finished: tuple[Path, Outcome]) -> None:
    found = report_of(finished[0] / "out")
    errors = [row["error_rel"] for row in found["layers"]]
    assert all(0.005 < error < 0.1 for error in errors)
    assert found["steps"][0]["error_rel"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert found["steps"][0]["metric"] is None
    assert [row["shape"] for row in found["layers"]] == [[8, 3, 3, 3], [16, 8, 3, 3], [10, 16]]
    kept = [row["layer"] for row in found["decisions"] if row.get("kept") == "kmeans, 4 bits"]
    assert kept == list(LAYERS)


def test_the_file_computes_what_the_stored_model_does(finished: tuple[Path, Outcome]) -> None:
    folder, found = finished[0] / "out", report_of(finished[0] / "out")
    assert [(row["batch"], row["first_bad_layer"]) for row in found["verify"]] == [(1, None), (3, None)]
    assert all(row["rel"] <= 1e-4 for row in found["verify"])
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 12, 12)
    (have,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        want = store.load(folder).module()(x).numpy()
    assert np.abs(have - want).max() <= 1e-4 * np.abs(want).max()


def test_the_metric_is_that_of_the_file(finished: tuple[Path, Outcome]) -> None:
    folder, found = finished[0], report_of(finished[0] / "out")
    session = onnxruntime.InferenceSession(folder / "out/model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(50, 3, 12, 12, generator=torch.Generator().manual_seed(9))
    share = float((session.run(None, {"x": x.numpy()})[0].argmax(1) == 3).mean())
    assert found["final"]["metric"] == {"name": "score", "value": share, "n": 50}
    before = found["baseline"]["metric"]["value"]
    assert found["final"]["drop"] == pytest.approx(100 * (before - share))
    low, high = found["final"]["drop_ci95"]
    assert low <= found["final"]["drop"] <= high


def test_a_folder_loads_alone_and_trains_on(finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "out", tmp_path / "elsewhere")
    module = store.load(tmp_path / "elsewhere").module()
    assert isinstance(module, nn.Module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    x, y = torch.randn(32, 3, 12, 12), torch.randint(0, 10, (32,))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


BENCH = "bench={processes: 1, min_seconds: 0.02, warmup_seconds: 0.02, peak_rss: false, meter: none}"


def _measures(monkeypatch: pytest.MonkeyPatch, ratios: dict[str, float], network: float) -> None:
    """Let a clock find these ratios of layers, and of the network with all of them compressed."""
    from paredown.bench import trial

    def timing(ratio: float) -> Timing:
        ends = (ratio - 0.01, ratio + 0.01)
        return Timing(condition="batch 1, 1 thread", before_us=10, after_us=10 * ratio, ratio=ratio, ci95=ends)

    def layers(self: Any, model: Any, names: Any) -> list[Measured]:
        return [Measured(layers=(name,), timings=(timing(ratios[name]),)) for name in names]

    def whole(self: Any, candidates: Any) -> Whole:
        rows = tuple((timing(network),) for _ in candidates)
        return Whole(candidates=rows, last_to_first=(timing(1.0),))

    monkeypatch.setattr(trial.Trial, "layers", layers)
    monkeypatch.setattr(trial.Trial, "whole", whole)


def test_what_does_not_pay_falls_back_and_a_replay_is_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measures(monkeypatch, {"conv1.weight": 1.3, "conv2.weight": 0.5, "linear.weight": 1.0}, 0.7)
    assert optimize(monkeypatch, *RUN, "--set", BENCH).code == 0
    found = report_of(here / "out")
    modes = {row["name"]: row["mode"] for row in found["layers"]}
    assert (modes["conv1.weight"], modes["linear.weight"]) == ("dense", "exact")
    reasons = {row["layer"]: row["reason"] for row in found["decisions"] if "conv1" in row["layer"]}
    assert reasons["conv1.weight"].startswith("slower at batch 1, 1 thread: 1.30 times as long (1.29 to 1.31)")
    plan = yaml.safe_load((here / "out" / "plan.yaml").read_text())
    assert "1.30 times as long" in str(plan)

    monkeypatch.undo()
    monkeypatch.chdir(here)
    again = ("run", "recipe.yaml", "--plan", "out/plan.yaml", "--out", "again", "--set", BENCH)
    assert optimize(monkeypatch, *again).code == 0
    for name in ("plan.yaml", "model.onnx", "model.safetensors"):
        assert (here / "out" / name).read_bytes() == (here / "again" / name).read_bytes()


def test_a_network_that_does_not_pay_is_the_original(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measures(monkeypatch, dict.fromkeys(LAYERS, 0.9), 1.5)
    assert optimize(monkeypatch, *RUN, "--set", BENCH).code == 0
    found = report_of(here / "out")
    assert {row["mode"] for row in found["layers"]} == {"dense"}
    (whole,) = [row for row in found["decisions"] if row.get("fallback") == "the original"]
    assert whole["reason"].startswith("the whole network is slower at batch 1, 1 thread: 1.50 times as long")


def test_strict_refuses_what_does_not_pay(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _measures(monkeypatch, {"conv1.weight": 1.3, "conv2.weight": 0.5, "linear.weight": 1.0}, 0.7)
    outcome = optimize(monkeypatch, *RUN, "--strict", "--set", BENCH)
    assert outcome.code == 4
    assert 'layer "conv1" would stay dense: slower at batch 1, 1 thread: 1.30 times' in outcome.error[0]


@pytest.mark.slow
def test_layers_and_network_are_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimize(monkeypatch, *RUN, "--set", BENCH).code == 0
    reasons = " ".join(row["reason"] for row in report_of(here / "out")["decisions"])
    assert "times as long" in reasons
    assert not list((here / "out").glob(".trial*"))


@pytest.mark.slow
def test_bench_measures_the_original_beside_the_result(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paredown.bench import edge
    from paredown.bench.rows import Row

    real = edge.run

    def fast(artifacts: Any, spec: edge.Spec, *more: Any) -> list[Row]:
        return real(artifacts, dataclasses.replace(spec, min_seconds=0.05, warmup_seconds=0.1, processes=1), *more)

    monkeypatch.setattr(edge, "run", fast)
    edit(here / "recipe.yaml", "export: [onnx]", "export: [onnx]\nbench: {batch: [2], threads: [1]}")
    assert optimize(monkeypatch, *RUN).code == 0
    assert listing(here / "out") == FOLDER | {"baseline.onnx"}
    rows = report_of(here / "out")["bench"]
    assert [(row["artifact"], row["batch"], row["threads"]) for row in rows] == [
        ("baseline.onnx", 2, 1),
        ("model.onnx", 2, 1),
    ]
    assert rows[0]["ratio_to_baseline"] == 1
    for row in rows:
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p90"] <= row["latency_ms_p99"]
        assert row["throughput_per_s"] > 0
        assert row["peak_rss_bytes"] > 1e7
    outcome = optimize(
        monkeypatch, "bench", "out/baseline.onnx", "out/model.onnx", "--out", "times", "--processes", "1"
    )
    assert (outcome.code, outcome.error) == (0, [])
    assert listing(here / "times") == {"bench.json", "bench.csv", "bench.html", "history.jsonl"}


def test_the_accuracy_gate_keeps_the_failed_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "net.py", "(model(x).argmax(1) == 3).double()", "float(type(model).__name__ == 'Net')")
    edit(here / "recipe.yaml", "export: [onnx]", "export: [onnx]\ngates: {max_drop: 2.5}")
    (here / "out.failed").mkdir()
    outcome = optimize(monkeypatch, *RUN)
    told = (
        "optimize: recipe.yaml:7: score fell by 100.00 points, gates.max_drop allows 2.5; "
        'use more bits, or keep the worst layers of the report dense with skip (see "out.failed")'
    )
    assert (outcome.code, outcome.error) == (5, [told])
    assert not (here / "out").exists()
    assert listing(here / "out.failed") == FOLDER
    found = report_of(here / "out.failed")
    assert found["final"]["drop"] == 100
    assert found["failure"].startswith("recipe.yaml:7: score fell by 100.00 points")
    assert not [path.name for path in here.iterdir() if path.name.startswith(".")]


def test_a_wrong_file_fails_and_names_the_layer(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = target.export

    def wrong(model: Any, path: Path, options: Any) -> None:
        real(model, path, options)
        file = onnx.load(path)
        bias = next(item for item in file.graph.initializer if item.name == "conv2.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
        onnx.save(file, path)

    monkeypatch.setattr(target, "export", wrong)
    outcome = optimize(monkeypatch, *RUN)
    assert outcome.code == 6
    (line,) = outcome.error
    assert re.match(r"optimize: model.onnx in onnxruntime with(out)? kernels: outputs differ from torch by ", line)
    assert ", first in conv2 (" in line
    assert line.endswith('(see "out.failed")')
    assert not (here / "out").exists()
    assert listing(here / "out.failed") == FOLDER
    assert report_of(here / "out.failed")["final"]["metric"] is None
    assert "outputs differ" in report_of(here / "out.failed")["failure"]


def test_force_replaces_what_optimize_made(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "recipe.yaml", "export: [onnx]", "export: []")
    assert optimize(monkeypatch, *RUN).code == 0
    assert listing(here / "out") == FOLDER - {"model.onnx"}
    outcome = optimize(monkeypatch, *RUN, "--force", "--set", "steps.0.quantize.bits=3")
    assert outcome.code == 0
    assert {row["bits"] for row in report_of(here / "out")["layers"]} == {3}
    assert not [path.name for path in here.iterdir() if path.name.startswith(".")]


def test_the_seed_is_kept_and_changes_the_result(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "recipe.yaml", "export: [onnx]", "export: []")
    for seed in ("0", "0", "1"):
        assert optimize(monkeypatch, "run", "recipe.yaml", "--out", "out", "--force", "--seed", seed).code == 0
        (here / "out").rename(here / f"out-{seed}-{len(listing(here))}")
    first, second, third = sorted(here.glob("out-*"), key=lambda path: path.stat().st_mtime_ns)
    weights = [(path / "model.safetensors").read_bytes() for path in (first, second, third)]
    assert weights[0] == weights[1] != weights[2]
    assert report_of(third)["seed"] == yaml.safe_load((third / "recipe.yaml").read_text())["seed"] == 1


def test_a_dry_run_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(here)
    outcome = optimize(monkeypatch, *RUN, "--dry-run")
    assert (outcome.code, outcome.error) == (0, [])
    assert "  conv2: 16 x 72, 4608 bytes -> kmeans, 4 bits (as the recipe says)\n" in outcome.out
    assert "3 layers on 16 samples: about 1 s and " in outcome.out
    assert outcome.out.endswith("nothing was written\n")
    assert listing(here) == before


def test_a_plan_is_printed_and_replayed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "recipe.yaml", "export: [onnx]", "export: []")
    planned = optimize(monkeypatch, "plan", "recipe.yaml", "--set", "steps.0.quantize.skip=[linear]")
    assert planned.code == 0
    data = yaml.safe_load(planned.out)
    assert data["steps"][0]["quantize"]["linear.weight"] == {"keep": "skipped by the recipe"}
    (here / "edited.yaml").write_text(planned.out.replace("bits: 4", "bits: 2", 1))
    assert optimize(monkeypatch, *RUN, "--plan", "edited.yaml").code == 0
    assert {row["name"]: row["bits"] for row in report_of(here / "out")["layers"]} == {
        "conv1.weight": 2,
        "conv2.weight": 4,
        "linear.weight": 32,
    }
    assert yaml.safe_load((here / "out/plan.yaml").read_text()) == yaml.safe_load((here / "edited.yaml").read_text())


def test_a_plan_explains_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = optimize(monkeypatch, "plan", "recipe.yaml", "--explain")
    assert outcome.code == 0
    assert outcome.out.endswith(
        "quantize (recipe.yaml:5)\n"
        "  conv1: 8 x 27, 864 bytes -> kmeans, 4 bits (as the recipe says)\n"
        "  conv2: 16 x 72, 4608 bytes -> kmeans, 4 bits (as the recipe says)\n"
        "  linear: 10 x 16, 640 bytes -> kmeans, 4 bits (as the recipe says)\n"
    )


@pytest.fixture
def with_position(here: Path) -> Path:
    """A network with a parameter that is added, which no quantizer can take."""
    edit(here / "net.py", "self.bn = ", "self.position = nn.Parameter(torch.zeros(8, 12, 12))\n        self.bn = ")
    edit(here / "net.py", "self.bn(self.conv1(x))", "self.bn(self.conv1(x)) + self.position")
    edit(here / "recipe.yaml", ", checkpoint: net.safetensors", "")
    edit(here / "recipe.yaml", "export: [onnx]", "export: []")
    return here


def test_a_fallback_is_a_row(with_position: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimize(monkeypatch, *RUN).code == 0
    row = {"layer": "position", "reason": "no operator that paredown knows multiplies it", "fallback": "dense"}
    assert row in report_of(with_position / "out")["decisions"]


def test_strict_refuses_a_fallback(with_position: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(with_position)
    told = (
        'optimize: recipe.yaml:5: layer "position" would stay dense: no operator that paredown knows multiplies it; '
        "name it in skip, or run without --strict"
    )
    for more in (("--strict",), ("--strict", "--dry-run")):
        outcome = optimize(monkeypatch, *RUN, *more)
        assert (outcome.code, outcome.error) == (4, [told])
        assert listing(with_position) == before
    skip = ("--set", "steps.0.quantize.skip=[position, linear]")
    assert optimize(monkeypatch, *RUN, "--strict", *skip).code == 0


def test_feedback_that_cannot_be_is_a_row(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    net += "        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)\n\n"
    net += "    def forward(self, ids):\n        return self.head(self.table(ids).mean(1))\n\n"
    net += "def build():\n    return Net()\n\n"
    net += "def calibration(samples):\n    return torch.arange(samples * 5).view(-1, 5) % 20\n"
    (here / "net.py").write_text("import torch\nfrom torch import nn\n\n" + net)
    recipe = 'model: {entry: "net.py:build", inputs: {ids: {shape: [batch, 5], dtype: int64}}}\n'
    recipe += 'data: {entry: "net.py:calibration", samples: 16}\n'
    recipe += "steps:\n  - quantize: {quantizer: kmeans, bits: 4, feedback: true}\n"
    (here / "recipe.yaml").write_text(recipe)
    assert optimize(monkeypatch, *RUN, "--strict").code == 0
    lacking = [row for row in report_of(here / "out")["decisions"] if row.get("fallback")]
    reason = "an embedding looks rows up, so that there is no error to feed back"
    assert lacking == [{"layer": "table.weight", "reason": reason, "fallback": "without error feedback"}]


def test_the_verbs_on_a_folder(finished: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished[0]
    monkeypatch.chdir(folder)
    before = (folder / "out/model.onnx").read_bytes()
    verified = optimize(monkeypatch, "verify", "out")
    assert (verified.code, verified.error) == (0, [])
    *lines, last = [line.split(":")[0] for line in verified.out.splitlines()]
    assert re.fullmatch(r"\d+ tensors of model.onnx are those of the stored model to the bit", last)
    assert [re.sub("with(out)?", "?", line) for line in lines] == [f"onnxruntime ? kernels batch {n}" for n in (1, 3)]
    *portable, same = optimize(monkeypatch, "verify", "out", "--no-kernels").out.splitlines()
    assert same == last
    assert [line.split(":")[0] for line in portable] == [f"onnxruntime without kernels batch {n}" for n in (1, 3)]
    exported = optimize(monkeypatch, "export", "out", "--force")
    assert (exported.code, exported.out) == (0, "out/model.onnx\n")
    assert (folder / "out/model.onnx").read_bytes() == before
    assert listing(folder / "out") == FOLDER
    shown = optimize(monkeypatch, "show", "out")
    assert shown.code == 0
    assert "conv2.weight" in shown.out
    compared = optimize(monkeypatch, "diff", "out", "out")
    assert (compared.code, compared.error) == (0, [])
    assert compared.out


def test_a_checkpoint_alone_runs_the_default_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    names = ("--entry", "net.py:build", "--data", "net.py:calibration", "--input", "x=batch,3,12,12", "--samples", "16")
    quick = ("--set", "bench=null", "--set", "export=[]")
    outcome = optimize(monkeypatch, "net.safetensors", *names, "--metric", "net.py:score", *quick)
    assert (outcome.code, outcome.error) == (0, [])
    found = report_of(here / "net-optimized")
    assert [row["format"] for row in found["layers"]] == ["codebook 4"] * 3
    assert found["steps"][0]["spec"]["quantizer"] == "lnq"
    assert found["baseline"]["metric"]["name"] == "score"


def test_doctor_says_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = optimize(monkeypatch, "doctor")
    assert outcome.code == 0
    assert f"ok  torch {torch.__version__}" in outcome.out


def test_a_metric_may_name_its_arguments(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "net.py", "model(x).argmax", "model(x=x).argmax")
    assert optimize(monkeypatch, *RUN).code == 0
    assert report_of(here / "out")["final"]["metric"]["n"] == 50
