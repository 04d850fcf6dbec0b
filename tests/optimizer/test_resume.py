"""A run that is killed or interrupted goes on from where it was, to the same bytes as a run that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from paredown.optimizer import planning

from .tiny import Outcome, edit, listing, optimize, project

MOMENTS = ("data 1", "metric 1", "layer 2", "layer 3", "metric 2")
"""The first and last calls of the user's functions, the second layer of step one, and the layer of step two."""
FILES = ("model.safetensors", "model.json", "plan.yaml", "recipe.yaml", "model.onnx")
RUN = ("run", "recipe.yaml", "--out", "out")
RESUMABLE = "optimize: interrupted; the layers that are finished are kept for --resume"
FINISHED = {"data 1": 0, "metric 1": 0, "layer 2": 1, "layer 3": 2, "metric 2": 3}
"""How many layers are finished at each moment."""

MOMENT = """
import os, time
from pathlib import Path
from typing import Any

counts = {}

def moment(name):
    '''Write down a call, and do what the file "die" says: "layer 2 9" = signal 9 at the second layer.'''
    counts[name] = counts.get(name, 0) + 1
    with open("calls", "a") as log:
        log.write(f"{name}\\n")
    if not Path("die").exists():
        return
    who, number, signal = Path("die").read_text().split()
    if (who, int(number)) == (name, counts[name]):
        if signal == "wait":
            Path("waiting").touch()
            time.sleep(60)
        os.kill(os.getpid(), int(signal))
        time.sleep(5)
"""
QUANTIZER = """
from paredown.optimizer.quantizers import kmeans
from own.moment import moment

Spec, needs = kmeans.Spec, kmeans.needs

def quantize(w, stats, spec):
    moment("layer")
    return kmeans.quantize(w, stats, spec)
"""
STEPS = """
  - quantize: {quantizer: own.quantizer, bits: 4, layers: ["conv*"]}
  - quantize: {quantizer: own.quantizer, bits: 8, layers: [linear]}
""".strip("\n")


def prepare(folder: Path) -> Path:
    """Write the project with two steps, whose functions and quantizer note their calls."""
    project(folder)
    edit(folder / "recipe.yaml", "  - quantize: {quantizer: kmeans, bits: 4}", STEPS)
    edit(folder / "net.py", "def calibration(samples, seed):", "def calibration(samples, seed):\n    moment('data')")
    edit(folder / "net.py", "def score(model):", "def score(model):\n    moment('metric')")
    edit(folder / "net.py", "from torch import nn", "from torch import nn\n\nfrom own.moment import moment")
    (folder / "own").mkdir()
    (folder / "own" / "__init__.py").touch()
    (folder / "own" / "moment.py").write_text(MOMENT)
    (folder / "own" / "quantizer.py").write_text(QUANTIZER)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as the current folder."""
    monkeypatch.chdir(prepare(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was left alone."""
    folder = prepare(tmp_path_factory.mktemp("alone"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(patch).code == 0
    return folder / "out"


def run(monkeypatch: pytest.MonkeyPatch, *more: str) -> Outcome:
    """Run in this process, as if it had just begun."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "own" or name.startswith("paredown_entry_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(Path.cwd())
    return optimize(monkeypatch, *RUN, *more)


def start(*more: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, "-c", "from paredown.optimizer import cli; cli.main()", *RUN, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calls(folder: Path) -> list[str]:
    """Return the calls noted since the last time."""
    path = folder / "calls"
    noted = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return noted


def assert_same(out: Path, other: Path) -> None:
    for name in FILES if (other / "model.onnx").exists() else FILES[:-1]:
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}
    assert measured(out) == measured(other)


def measured(out: Path) -> object:
    """Return what report.json says, times and memory left out."""
    report = json.loads((out / "report.json").read_text())
    for key in ("environment", "seconds", "command"):
        del report[key]
    for step in report["steps"]:
        del step["seconds"], step["peak_rss_bytes"]
    return report


def mostly_slow(names: Iterable[str], *fast: str) -> list[Any]:
    """Return parameters of which a few run always, and all where there is time."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("moment", mostly_slow(MOMENTS))
def test_a_killed_run_goes_on(moment: str, here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "die").write_text(f"{moment} 9")
    process = start()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (here / "out").exists()
    (here / "die").unlink()
    calls(here)
    assert run(monkeypatch, "--resume").code == 0
    assert calls(here).count("layer") == 3 - FINISHED[moment]
    assert_same(here / "out", alone)
    assert not [path.name for path in here.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize("moment", mostly_slow(MOMENTS, "layer 3"))
def test_an_interrupted_run_goes_on(moment: str, here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(here)
    (here / "die").write_text(f"{moment} {int(signal.SIGINT)}")
    outcome = run(monkeypatch)
    (here / "die").unlink()
    assert (outcome.code, outcome.error) == (130, [RESUMABLE if FINISHED[moment] else "optimize: interrupted"])
    left = {name.split("/")[0] for name in listing(here) - before - {"calls"}}
    assert left == ({".out.cache"} if FINISHED[moment] else set())
    calls(here)
    assert run(monkeypatch, "--resume").code == 0
    assert calls(here).count("layer") == 3 - FINISHED[moment]
    assert_same(here / "out", alone)
    assert listing(here) - before - {"calls"} == {"out", *(f"out/{name}" for name in listing(here / "out"))}


def test_a_run_without_resume_starts_over(here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(here, monkeypatch, "layer 3")
    assert run(monkeypatch).code == 0
    assert calls(here) == ["data", "metric", "layer", "layer", "layer", "metric"]
    assert_same(here / "out", alone)


def test_a_resumed_run_measures_nothing_twice(here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(here, monkeypatch, "metric 2")
    assert run(monkeypatch, "--resume").code == 0
    assert calls(here) == ["data", "metric"]
    assert_same(here / "out", alone)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(here: Path, alone: Path) -> None:
    process = start()
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_same(here / "out", alone)


def test_a_plan_replays_to_the_same_bytes(here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--plan", str(alone / "plan.yaml")).code == 0
    assert_same(here / "out", alone)


CHANGES = {
    "recipe": ("recipe.yaml", "bits: 4", "bits: 3", "layer"),
    "quantizer": ("own/quantizer.py", "moment(", "moment (", "layer"),
    "data": ("net.py", "manual_seed(seed)", "manual_seed(seed + 1)", "layer"),
    "network": ("net.py", "torch.relu(self.conv2(x))", "torch.tanh(self.conv2(x))", "layer"),
    "metric": ("net.py", "== 3", "== 4", "metric"),
}


@pytest.mark.parametrize("name", mostly_slow(CHANGES, "recipe"))
def test_what_was_changed_is_not_reused(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "recipe.yaml", "export: [onnx]", "export: []")
    interrupt(here, monkeypatch, "metric 2")
    path, old, new, again = CHANGES[name]
    edit(here / path, old, new)
    assert run(monkeypatch, "--resume").code == 0
    assert calls(here).count(again) == {"layer": 3, "metric": 2}[again]
    (here / "out").rename(here / "resumed")
    assert run(monkeypatch).code == 0
    assert_same(here / "resumed", here / "out")


def test_what_another_version_finished_is_not_reused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(here / "recipe.yaml", "export: [onnx]", "export: []")
    interrupt(here, monkeypatch, "metric 2")
    monkeypatch.setattr(planning, "code_sha256", lambda: "another version")
    assert run(monkeypatch, "--resume").code == 0
    assert calls(here) == ["data", "metric", "layer", "layer", "layer", "metric"]


@pytest.mark.slow
def test_a_second_run_to_one_folder_is_refused(here: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "die").write_text("layer 2 wait")
    process = start()
    deadline = time.monotonic() + 60
    while not (here / "waiting").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (here / "die").unlink()
    calls(here)
    try:
        for more in ((), ("--resume",), ("--force",)):
            outcome = run(monkeypatch, *more)
            told = 'another run is writing to the output folder "out"; wait for it, or use another --out'
            assert (outcome.code, outcome.error) == (2, [f"optimize: {told}"])
        assert calls(here) == []
    finally:
        process.kill()
        process.communicate()
    assert run(monkeypatch, "--resume").code == 0
    assert calls(here).count("layer") == 2
    assert_same(here / "out", alone)


def interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    (folder / "die").write_text(f"{moment} {int(signal.SIGINT)}")
    assert run(monkeypatch).code == 130
    (folder / "die").unlink()
    calls(folder)
