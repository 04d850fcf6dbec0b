"""A board over ssh: an sshd on the loopback gives the same rows as here, and every fault its sentence and exit code.

The rows of the fault table in docs/remote.md are tests of this file, by name.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from paredown.bench import command, edge, link, parcel, remote
from paredown.bench.board import receive, runners
from paredown.bench.device import Device
from paredown.exporters import bundle, onnx_runner
from paredown.exporters import onnx as export
from paredown.kernels import build, native
from paredown.optimizer import store
from paredown.optimizer.errors import Error, ExportError, InputError, RecipeError, RuntimeMissingError
from paredown.optimizer.model import InputSpec, Model, Source, SourceFile, from_module

from ..exporters.conftest import packed
from ..optimizer.tiny import edit, optimize, project
from .loopback import Loopback, free_port, generate_key, loopback, program

BOARD = Device(host="board")
SHORT = edge.Spec(min_seconds=0.02, min_count=4, warmup_seconds=0.05, processes=1, peak_rss=False)
TWO_CELLS = edge.Spec(batch=(1, 4), min_seconds=0.3, warmup_seconds=0.05, processes=1, peak_rss=False)
AGAIN = "run the same command again"


@pytest.fixture(scope="module")
def started() -> Iterator[Loopback]:
    """A board for all tests; in a short path, whatever the name of the test is."""
    with tempfile.TemporaryDirectory() as folder, loopback(Path(folder)) as board:
        yield board


@pytest.fixture
def board(started: Loopback, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """The board as it was when it was new."""
    files = [path for path in started.folder.iterdir() if path.is_file() and path.suffix != ".log"]
    saved = {path: path.read_bytes() for path in [*files, started.interpreter]}
    environment = dict(started.environment)
    monkeypatch.setenv("PAREDOWN_SSH_OPTIONS", f"-F {started.folder}/config")
    monkeypatch.setenv("PAREDOWN_BOARD_PYTHON", str(started.interpreter))
    yield started
    (started.folder / "bin" / "c++").unlink(missing_ok=True)
    for path, content in saved.items():
        path.write_bytes(content)
    shutil.rmtree(started.cache, ignore_errors=True)
    if started.environment != environment:
        started.environment = environment
        started.restart()
    assert started.wait_until_idle() == []


@pytest.fixture
def nets(tmp_path: Path) -> list[Path]:
    """Two files that take a fraction of a millisecond, the second with its weights beside it."""
    made = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    onnx.save(net(16384), made[0])
    onnx.save(net(8192), made[1], save_as_external_data=True, location="b.onnx.data", size_threshold=0)
    return made


def net(width: int) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((64, width)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def failure(nets: list[Path], spec: edge.Spec = SHORT, at: str = "", do: Callable[[], object] = lambda: None) -> Error:
    """Return what measuring raises; `do` is called when progress first says `at`."""
    with pytest.raises(Error) as caught:
        run(nets, spec, at, do)
    return caught.value


def run(nets: list[Path], spec: edge.Spec, at: str, do: Callable[[], object]) -> remote.Found:
    waiting = [do]

    def progress(_: float, text: str) -> None:
        if at and at in text and waiting:
            waiting.pop()()

    return remote.run(nets, spec, BOARD, progress)


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- what works


def test_rows_are_those_of_a_local_run_with_the_boards_fingerprint(board: Loopback, nets: list[Path]) -> None:
    seen: list[str] = []
    spec = replace(SHORT, batch=(1, 4), threads=(1, 2), peak_rss=True)
    found = remote.run(nets, spec, BOARD, lambda _, text: seen.append(text))
    assert [(row.threads, row.batch, row.artifact) for row in found.rows] == [
        (threads, batch, name) for threads in (1, 2) for batch in (1, 4) for name in ("a.onnx", "b.onnx")
    ]
    assert all(row.peak_rss_bytes for row in found.rows)
    assert all(row.runtime == "onnxruntime" and row.scenario == "edge" for row in found.rows)
    assert found.rows[0].ratio_to_baseline == 1.0
    assert found.environment["threads_env"] == {"OMP_NUM_THREADS": "1"}
    assert set(found.environment["measured_from"]) == {"os", "cpu", "python", "packages"}  # type: ignore[call-overload]
    assert board.folder.name not in json.dumps(found.environment)
    assert {"copy a.onnx, ", "copy b.onnx.data, "} <= {text.partition(",")[0] + ", " for text in seen}
    assert listing(board.cache) >= {"lock"}
    assert not [name for name in listing(board.cache) if "cells" in name or name.endswith(".part")]


def test_rows_come_from_the_samples_by_the_code_of_a_local_run(board: Loopback, nets: list[Path]) -> None:
    (row, _) = remote.run(nets, SHORT, BOARD).rows
    flat = np.sort(row.samples.ravel()) * 1e3
    assert row.latency_ms_p50 == pytest.approx(float(np.median(flat)))
    assert row.samples.ndim == 2
    assert row.waited is not None


def test_several_processes_until_the_ratio_is_known(board: Loopback, nets: list[Path]) -> None:
    """The host says when there are enough: here at once, then never, so that the most are started."""
    loose = replace(SHORT, processes=3, half_width=100.0)
    rows = remote.run(nets, loose, BOARD).rows
    assert {row.details["processes"] for row in rows} == {3}
    assert rows[1].ratio_ci95 is not None
    assert rows[1].details["interval"] == "over fresh processes"
    rows = remote.run(nets, replace(SHORT, processes=2, half_width=1e-9, between_runs=0.0, fresh="session"), BOARD).rows
    assert {row.details["processes"] for row in rows} == {2 * edge.MORE}


def test_a_stream_keeps_its_state_and_has_a_real_time_factor(board: Loopback, tmp_path: Path) -> None:
    onnx.save(net(64), tmp_path / "frame.onnx")
    spec = replace(SHORT, state={"y": "x"}, frame_ms=10.0)
    (row,) = remote.run([tmp_path / "frame.onnx"], spec, BOARD).rows
    assert row.details["real_time_factor_p50"] == pytest.approx(row.latency_ms_p50 / 10)
    with pytest.raises(RecipeError, match='the model has no output "z"'):
        remote.run([tmp_path / "frame.onnx"], replace(spec, state={"z": "x"}), BOARD)


def test_a_meter_that_was_named_must_be_there(board: Loopback, nets: list[Path]) -> None:
    sensors(board, {"sys/none": 0})
    error = failure(nets, replace(SHORT, meter="rapl"))
    what = "the meter rapl is not available on the board: the kernel shows no RAPL package"
    assert (error.exit_code, error.what, error.fix) == (7, what, "use --meter auto, or none")


def test_only_files_that_differ_are_copied(board: Loopback, nets: list[Path]) -> None:
    remote.run(nets, SHORT, BOARD)
    (kept,) = board.cache.rglob("a.onnx")
    (damaged,) = board.cache.rglob("b.onnx.data")
    damaged.write_bytes(b"something else")
    copied: list[str] = []
    remote.run(nets, SHORT, BOARD, lambda _, text: copied.append(text))
    assert {text.partition(",")[0] for text in copied if text.startswith("copy")} == {"copy b.onnx.data"}
    assert damaged.read_bytes() == (nets[1].parent / "b.onnx.data").read_bytes()
    assert kept.read_bytes() == nets[0].read_bytes()


def test_the_command_writes_the_boards_environment(
    board: Loopback, nets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--device", "ssh://board", "--min-seconds", "0.02", "--processes", "1", "--out", str(tmp_path / "out"))
    done = optimize(monkeypatch, "bench", *map(str, nets), *options)
    assert (done.code, done.error) == (0, [])
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert "measured_from" in found["environment"]
    assert [row["artifact"] for row in found["rows"]] == ["a.onnx", "b.onnx"]


@pytest.mark.slow
def test_a_recipe_names_a_board(board: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The board measures; where it cannot, that is said before the steps take time."""
    monkeypatch.chdir(tmp_path)
    bench = "export: [onnx]\nbench: {device: 'ssh://board', processes: 1}"
    edit(project(tmp_path) / "recipe.yaml", "export: [onnx]", bench)
    done = optimize(monkeypatch, "run", "recipe.yaml", "--out", "small")
    assert (done.code, done.error) == (0, [])
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert [row["artifact"] for row in report["bench"]] == ["baseline.onnx", "model.onnx"]
    assert "measured_from" in report["environment"]["bench_device"]
    board.stop()
    try:
        done = optimize(monkeypatch, "run", "recipe.yaml", "--out", "other")
    finally:
        board.start()
    says = "optimize: ssh://board: the board cannot be reached: it refuses connections; start its ssh server, or write"
    assert done.code == 7
    assert done.error[0].startswith(says)
    assert "quantize (1 of 1)" not in done.err


def test_what_a_start_up_file_prints_is_ignored(board: Loopback, nets: list[Path]) -> None:
    board.python(f'echo "Welcome to the board"; echo 7\nexec {sys.executable} "$@"')
    assert len(remote.run(nets, SHORT, BOARD).rows) == 2


# --- the board cannot be reached


def test_unknown_host(board: Loopback, nets: list[Path]) -> None:
    with (board.folder / "config").open("a") as config:
        config.write("Host gone\n  HostName no..host\n")
    with pytest.raises(RuntimeMissingError) as caught:
        remote.run(nets, SHORT, Device(host="gone"))
    says = "ssh://gone: the board cannot be reached: there is no host of this name; check it, or name the host in"
    assert str(caught.value).startswith(says)
    assert caught.value.exit_code == 7


def test_refused(board: Loopback, nets: list[Path]) -> None:
    with pytest.raises(RuntimeMissingError, match=r"it refuses connections; start its ssh server, or write the port"):
        remote.run(nets, SHORT, Device(host="board", port=free_port()))
    assert not board.cache.exists()


def test_a_board_that_does_not_let_in(board: Loopback, nets: list[Path]) -> None:
    (board.folder / "authorized").write_text("")
    error = failure(nets)
    assert (error.exit_code, error.what) == (7, "the board cannot be reached: it does not let you in")
    assert "ssh must work without a password" in error.fix


def test_host_key_changed(board: Loopback, nets: list[Path], tmp_path: Path) -> None:
    generate_key(tmp_path / "other")
    key = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    (board.folder / "known_hosts").write_text(f"[127.0.0.1]:{board.port} {key}\n")
    error = failure(nets)
    assert error.what == "the board cannot be reached: its host key is not the one that is known"
    assert (error.exit_code, error.fix) == (7, "if you know why, ssh-keygen -R board")


def test_host_key_unknown(board: Loopback, nets: list[Path]) -> None:
    (board.folder / "known_hosts").write_text("")
    error = failure(nets)
    assert error.what == "the board cannot be reached: its host key is not known yet"
    assert (error.exit_code, error.fix) == (7, "connect once by ssh board and confirm the key")


def test_no_ssh_here(nets: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = failure(nets)
    assert (error.exit_code, str(error)) == (7, "there is no ssh here; install openssh-client")


# --- the board lacks something


def test_no_python(board: Loopback, nets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_BOARD_PYTHON", "python-none")
    error = failure(nets)
    assert (error.exit_code, error.what) == (7, "there is no python-none on the board")
    assert error.fix == "install Python 3.8 or later there, or name it in PAREDOWN_BOARD_PYTHON"


def test_python_too_old(board: Loopback, nets: list[Path]) -> None:
    old = "import sys; sys.version_info = (3, 6, 9); exec(sys.argv[-1])"
    board.python(f'exec {sys.executable} -c "{old}" "$2"')
    error = failure(nets)
    assert (error.exit_code, error.what) == (7, "the board's python3 is Python 3.6, measuring needs 3.8")


def test_numpy_and_runtime_missing(board: Loopback, nets: list[Path]) -> None:
    board.python(f'exec {sys.executable} -S "$@"')
    error = failure(nets)
    assert (error.exit_code, error.what) == (7, "the board lacks numpy and onnxruntime")
    assert error.fix == "run python3 -m pip install numpy onnxruntime there"


def test_runtime_that_does_not_load(board: Loopback, nets: list[Path], tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libnone.so.1 is missing')\n")
    board.python(f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    error = failure(nets)
    assert (error.exit_code, error.what) == (7, "onnxruntime does not load on the board: libnone.so.1 is missing")


def test_an_artifact_that_does_not_load_there(board: Loopback, nets: list[Path], tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    text = "import importlib.util\nclass SessionOptions:\n  def __getattr__(self, name): return lambda *a: None\n"
    text += "__version__ = '1.8.0'\ndef InferenceSession(*a, **k): raise RuntimeError('opset 17 is too new')\n"
    (tmp_path / "older" / "onnxruntime.py").write_text(text)
    board.python(f'PYTHONPATH={tmp_path}/older exec {sys.executable} "$@"')
    error = failure(nets)
    assert error.what == "onnxruntime 1.8.0 on the board does not load a.onnx: opset 17 is too new"
    assert error.exit_code == 6


# --- in the middle


def test_link_cut_and_resumed(board: Loopback, nets: list[Path]) -> None:
    error = failure(nets, TWO_CELLS, "batch 4", board.cut)
    assert (error.exit_code, error.what) == (7, "the link to the board broke")
    assert error.fix == f"{AGAIN}: what was copied and the cells that were finished are kept"
    assert board.wait_until_idle() == []
    found = remote.run(nets, TWO_CELLS, BOARD)
    assert found.notes == ("1 of 2 cells were finished by an earlier run",)
    assert [row.batch for row in found.rows] == [1, 1, 4, 4]
    assert remote.run(nets, TWO_CELLS, BOARD).notes == ()  # all were delivered, so all are measured anew


def test_board_rebooted(board: Loopback, nets: list[Path]) -> None:
    def reboot() -> None:
        board.boot_id.write_text("second boot\n")
        board.cut()

    error = failure(nets, TWO_CELLS, "batch 4", reboot)
    assert (error.exit_code, error.what) == (7, "the board was rebooted during the measurement")
    assert error.fix == f"{AGAIN}: what was copied is kept, finished cells are measured again"
    found = remote.run(nets, TWO_CELLS, BOARD)
    assert found.notes == ("the board was rebooted since an earlier run, so finished cells are measured again (1)",)


def test_board_gone(board: Loopback, nets: list[Path]) -> None:
    def vanish() -> None:
        board.stop()
        board.cut()

    try:
        error = failure(nets, TWO_CELLS, "batch 4", vanish)
    finally:
        board.start()
    assert error.exit_code == 7
    says = "the link to the board broke, and the board cannot be reached: it refuses connections"
    assert error.what == says
    assert AGAIN in error.fix


def test_measuring_process_killed(board: Loopback, nets: list[Path]) -> None:
    def kill() -> None:
        while not (found := [one for one in board.running() if any("timing.py" in word for word in one.cmdline())]):
            time.sleep(0.01)
        found[0].kill()

    error = failure(nets, TWO_CELLS, "batch 4", kill)
    assert (error.exit_code, error.fix) == (6, "its memory may be short: stop other programs")
    assert error.what == "the process that measures stopped on the board: it ended with status -9"


def test_killed(board: Loopback, nets: list[Path]) -> None:
    error = failure(nets, TWO_CELLS, "batch 4", lambda: [process.kill() for process in board.running()])
    assert error.exit_code == 7
    assert error.what.startswith("the measuring process on the board was ended")
    assert "see whether its memory is short" in error.fix
    assert remote.run(nets, TWO_CELLS, BOARD).notes == ("1 of 2 cells were finished by an earlier run",)


def test_interrupted_here(board: Loopback, nets: list[Path]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(nets, TWO_CELLS, "batch 4", interrupt)
    assert board.wait_until_idle() == []


@pytest.mark.slow
def test_clock_mode_changed(board: Loopback, nets: list[Path]) -> None:
    failure(nets, TWO_CELLS, "batch 4", board.cut)
    (cell,) = board.cache.rglob("cells/*.json")
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"mode": "powersave"}))
    assert board.wait_until_idle() == []
    found = remote.run(nets, TWO_CELLS, BOARD)
    assert found.notes == ("the clock mode was changed since an earlier run, so finished cells are measured again (1)",)


@pytest.mark.slow
def test_copy_cut_and_resumed(board: Loopback, nets: list[Path], tmp_path: Path) -> None:
    big = tmp_path / "c.onnx"
    onnx.save(net(200_000), big)
    error = failure([*nets, big], SHORT, "copy c.onnx, 5", board.cut)
    assert error.what == "the link to the board broke"
    assert board.wait_until_idle() == []
    names = listing(board.cache)
    assert not [name for name in names if name.endswith((".part", "c.onnx"))]
    copied: list[str] = []
    remote.run([*nets, big], SHORT, BOARD, lambda _, text: copied.append(text.partition(",")[0]))
    assert "copy c.onnx" in copied
    assert "copy a.onnx" not in copied


def test_disk_full(board: Loopback, nets: list[Path], tmp_path: Path) -> None:
    big = tmp_path / "c.onnx"
    onnx.save(net(60_000), big)
    small = board.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no full disk: only root may mount a small one")
    try:
        board.restart(XDG_CACHE_HOME=str(small))
        error = failure([*nets, big])
        assert error.exit_code == 6
        assert isinstance(error, ExportError)
        assert error.what.startswith("the board's disk is full: ")
        assert error.fix == "free some space and run it again; the files that arrived whole are kept"
        assert board.wait_until_idle() == []
        names = {Path(name).name for name in listing(small)}
        assert {"a.onnx", "b.onnx", "b.onnx.data"} <= names
        assert not {"c.onnx", "c.onnx.part"} & names
    finally:
        subprocess.run(["umount", str(small)], check=True)
        small.rmdir()


# --- our kernels, and the engines of a bundle


def linear() -> Model:
    """Return a network of one layer, with its source."""
    source = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Linear(64, 32))\n"
    made: dict[str, Callable[[], nn.Module]] = {}
    exec(source, made)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = made["net"]()
    files = (SourceFile(name="net.py", text=source),)
    return from_module(module, (InputSpec(name="x", shape=("batch", 64)),), Source(entry="net.py:net", files=files))


def packed_file(folder: Path) -> Path:
    """Write a linear layer of 4-bit codes, which our kernels multiply by."""
    model, seeded = linear(), torch.Generator().manual_seed(0)
    weight = packed(model.weights["0.weight"].dense(), "codebook 4", seeded)
    export.export(model.with_weights({"0.weight": weight}), folder / "packed.onnx")
    return folder / "packed.onnx"


needs_kernels = pytest.mark.skipif(not native.available(), reason="kernels not built: there is no C++ compiler")


@needs_kernels
def test_the_library_is_copied_to_a_like_machine(board: Loopback, tmp_path: Path) -> None:
    (row,) = remote.run([packed_file(tmp_path)], SHORT, BOARD).rows
    assert (row.runtime, row.details.get("kernels")) == ("onnxruntime with kernels", None)
    assert [name for name in listing(board.cache) if name.endswith(".so")]
    (row,) = remote.run([packed_file(tmp_path)], replace(SHORT, kernels=False), BOARD).rows
    assert (row.runtime, row.details.get("kernels")) == ("onnxruntime without kernels", None)


def test_without_a_compiler_the_row_says_why(board: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "_fits", lambda *_: "")
    board.interpreter.write_text(board.interpreter.read_text().replace(":/usr/bin:/bin", ""))
    found = remote.run([packed_file(tmp_path)], SHORT, BOARD)
    reason = f"there is no C++ compiler on the board ({platform.machine()}) to build the kernels with"
    assert (found.rows[0].runtime, found.rows[0].details["kernels"]) == ("onnxruntime without kernels", reason)
    assert found.notes == (f"the portable bodies run, not the kernels: {reason}",)


def test_a_compiler_that_fails(board: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "_fits", lambda *_: "")
    program(board.folder / "bin" / "c++", "echo 'c++: fatal error: no assembler' >&2; exit 1\n")
    (row,) = remote.run([packed_file(tmp_path)], SHORT, BOARD).rows
    assert row.runtime == "onnxruntime without kernels"
    assert "they were not built on the board: " in str(row.details["kernels"])
    assert "no assembler" in str(row.details["kernels"])


def test_disk_full_while_building(board: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "_fits", lambda *_: "")
    program(board.folder / "bin" / "c++", "echo 'cannot write: No space left on device' >&2; exit 1\n")
    error = failure([packed_file(tmp_path)])
    assert (error.exit_code, error.what) == (6, "the board's disk is full")


@pytest.mark.slow
def test_sources_are_built_on_another_machine(board: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("c++", path="/usr/bin:/bin"):
        pytest.skip("kernels not built: there is no C++ compiler")
    monkeypatch.setattr(parcel, "_fits", lambda *_: "")
    made = packed_file(tmp_path)
    # What an earlier build of these sources left: all of them take minutes.
    objects = Path(build.__file__).resolve().parents[1] / "build" / "kernels"
    if objects.is_dir():
        folder = parcel.folder_name(parcel.artifacts([made], ["packed.onnx"], ""))
        shutil.copytree(objects, board.cache / folder / "build" / "kernels")
    (row,) = remote.run([made], SHORT, BOARD).rows
    assert (row.runtime, row.details.get("kernels")) == ("onnxruntime with kernels", None)
    assert not {name for name in listing(board.cache) if name.endswith(".partial")}


def test_a_bundle_is_built_and_timed_there(board: Loopback, tmp_path: Path) -> None:
    """With a stand-in of TensorRT, as in tests/exporters/test_bundle.py."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the CUDA runtime that stands in")
    (tmp_path / "net").mkdir()
    store.save(linear(), tmp_path / "net")
    made = bundle.bundle(tmp_path / "net", "jetson-orin", tmp_path / "orin", bundle.Options())
    error = failure([made])
    assert (error.exit_code, error.what) == (7, "the board lacks TensorRT")
    exporters = Path(__file__).resolve().parents[1] / "exporters"
    shutil.copy(exporters / "standin_tensorrt.py", tmp_path / "tensorrt.py")
    library = tmp_path / "libcudart.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, exporters / "standin_cudart.c"], check=True)
    paths = f"PYTHONPATH={tmp_path} LD_LIBRARY_PATH={tmp_path} PYTHON={board.interpreter}"
    board.python(f'export {paths}; exec {sys.executable} "$@"')
    (row, other) = remote.run([made, made / "model.onnx"], replace(SHORT, batch=(4,)), BOARD).rows
    assert (row.artifact, row.runtime, other.runtime) == ("orin", "tensorrt", "onnxruntime")
    inner = row.details["latency_ms_p50_without_transfers"]
    assert isinstance(inner, float)
    assert inner > 0
    assert [name for name in listing(board.cache) if name.endswith("build/model.engine")]


# --- the page of faults


def test_every_fault_of_the_page_has_a_test() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "remote.md").read_text()
    named = set(re.findall(r"`(test_\w+)` \|$", page, re.MULTILINE))
    assert len(named) >= 15
    assert named <= {name for name in globals() if name.startswith("test_")}


# --- what runs there


def test_what_runs_on_a_board_is_old_python() -> None:
    files = [item.path for item in parcel.programs() if item.path is not None]
    names = {path.stem for path in files}
    assert {"agent", "receive", "environment"} <= names
    for path in files:
        least = (3, 5) if path.stem == "receive" else (3, 8)
        tree = ast.parse(path.read_text(), feature_version=least)
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        tops = {name.partition(".")[0] for name in modules}
        assert tops <= {*sys.stdlib_module_names, "numpy", *names}, path.name
    ast.parse(Path(build.__file__).read_text(), feature_version=(3, 8))


def test_the_session_is_that_of_a_local_run() -> None:
    here = inspect.getsource(onnx_runner.load)
    there = inspect.getsource(runners.Onnx)
    entries = [re.findall(r"add_session_config_entry\(.*?\)|severity_level = \d", text) for text in (here, there)]
    assert len(entries[0]) == 3
    assert sorted(entries[0]) == sorted(entries[1])


# --- clocks and sensors of the board


def sensors(board: Loopback, files: dict[str, object]) -> Path:
    """Give the board a tree of sensors of its own."""
    tree = board.folder / "sensors"
    shutil.rmtree(tree, ignore_errors=True)
    for name, value in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"{value}\n")
    board.python(f'PAREDOWN_SENSORS_ROOT={tree} exec {sys.executable} "$@"')
    return tree


def test_sensor_missing(board: Loopback, nets: list[Path]) -> None:
    sensors(board, {"sys/none": 0})
    for row in remote.run(nets, SHORT, BOARD).rows:
        assert row.energy_j is None
        assert str(row.details["energy"]).startswith("unavailable: ")


def test_clocks_drifted(board: Loopback, nets: list[Path]) -> None:
    clock = "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    tree = sensors(board, {clock: 2_000_000, clock.replace("cur_freq", "governor"): "schedutil"})
    throttle = threading.Timer(2.0, (tree / clock).write_text, ("1000000\n",))
    spec = edge.Spec(min_seconds=1.5, warmup_seconds=0.05, processes=1, peak_rss=False)
    rows = run(nets, spec, "batch 1", throttle.start).rows
    throttle.cancel()
    for row in rows:
        assert row.details["drifted"] is True
        assert row.details["drift_reasons"] == ["the CPU clock moved by 100 % (1000 to 2000 MHz)"]


@pytest.mark.slow
def test_energy_is_measured_there(board: Loopback, nets: list[Path]) -> None:
    """A counter that grows by 2 W, and by 7 W as soon as idle power was read."""
    zone = "sys/class/powercap/intel-rapl:0"
    tree = sensors(board, {f"{zone}/name": "package-0", f"{zone}/energy_uj": 0, f"{zone}/max_energy_range_uj": 10**12})
    counter, joules, stop = tree / zone / "energy_uj", [0.0], threading.Event()
    counter.with_name("new").write_text("0\n")
    opened = [0.0]

    def grow() -> None:
        last = time.monotonic()
        while not stop.wait(0.01):
            now = time.monotonic()
            busy = opened[0] and now - opened[0] > 3.5
            joules[0] += (now - last) * (7 if busy else 2)
            last = now
            counter.with_name("new").write_text(f"{joules[0] * 1e6:.0f}\n")
            counter.with_name("new").replace(counter)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        rows = run(nets, SHORT, "batch 1", lambda: opened.__setitem__(0, time.monotonic())).rows
    finally:
        stop.set()
        thread.join()
    for row in rows:
        assert row.details["meter"] == "rapl"
        assert row.energy_j is not None
        assert row.energy_j > 0


# --- the lock


def test_two_hosts_do_not_measure_at_once(board: Loopback, nets: list[Path]) -> None:
    with link.open_link(BOARD) as first:
        first.expect("hello")
        first.say({"folder": "first", "files": [["x", 1, "never sent"]]})
        first.expect("want")
        error = failure(nets)
    assert error.exit_code == 7
    assert error.what.startswith("another measurement runs on the board (process ")
    assert board.wait_until_idle() == []
    assert len(remote.run(nets, SHORT, BOARD).rows) == 2


def test_a_lock_that_was_left_behind_keeps_nobody_out(board: Loopback, nets: list[Path]) -> None:
    board.cache.mkdir(parents=True)
    (board.cache / "lock").write_text(f"{os.getpid()} an earlier boot\n")
    assert len(remote.run(nets, SHORT, BOARD).rows) == 2
    assert (board.cache / "lock").read_text().endswith(" first boot\n")


def test_silence_ends_it(tmp_path: Path) -> None:
    """A link that breaks without a word must not hold the lock: no byte comes, and none is closed."""
    text = Path(str(receive.__file__)).read_text().replace("SILENCE = 60.0", "SILENCE = 0.2")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    killer = threading.Timer(20, process.kill)
    killer.start()
    assert process.wait() == 1
    killer.cancel()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()


# --- what cannot be asked for


@pytest.mark.parametrize(
    ("text", "host", "user", "port"),
    [
        ("ssh://me@board:2222", "board", "me", 2222),
        ("ssh://Board", "Board", "", None),
        ("ssh://[::1]:22/", "::1", "", 22),
        ("ssh://first.last@10.0.0.7", "10.0.0.7", "first.last", None),
    ],
)
def test_addresses(text: str, host: str, user: str, port: int | None) -> None:
    found = command.check_device(text, "edge", "--device")
    assert found == Device(host=host, user=user, port=port)
    assert found.url == text.rstrip("/")


@pytest.mark.parametrize(
    "text", ["board", "http://board", "ssh://", "ssh://-oProxyCommand=x", "ssh://b/x", "ssh://b:x"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is no address.*; write ssh://user@host or ssh://user@host:22$"):
        command.check_device(text, "edge", "--device")


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(RecipeError) as caught:
        command.check_device("ssh://me:secret@board", "edge", "--device")
    assert str(caught.value) == "--device: an address holds no password; use a key: ssh must work without one"


def test_other_scenarios_stay_here() -> None:
    with pytest.raises(RecipeError, match="the scenario server runs on this machine only; use edge on a board"):
        command.check_device("ssh://board", "server", "--device")


def test_what_a_board_cannot_run(tmp_path: Path, nets: list[Path]) -> None:
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"engine")
    with pytest.raises(RecipeError, match=r'"model.engine" is nothing that a board can run; an engine fits'):
        remote.run([engine], SHORT, BOARD)
    (tmp_path / "b.onnx.data").unlink()
    with pytest.raises(InputError, match=r"^b.onnx: its weights are in b.onnx.data, which is missing; keep both"):
        remote.run(nets, SHORT, BOARD)


def test_the_work_folder_is_named_by_contents(nets: list[Path]) -> None:
    named = [parcel.folder_name(parcel.artifacts(paths, ["a", "b"], "")) for paths in (nets, nets, nets[::-1])]
    assert named[0] == named[1] != named[2]
