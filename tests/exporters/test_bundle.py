"""Bundles: what is in them, and that a board without this package builds, checks and refuses what it should.

The board is this machine with a stand-in for TensorRT, which runs engines in onnxruntime, and one for the CUDA runtime.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from paredown.exporters import bundle, bundle_boards, bundle_examples
from paredown.exporters.board import run as runner
from paredown.exporters.bundle import Options
from paredown.kernels.cuda import cubins, sources, units
from paredown.kernels.tensorrt import node
from paredown.optimizer import store
from paredown.optimizer.errors import ExportError, RecipeError
from paredown.optimizer.model import InputSpec, Model, Source, SourceFile, from_module

from ..optimizer.tiny import listing, optimize
from .conftest import packed

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parent / "kernels" / "nvinfer"
NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(512, 768), nn.ReLU(), nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 10))
"""
KNOWS_PLUGINS = '''

class _Registry:
    def load_library(self, path):
        with open(path, "rb") as file:
            return file.read() or None

    def get_creator(self, name, version, namespace):
        return (name, version, namespace) if os.environ.get("STANDIN_PLUGIN") else None


def get_plugin_registry():
    return _Registry()


class OnnxParser(OnnxParser):
    def parse_from_file(self, path):
        """A plugin computes what the plain graph does."""
        known = os.environ.get("STANDIN_PLUGIN") and path.endswith("model.plugin.onnx")
        return super().parse_from_file(path.replace(".plugin", "") if known else path)
'''


EMBEDS_PLUGINS = """
import sys

class TensorDesc: pass
class KernelLaunchParams: pass
class SymIntExprs: pass

def register(name, lazy_register):
    sys.stdout.write(f"registered {name}\\n")
    return lambda function: function

def aot_impl(name):
    return lambda function: function
"""


def model() -> Model:
    """Return a network with two layers that are worth codes in an engine."""
    made: dict[str, object] = {}
    exec(NET, made)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = made["net"]()  # type: ignore[operator]
    source = Source(entry="net.py:net", files=(SourceFile(name="net.py", text=NET),))
    found = from_module(module, (InputSpec(name="x", shape=("batch", 512)),), source)
    seeded = torch.Generator().manual_seed(0)
    forms = {"0.weight": "codebook 4", "2.weight": "codebook 3"}
    return found.with_weights({name: packed(found.weights[name].dense(), form, seeded) for name, form in forms.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a stored model."""
    made = tmp_path_factory.mktemp("stored") / "net"
    made.mkdir()
    store.save(model(), made)
    return made


@pytest.fixture(scope="module")
def orin(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for an Orin, made once."""
    return bundle.bundle(folder, "jetson-orin", tmp_path_factory.mktemp("bundles") / "orin", Options())


@pytest.fixture(scope="module")
def software(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a board has installed: the stand-ins, with the headers that a plugin is compiled with."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the CUDA runtime that stands in")
    made = tmp_path_factory.mktemp("software")
    (made / "python").mkdir()
    text = (HERE / "standin_tensorrt.py").read_text()
    (made / "python" / "tensorrt.py").write_text(text + KNOWS_PLUGINS)
    (made / "cuda" / "lib64").mkdir(parents=True)
    shutil.copytree(HEADERS, made / "cuda" / "include")
    library = made / "cuda" / "lib64" / "libcudart.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "standin_cudart.c"], check=True)
    return made


@dataclass(frozen=True, slots=True)
class Board:
    """A copy of a bundle on a machine, and the environment that its commands see."""

    folder: Path
    environment: dict[str, str]
    tools: Path = field(default_factory=Path)

    def run(self, *command: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the bundle from another folder."""
        path, *rest = command
        environment = {**self.environment, **changed}
        whole = (
            [str(self.folder / path), *rest] if path.endswith(".sh") else [sys.executable, self.folder / path, *rest]
        )
        return subprocess.run(
            whole, cwd=self.folder.parent, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    def tool(self, name: str, text: str) -> None:
        """Put a program into the first place of the path."""
        path = self.tools / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)

    def sign(self) -> None:
        """Write the checksums anew."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != bundle.SUMS)
        files = [path for path in files if "build" not in path.relative_to(self.folder).parts[:-1]]
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(self.folder).as_posix()}\n"
            for path in files
        ]
        (self.folder / bundle.SUMS).write_text("".join(lines))


@pytest.fixture
def board(orin: Path, software: Path, tmp_path: Path) -> Board:
    shutil.copytree(orin, tmp_path / "bundle")
    (tools := tmp_path / "tools").mkdir()
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(software / "python"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LD_LIBRARY_PATH": str(software / "cuda" / "lib64"),
        "CUDA_HOME": str(software / "cuda"),
        "TENSORRT_INCLUDE": str(software / "cuda" / "include"),
        "OMP_NUM_THREADS": "1",
    }
    return Board(tmp_path / "bundle", environment, tools)


# --- what is in a bundle


def test_a_bundle_holds_all_that_a_board_needs(orin: Path) -> None:
    files = {path for path in listing(orin) if (orin / path).is_file()}
    kernels = {name.removeprefix("kernels/") for name in files if name.startswith("kernels/")}
    assert files - {f"kernels/{name}" for name in kernels} == {
        *("README.md", "SHA256SUMS", "build.sh", "bundle.json", "examples.npz", "model.onnx", "model.plugin.onnx"),
        *("examples.py", "plugin_aot.py", "run.py", "settings.sh"),
    }
    assert {*node.SOURCES, *node.HEADERS, node.BUCKET, "lut_decode.h", "cuda/linear.cuh", "cuda/prepare.cu"} <= kernels
    assert {"cuda/linear_f16b_4.cu", "cuda/linear_f16_3.cu"} <= kernels
    assert "cuda/linear_bf16_2.cu" not in kernels
    assert all(os.access(orin / name, os.X_OK) for name in ("build.sh", "run.py"))
    settings = json.loads((orin / "bundle.json").read_text())
    assert (settings["capabilities"], settings["tensorrt"], settings["target"]) == (
        ["8.7"],
        ["10.3", "12.0"],
        "jetson-orin",
    )
    assert settings["shapes"] == {"x": [[1, 512], [8, 512], [32, 512]]}
    assert settings["plugin"] == {"creator": ["LutLinearMma16", "1", "paredown"], "layers": ["0.weight", "2.weight"]}
    assert settings["tolerance"] == 1e-2


def test_graphs_are_of_tensorrts_operators_and_of_the_plugin(orin: Path) -> None:
    plain, plugin = (onnx.load(orin / name) for name in (bundle.GRAPH, bundle.PLUGIN_GRAPH))
    assert not any(one.domain for one in plain.graph.node)
    assert [one.op_type for one in plugin.graph.node if one.domain] == [node.OP] * 2
    assert not plain.functions
    assert not plugin.functions


def test_checksums_are_those_of_all_files(orin: Path) -> None:
    lines = (orin / bundle.SUMS).read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path for path in listing(orin) if (orin / path).is_file()}
    assert set(sums) == files - {bundle.SUMS}
    assert {name: hashlib.sha256((orin / name).read_bytes()).hexdigest() for name in sums} == sums


def test_examples_are_what_the_model_computes(orin: Path) -> None:
    with np.load(orin / "examples.npz") as arrays:
        assert [arrays[f"{i}.in.x"].shape for i in range(2)] == [(1, 512), (3, 512)]
        module = model().module()
        for i in range(2):
            with torch.no_grad():
                wanted = module(torch.from_numpy(arrays[f"{i}.in.x"])).numpy()
            (name,) = [name for name in arrays.files if name.startswith(f"{i}.out.")]
            np.testing.assert_allclose(arrays[name], wanted, rtol=1e-3, atol=1e-3)


def test_the_readme_says_what_was_never_run(orin: Path) -> None:
    text = (orin / "README.md").read_text()
    assert "never on a GPU" in text
    assert "JetPack 6.1 or 6.2 (TensorRT 10.3, CUDA 12.6)" in text
    assert "| 0.weight |" in text
    assert "its kernels were never run on a GPU" in text
    assert not re.findall(r"\$\w", text)


def test_what_runs_on_a_board_is_old_python_and_bash(orin: Path) -> None:
    for name in ("run.py", "examples.py", "plugin_aot.py"):
        ast.parse((orin / name).read_text(), feature_version=(3, 8))
    imported = {
        alias.name
        for found in ast.walk(ast.parse((orin / "run.py").read_text()))
        if isinstance(found, ast.Import)
        for alias in found.names
    }
    assert imported <= set(sys.stdlib_module_names)
    for script in ("build.sh", "settings.sh"):
        assert subprocess.run(["bash", "-n", orin / script], check=False).returncode == 0


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(folder: Path, orin: Path, tmp_path: Path) -> None:
    again = bundle.bundle(folder, "jetson-orin", tmp_path / "again", Options())
    assert listing(again) == listing(orin)
    assert (again / bundle.SUMS).read_text() == (orin / bundle.SUMS).read_text()


def test_boards_name_their_gpus() -> None:
    found = {name: (one.capabilities, one.tensorrt[0]) for name, one in bundle_boards.BOARDS.items()}
    assert found == {
        "jetson-orin": (("8.7",), "10.3"),
        "jetson-thor": (("11.0",), "10.16"),
        "server": (("8.0", "8.6", "8.9", "9.0", "12.0"), "10.3"),
    }
    assert {name for one in bundle_boards.BOARDS.values() for name in one.architectures} <= set(sources.ARCHITECTURES)


def test_cubins_go_along_where_all_units_were_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(unit: str, architecture: str, driver: tuple[int, int], digest: str = "") -> dict[str, object]:
        name = f"{Path(unit).stem}.{architecture}.cubin"
        (tmp_path / "built" / name).write_bytes(b"cubin")
        entry = {"file": name, "unit": unit, "architecture": architecture, "compiler": "none", "generation": driver[0]}
        return entry | {"driver": list(driver), "digest": digest or units.digest(units.read(unit))}

    (tmp_path / "built").mkdir()
    used, both = ("linear_f16_4.cu", "prepare.cu"), ((12, 0), (13, 0))
    entries = [made(unit, "sm_87", both[0]) for unit in used] + [made(unit, "sm_110", both[1]) for unit in used]
    entries += [made("prepare.cu", "sm_86", both[0]), made("linear_f16_4.cu", "sm_86", both[0], "stale")]
    (tmp_path / "built" / cubins.MANIFEST).write_text(json.dumps(entries))
    monkeypatch.setattr(cubins, "FOLDER", tmp_path / "built")
    found = {name: [one.file for one in bundle._built(used, one)] for name, one in bundle_boards.BOARDS.items()}
    assert found == {
        "jetson-orin": ["linear_f16_4.sm_87.cubin", "prepare.sm_87.cubin"],
        "jetson-thor": ["linear_f16_4.sm_110.cubin", "prepare.sm_110.cubin"],
        "server": [],
    }
    bundle._write_kernels(tmp_path / "kernels", used, bundle_boards.BOARDS["jetson-orin"])
    held = json.loads((tmp_path / "kernels/cuda/cubin/manifest.json").read_text())
    assert {entry["file"] for entry in held} == {*found["jetson-orin"]}
    assert {path.name for path in (tmp_path / "kernels/cuda/cubin").glob("*.cubin")} == {*found["jetson-orin"]}


# --- the command


def test_the_command_makes_a_bundle_without_a_plugin(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "net")
    done = optimize(monkeypatch, "bundle", "net", "--target", "server", "--precision", "fp32", "--profile", "batch=2")
    assert (done.code, done.out, done.error) == (0, "net-server\n", [])
    made = Path("net-server")
    assert not (made / bundle.PLUGIN_GRAPH).exists()
    assert not (made / "kernels").exists()
    assert "No layer has a node of the plugin." in (made / "README.md").read_text()
    assert json.loads((made / "bundle.json").read_text())["shapes"] == {"x": [[2, 512]] * 3}
    again = optimize(monkeypatch, "bundle", "net", "--target", "server")
    assert (again.code, again.error) == (2, ['optimize: "net-server" exists already; use --force or another --out'])
    other = optimize(monkeypatch, "bundle", "net", "--target", "server", "--out", "net", "--force")
    assert (other.code, "is no bundle, and is not replaced" in other.err) == (2, True)
    assert listing(Path()) == {f"{root}/{name}" for root in ("net", "net-server") for name in listing(Path(root))} | {
        "net",
        "net-server",
    }


def test_an_unknown_board_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'^--target: there is no board "jetson"; did you mean "jetson-\w+"\?$'):
        bundle.bundle(folder, "jetson", tmp_path / "out", Options())
    with pytest.raises(RecipeError, match=r"does not exist; make it first$"):
        bundle.bundle(folder, "server", tmp_path / "none" / "out", Options())
    assert listing(tmp_path) == set()


def test_a_failure_leaves_nothing(folder: Path, orin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(orin, tmp_path / "old")
    before = (tmp_path / "old" / bundle.SUMS).read_text()
    contents = bundle._contents(model(), "net", bundle_boards.BOARDS["server"], Options(precision="fp32"))

    def broken(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "_contents", lambda *_: contents)
    monkeypatch.setattr(bundle, "_readme", broken)
    for out in ("old", "new"):
        with pytest.raises(ExportError, match="no space left on device"):
            bundle.bundle(folder, "jetson-orin", tmp_path / out, Options(precision="fp32"), force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"old"}
    assert (tmp_path / "old" / bundle.SUMS).read_text() == before


def test_inputs_that_numpy_does_not_have_are_refused() -> None:
    made = replace(model(), inputs=(InputSpec(name="x", shape=("batch", 512), dtype="bfloat16"),))
    with pytest.raises(ExportError, match=r'^the input "x" is bfloat16'):
        bundle_examples.examples(made, {})


# --- on the board


def test_the_board_builds_and_checks_an_engine(board: Board) -> None:
    done = board.run("build.sh")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("model.engine: ")
    assert lines[0].endswith(" bytes, TensorRT 10.3.0, compute capability 8.7")
    assert [line.partition(",")[0] for line in lines[1:]] == ["ok example 0", "ok example 1"]
    assert {path.name for path in (board.folder / "build").iterdir()} == {"model.engine", "model.engine.json"}


def test_the_board_runs_arrays(board: Board) -> None:
    assert board.run("run.py", "build").returncode == 0
    given, out = board.folder.parent / "in.npz", board.folder.parent / "out.npz"
    x = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
    np.savez(given, x=x)
    done = board.run("run.py", "run", str(given), str(out))
    assert (done.returncode, done.stderr) == (0, "")
    with torch.no_grad(), np.load(out) as found:
        (y,) = (found[name] for name in found.files)
        wanted = model().module()(torch.from_numpy(x)).numpy()
    assert np.abs(y - wanted).max() < 1e-2 * np.abs(wanted).max()
    for feeds, said in (
        ({"x": x.astype(np.float64)}, 'input "x" is of type float32, given is float64'),
        ({"x": np.zeros((33, 512), np.float32)}, "was not built for shape [33, 512]"),
        ({"z": x}, "takes the inputs x, given are z"),
    ):
        np.savez(given, **feeds)
        refused = board.run("run.py", "run", str(given), str(out))
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
    for junk in (b"", b"no arrays", b"PK\x03\x04"):
        given.write_bytes(junk)
        refused = board.run("run.py", "run", str(given), str(out))
        assert (refused.returncode, "holds no arrays" in refused.stderr) == (3, True), refused.stderr


@pytest.mark.parametrize(
    "name", ["run.py", "build.sh", "model.onnx", "kernels/tensorrt/plugin.cpp", "examples.npz", "bundle.json"]
)
def test_tampering_is_noticed(board: Board, name: str) -> None:
    path = board.folder / name
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    done = board.run("build.sh")
    assert (done.returncode, name in done.stderr) == (3, True)
    assert done.stderr.endswith("build.sh: a file is missing or has changed; copy the bundle again\n")
    told = board.run("run.py", "build")
    assert (told.returncode, told.stderr) == (
        3,
        f"run.py: {name} has changed since the bundle was made; copy the bundle again\n",
    )
    path.unlink()
    assert (board.folder / "build.sh").exists() is (name != "build.sh")
    if name not in ("build.sh", "run.py"):
        assert board.run("run.py", "check").stderr == f"run.py: {name} is missing; copy the bundle again\n"
    assert not (board.folder / "build").exists()


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        (
            {"PAREDOWN_GPU": "86"},
            7,
            "this GPU has compute capability 8.6, the bundle is for 8.7; make one with another",
        ),
        ({"PAREDOWN_GPU": "none"}, 7, "there is no GPU here, or no driver for it"),
        ({"STANDIN_VERSION": "8.6.2"}, 7, "TensorRT 8.6.2 is installed, this bundle is for 10.3 and later, below 12.0"),
        ({"PYTHONPATH": ""}, 7, "TensorRT does not load: No module named 'tensorrt'"),
        ({"STANDIN": "Internal Error"}, 6, "TensorRT 10.3.0 does not build the engine; its messages are above"),
        ({"STANDIN": "SIGKILL"}, 6, "the builder was ended by signal 9"),
        ({"PYTHON": "no-such-python"}, 7, "no-such-python is missing"),
    ],
)
def test_a_board_that_cannot_says_why(board: Board, changed: dict[str, str], code: int, said: str) -> None:
    done = board.run("build.sh", **changed)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not (board.folder / "build").exists()


def test_a_board_without_the_cuda_runtime_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CUDART", ("libnone.so.1", "libnone.so"))
    with pytest.raises(runner.BoardError, match=r"^the CUDA runtime does not load \(libnone.so.1: ") as caught:
        runner.Cuda()
    assert caught.value.code == 7


def test_usage_is_told(board: Board) -> None:
    for command in (("build.sh", "other"), ("build.sh", "library", "more")):
        done = board.run(*command)
        assert (done.returncode, done.stderr) == (2, "build.sh: usage: build.sh [library|aot]\n")
    for arguments in ((), ("aot",), ("run", "x"), ("build", "x")):
        done = board.run("run.py", *arguments)
        assert (done.returncode, done.stderr.startswith("run.py: usage: ")) == (2, True)
    assert board.run("run.py", "capability").stdout == "87\n"


def test_an_engine_of_something_else_is_refused(board: Board) -> None:
    missing = board.run("run.py", "check")
    assert (missing.returncode, missing.stderr) == (3, "run.py: build/model.engine is missing; run ./build.sh\n")
    assert board.run("run.py", "build").returncode == 0
    stale = board.run("run.py", "check", STANDIN_VERSION="10.4.0")
    assert (stale.returncode, "is stale (tensorrt was 10.3.0, is 10.4.0); run ./build.sh again" in stale.stderr) == (
        3,
        True,
    )
    with (board.folder / "build/model.engine").open("ab") as file:
        file.write(b"more")
    assert "is stale (engine_sha256 was " in board.run("run.py", "check").stderr


def test_wrong_outputs_fail_the_check(board: Board) -> None:
    path = board.folder / "examples.npz"
    with np.load(path) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    (name,) = (name for name in held if name.startswith("1.out."))
    held[name] = held[name] * 1.5
    np.savez(path, **held)
    board.sign()
    done = board.run("build.sh")
    assert done.returncode == 6
    assert "-- example 1, " in done.stdout
    assert "run.py: the engine does not compute what the model does: example 1, " in done.stderr


# --- the plugin on the board

NVCC = """
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.6, V12.6.85"; exit; fi
printf '%s\\n' "$*" >> "$NOTES"
while [ "$1" != -o ]; do shift; done
echo cubin > "$2"
"""
CXX = """
printf '%s\\n' "$*" >> "$NOTES"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def with_tools(board: Board, **changed: str) -> dict[str, str]:
    board.tool("nvcc", NVCC)
    board.tool("stub-cxx", CXX)
    notes = board.folder.parent / "notes"
    return {"NOTES": str(notes), "CXX": "stub-cxx", "STANDIN_PLUGIN": "1", **changed}


def test_the_board_compiles_plugin_and_kernels(board: Board) -> None:
    done = board.run("build.sh", "library", **with_tools(board))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model.library.engine: ")
    made = json.loads((board.folder / "build/cuda/cubin/manifest.json").read_text())
    assert [(entry["unit"], entry["architecture"], entry["driver"]) for entry in made] == [
        (unit, "sm_87", [12, 0]) for unit in ("linear_f16_3.cu", "linear_f16b_4.cu", "prepare.cu")
    ]
    assert all(entry["digest"] == units.digest(units.read(entry["unit"])) for entry in made)
    assert all((board.folder / "build/cuda/cubin" / entry["file"]).is_file() for entry in made)
    *kernels, plugin = (board.folder.parent / "notes").read_text().splitlines()
    assert kernels[0].startswith("-cubin -arch=sm_87 -std=c++17 -Ikernels/cuda -Ikernels -o ")
    assert "kernels/tensorrt/plugin.cpp kernels/ort/cuda_device.cpp" in plugin
    assert "-lcudart" in plugin


def test_cubins_of_the_bundle_are_used(board: Board) -> None:
    place = board.folder / "kernels/cuda/cubin"
    place.mkdir()
    for unit in ("linear_f16b_4", "linear_f16_3", "prepare"):
        (place / f"{unit}.sm_87.cubin").write_text("built before")
    (place / "manifest.json").write_text("[]")
    board.sign()
    done = board.run("build.sh", "library", **with_tools(board, NVCC="no-such-nvcc"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (board.folder / "build/cuda/cubin/prepare.sm_87.cubin").read_text() == "built before"


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        ({"NVCC": "no-such-nvcc"}, 7, "there is no nvcc for the kernels; install it, or name one in NVCC"),
        ({"CXX": "no-such-cxx"}, 7, "no-such-cxx is missing; install a C++17 compiler, or name one in CXX"),
        ({"TENSORRT_INCLUDE": "nowhere"}, 7, "NvInferRuntime.h is missing; install libnvinfer-headers-dev"),
        ({"CXX": "false"}, 6, "false does not compile the plugin; its messages are above"),
        ({"NVCC": "false"}, 7, "does not tell its version"),
        ({"PAREDOWN_GPU": "72"}, 7, "this GPU has compute capability 72, the bundle is for sm_87"),
        ({"STANDIN_PLUGIN": ""}, 6, "TensorRT does not load libparedown_tensorrt.so; run ./build.sh library again"),
    ],
)
def test_a_board_that_cannot_compile_says_why(board: Board, changed: Mapping[str, str], code: int, said: str) -> None:
    done = board.run("build.sh", "library", **{**with_tools(board), **changed})
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not list((board.folder / "build").glob("*.engine"))


@pytest.mark.slow
def test_the_sources_of_a_bundle_compile(board: Board) -> None:
    """By the real compiler, against the headers of the tests, to a library that has what TensorRT looks for."""
    if shutil.which("g++") is None:
        pytest.skip("plugin not compiled: there is no g++")
    board.tool("nvcc", NVCC)
    notes = str(board.folder.parent / "notes")
    done = board.run("build.sh", "library", NOTES=notes, CXX="g++", STANDIN_PLUGIN="1")
    assert (done.returncode, done.stderr) == (0, "")
    library = (board.folder / "build/libparedown_tensorrt.so").read_bytes()
    assert b"getCreators" in library
    assert b"run ./build.sh library again" in library


def test_kernels_are_embedded_where_tensorrt_can(board: Board, software: Path, tmp_path: Path) -> None:
    """A version without `tensorrt.plugin` says so; one with it gets the PTX of every kernel of the graph."""
    tools = with_tools(board)
    done = board.run("build.sh", "aot", **tools)
    assert (done.returncode, "TensorRT 10.3.0 embeds no plugins: " in done.stderr) == (7, True), done.stderr
    made = {path.name for path in (board.folder / "build/ptx").iterdir()}
    assert made == {"paredown_bucket_f16b_b4.ptx", "paredown_bucket_f16_b3.ptx"}
    notes = (board.folder.parent / "notes").read_text().splitlines()
    assert notes[0].startswith(
        "-ptx -arch=compute_80 -std=c++17 -DPAREDOWN_KIND=KindF16 -DPAREDOWN_NAME=f16 -DPAREDOWN_BITS=3 -o build/ptx/"
    )
    package = tmp_path / "python" / "tensorrt"
    package.mkdir(parents=True)
    shutil.copy(software / "python" / "tensorrt.py", package / "__init__.py")
    (package / "plugin.py").write_text(EMBEDS_PLUGINS)
    done = board.run("build.sh", "aot", **tools, PYTHONPATH=str(package.parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("registered paredown::LutLinearMma16\nmodel.aot.engine: ")


def test_examples_are_timed_with_transfers_and_without(board: Board) -> None:
    assert board.run("build.sh").returncode == 0
    done = board.run("run.py", "bench")
    assert (done.returncode, done.stderr) == (0, "")
    form = r"example {}: p50 ([\d.]+) ms, p99 [\d.]+ ms with transfers; p50 ([\d.]+) ms without; 200 runs\n"
    found = re.fullmatch(form.format(0) + form.format(1), done.stdout)
    assert found is not None
    assert float(found[2]) <= float(found[1])


def test_a_bundle_without_a_plugin_says_so(board: Board) -> None:
    (board.folder / bundle.PLUGIN_GRAPH).unlink()
    text = (board.folder / "settings.sh").read_text()
    (board.folder / "settings.sh").write_text(re.sub(r'(UNITS|BUCKETS)=".*"', r'\1=""', text))
    board.sign()
    done = board.run("build.sh", "library", **with_tools(board))
    assert (done.returncode, "this bundle has no layer for a plugin" in done.stderr) == (2, True)
    done = board.run("build.sh", "aot")
    assert (done.returncode, "this bundle has no layer for a plugin" in done.stderr) == (2, True)
