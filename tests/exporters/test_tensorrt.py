"""Engines: built by TensorRT-RTX where there is no GPU, run by a stand-in, and every way in which a build can fail.

The tests marked `tensorrt` need the full library and a GPU: `pytest -m tensorrt -rs` says what was skipped and why.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from paredown.exporters import (
    onnx_layers,
    tensorrt,
    tensorrt_build,
    tensorrt_compare,
    tensorrt_engine,
    tensorrt_library,
    tensorrt_profile,
    tensorrt_write,
)
from paredown.exporters import verify as comparison
from paredown.exporters.tensorrt_library import Library
from paredown.exporters.tensorrt_profile import Sizes
from paredown.optimizer import store
from paredown.optimizer.errors import ExportError, InputError, RecipeError, RuntimeMissingError
from paredown.optimizer.model import InputSpec, Model
from paredown.optimizer.weight import Dense

from ..optimizer.tiny import listing, optimize, project
from .conftest import NETS, ROWS, Perceptron, build, pack_all, use_standin
from .pages import WRITE, is_current

RTX = Library(name="rtx", version="any")
MADE = {"model.engine", "model.engine.json", "model.tensorrt.onnx"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stored model, 4-bit codebooks."""
    folder = project(tmp_path_factory.mktemp("tensorrt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert optimize(patch, "run", "recipe.yaml", "--out", "out", "--set", "export=[]").code == 0
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "out")
    return Path("out")


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'paredown[rtx]'")


REAL, LOWERED = tensorrt_write.lower, dict[tuple[Any, ...], tensorrt_write.Lowered]()


def lowered_once(model: Any, options: Any) -> tensorrt_write.Lowered:
    """Lower the model of `finished` once for each precision: these tests are about what comes after."""
    key = (options.precision, *(float(weight.dense().sum()) for weight in model.weights.values()))
    if key not in LOWERED:
        LOWERED[key] = REAL(model, options)
    return LOWERED[key]


@pytest.fixture
def standin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, and each model lowered once."""
    use_standin(tmp_path_factory.mktemp("standin"), monkeypatch)
    monkeypatch.setattr(tensorrt_write, "lower", lowered_once)
    yield
    sys.modules.pop("tensorrt", None)


@pytest.fixture(scope="module")
def built(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the stand-in in a folder, made once."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(finished, folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        for _ in standin.__wrapped__(tmp_path_factory, patch):  # type: ignore[attr-defined]
            patch.chdir(folder)
            assert export(patch, "--precision", "fp32", "--profile", "batch=2:4:16") == (0, "")
    return folder / "out"


def export(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> tuple[int, str]:
    """Export ./out to TensorRT and return the exit code and the line of the error."""
    outcome = optimize(monkeypatch, "export", "out", "--target", "tensorrt", *args)
    return outcome.code, outcome.err.strip()


def verify(model: Model, path: Path) -> list[comparison.Row]:
    truth, spec = tensorrt.comparison(path, model)
    return comparison.verify(truth, path, tensorrt.open, spec)


def metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model.engine.json").read_text())
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is written


def test_an_engine_of_rtx_is_built_without_a_gpu(rtx: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(out)
    assert export(monkeypatch, "--library", "rtx", "--sm", "86,8.9", "--profile", "batch=1:4:16") == (0, "")
    assert listing(out) - before == MADE
    found = metadata(out)
    assert (found["library"], found["version"]) == ("rtx", tensorrt_library.find("rtx").version)
    assert found["compute_capability"] == ["8.6", "8.9"]
    assert (found["precision"], found["profile"]) == ("fp16", {"batch": [1, 4, 16]})
    assert found["onnx_sha256"] == digest(out / "model.tensorrt.onnx")
    assert found["engine_sha256"] == digest(out / "model.engine")
    assert (found["timing_cache_read_sha256"], found["timing_cache_sha256"]) == (None, None)
    assert [row["layer"] for row in found["decisions"]] == ["conv1.weight", "conv2.weight", "linear.weight"]
    assert all(row["reason"] for row in found["decisions"])
    assert found["size_bytes"] == (out / "model.engine").stat().st_size > 10_000
    first = (out / "model.engine.json").read_bytes()
    code, error = export(monkeypatch, "--library", "rtx")
    assert (code, error) == (2, 'optimize: the file "model.engine" exists already; use --force or another --out')
    again = ("--library", "rtx", "--sm", "86,8.9", "--profile", "batch=1:4:16", "--force")
    assert export(monkeypatch, *again) == (0, "")
    assert (out / "model.engine.json").read_bytes() == first


def test_the_command_says_how_each_layer_is_held(standin: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = optimize(monkeypatch, "export", out, "--target", "tensorrt")
    *lines, last = outcome.out.splitlines()
    rows = metadata(out)["decisions"]
    assert last == "out/model.engine"
    told = [(row["layer"], row["form"], "kept" if row["kept"] else "fallback", row["reason"]) for row in rows]
    assert lines == [f"{layer}: {form}, {kept}: {reason}" for layer, form, kept, reason in told]
    assert len(lines) == 3


def test_verify_of_an_engine_without_a_gpu_says_so(rtx: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "capability", lambda: "")
    assert export(monkeypatch, "--library", "rtx", "--precision", "fp32") == (0, "")
    outcome = optimize(monkeypatch, "verify", out, "--runtime", "tensorrt")
    assert outcome.code == 7
    assert outcome.error == ["optimize: model.engine: there is no GPU here; run it on a machine with one"]


def test_an_engine_elsewhere_replaces_what_was_beside_it(
    standin: None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "b.tensorrt.onnx.data").write_bytes(b"weights of an older file")
    (out / "b.engine").write_bytes(b"old")
    assert export(monkeypatch, "--out", "out/b.engine", "--force") == (0, "")
    assert {name for name in listing(out) if name.startswith("b.")} == {
        "b.engine",
        "b.engine.json",
        "b.tensorrt.onnx",
    }


@pytest.mark.parametrize("name", ["model", "model.safetensors", "model.onnx", "model.bf16"])
def test_a_file_of_another_kind_is_not_replaced(
    name: str, standin: None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(out)
    code, error = export(monkeypatch, "--out", f"out/{name}", "--force")
    assert (code, error) == (
        2,
        f'optimize: --out: "{name}" is no name for a file of tensorrt; end it with .engine',
    )
    assert listing(out) == before


def test_a_file_beside_it_is_not_replaced_unasked(standin: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "b.tensorrt.onnx").write_bytes(b"another")
    before = listing(out)
    code, error = export(monkeypatch, "--out", "out/b.engine")
    assert (code, error) == (2, 'optimize: the file "b.tensorrt.onnx" exists already; use --force or another --out')
    assert listing(out) == before


def test_many_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_write, "EXTERNAL_BYTES", 1000)
    proto = matmuls("MatMul")
    before = proto.SerializeToString()
    tensorrt_write.save(proto, tmp_path / "net.onnx")
    assert listing(tmp_path) == {"net.onnx", "net.onnx.data"}
    assert onnx.load(tmp_path / "net.onnx").graph.initializer[0].raw_data == proto.graph.initializer[0].raw_data
    assert proto.SerializeToString() == before


# --- options


IMAGE = InputSpec(name="x", shape=("batch", 3, "size"))
MASK = InputSpec(name="m", shape=("batch", 4), dtype="int64")


def test_a_profile_names_every_dimension() -> None:
    sizes = tensorrt_profile.complete([IMAGE, MASK], tensorrt_profile.parse(["size=8:16:32"]))
    assert sizes == {"batch": Sizes(1, 8, 32), "size": Sizes(8, 16, 32)}
    assert tensorrt_profile.shapes([IMAGE, MASK], sizes) == {
        "x": [[1, 3, 8], [8, 3, 16], [32, 3, 32]],
        "m": [[1, 4], [8, 4], [32, 4]],
    }
    fixed = InputSpec(name="x", shape=(2, 3))
    assert tensorrt_profile.complete([fixed], {}) == {}
    assert tensorrt_profile.shapes([fixed], {}) == {}
    assert tensorrt_profile.parse(["batch=4"]) == {"batch": Sizes(4, 4, 4)}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["seq=1:2:3"], r'^--profile: there is no dimension "seq"; did you mean "size"\?$'),
        (["batch=1"], r'^--profile: the dimension "size" has no sizes; write --profile size=LEAST:USUAL:LARGEST'),
        (["batch=4:2:8"], r'^--profile, dimension "batch": 4:2:8 are no rising sizes from 1; write NAME='),
        (["batch=0"], r'^--profile, dimension "batch": 0:0:0 are no rising sizes'),
        (["batch=1:2"], r'^--profile: "batch=1:2" is not understood; write NAME='),
        (["batch"], r'^--profile: "batch" is not understood'),
        (["batch=1", "batch=2"], r'^--profile: the dimension "batch" is given twice'),
    ],
)
def test_a_bad_profile_is_named(texts: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        tensorrt_profile.complete([IMAGE], tensorrt_profile.parse(texts))
    with pytest.raises(RecipeError, match=r'there is no dimension "batch"; leave it out: every size is fixed'):
        tensorrt_profile.complete([InputSpec(name="x", shape=(2,))], {"batch": Sizes(1, 1, 1)})


BAD_OPTIONS = {
    "unknown dimension": (
        ("--library", "rtx", "--profile", "batc=3"),
        2,
        'optimize: --profile: there is no dimension "batc"; did you mean "batch"?',
    ),
    "unknown library": (
        ("--library", "tensort"),
        2,
        'optimize: --library: there is no TensorRT library "tensort"; did you mean "tensorrt"?',
    ),
    "unknown capability": (
        ("--library", "rtx", "--sm", "orin"),
        2,
        'optimize: --sm: "orin" is no compute capability; write them as in 86,89',
    ),
    "a timing cache of rtx": (
        ("--library", "rtx", "--timing-cache", "cache"),
        2,
        f"optimize: --timing-cache: TensorRT-RTX {'{version}'} times nothing while it builds, and keeps no such cache; "
        "leave it out, or use --library tensorrt",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_named(name: str, rtx: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, code, says = BAD_OPTIONS[name]
    before = listing(Path())
    assert export(monkeypatch, *args) == (code, says.format(version=tensorrt_library.find("rtx").version))
    assert listing(Path()) == before


def test_a_board_is_no_target_of_rtx(rtx: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, error = export(monkeypatch, "--library", "rtx", "--sm", "87")
    assert code == 2
    assert "does not build for compute capability 8.7; use some of 7.5, 8.0, 8.6," in error
    assert error.endswith("for another GPU build on it, with --library tensorrt")


def test_an_option_of_tensorrt_is_of_no_other_target(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = optimize(monkeypatch, "export", out, "--memory-limit", "60")
    assert (outcome.code, outcome.error) == (
        2,
        ["optimize: --memory-limit is of --target tensorrt; leave it out"],
    )


def test_the_full_library_builds_for_the_gpu_that_is_there(
    standin: None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, error = export(monkeypatch, "--sm", "86")
    assert (code, error) == (
        2,
        "optimize: --sm: TensorRT 10.3.0 builds for the GPU that is there (8.7), not for 8.6; "
        "leave it out, or use --library rtx",
    )
    monkeypatch.setattr(tensorrt_library, "capability", lambda: "")
    assert export(monkeypatch) == (
        7,
        "optimize: TensorRT 10.3.0 builds on a GPU, and there is no GPU here; run this on the machine that the engine "
        "is for, or use --library rtx, which builds without one",
    )


def test_a_recipe_does_not_build_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project(tmp_path))
    outcome = optimize(monkeypatch, "run", "recipe.yaml", "--out", "out", "--set", "export=[onnx,tensorrt]")
    assert outcome.code == 2
    assert "tensorrt lowers for one machine, which a recipe does not name; write export: [onnx]" in outcome.err


# --- the table of failures


def matmuls(operator: str) -> onnx.ModelProto:
    """Return x @ w, then an operator of a domain that TensorRT does not have where it is not another MatMul."""
    w = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    second = helper.make_node("MatMul", ["h", "w"], ["y"], name="layer2/MatMul")
    if operator != "MatMul":
        second = helper.make_node(operator, ["h"], ["y"], name="block.1.odd/odd", domain="strange")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="layer1/MatMul"), second],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])],
        [w],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("strange", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def lowering(proto: onnx.ModelProto) -> Callable[..., tensorrt_write.Lowered]:
    return lambda model, options: tensorrt_write.Lowered(proto=proto, decisions=())


MEMORY = "there was not enough memory to build the engine; "
FAILURES = {
    "out of memory": ("std::bad_alloc", MEMORY + "stop other programs, or allow smaller sizes in --profile"),
    "killed": (
        "SIGKILL",
        "the building process was killed, which is what the system does where memory runs out; "
        "stop other programs, or allow smaller sizes in --profile",
    ),
    "abort in the library": (
        "SIGABRT",
        "the library ended the building process (SIGABRT); try another precision, or another version of the library",
    ),
    "no kernel": ("Error Code 10", "the engine was not built: Error Code 10; try another precision or profile"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_build_that_fails_leaves_the_older_engine(
    name: str, standin: None, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = shutil.copytree(built, "out")
    before = contents(out)
    monkeypatch.setenv("STANDIN", FAILURES[name][0])
    code, error = export(monkeypatch, "--force")
    assert (code, error) == (6, f"optimize: TensorRT 10.3.0, model.tensorrt.onnx: {FAILURES[name][1]}")
    assert contents(out) == before
    assert listing(Path()) == {"out"} | {f"out/{name}" for name in listing(Path(out))}


def test_a_build_that_fails_leaves_nothing(standin: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(out)
    monkeypatch.setenv("STANDIN", "SIGKILL")
    assert export(monkeypatch)[0] == 6
    assert contents(out) == before


def contents(folder: str | Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_an_unsupported_operator_is_named_with_its_layer(
    standin: None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_write, "lower", lowering(matmuls("Odd")))
    before = listing(Path())
    code, error = export(monkeypatch)
    assert (code, error) == (
        6,
        "optimize: TensorRT 10.3.0, model.tensorrt.onnx: the graph is refused: "
        'Odd of layer "block.1.odd" is no operator that it has; write that part of the network with other operators, '
        "or use a version of TensorRT that has them",
    )
    assert listing(Path()) == before


@pytest.mark.parametrize("domain", ["strange", ""], ids=["unknown", "of ONNX"])
def test_rtx_names_what_it_refuses(domain: str, rtx: None, tmp_path: Path) -> None:
    proto, operator = matmuls("Odd"), "Odd" if domain else "Det"
    proto.graph.node[1].domain, proto.graph.node[1].op_type = domain, operator
    onnx.save(proto, tmp_path / "net.onnx")
    (tmp_path / "work").mkdir()
    job = tensorrt_build.Job(library=RTX, onnx=tmp_path / "net.onnx", shapes={"x": [[1, 16], [8, 16], [32, 16]]})
    with pytest.raises(ExportError, match=rf'refused: {operator} of layer "block.1.odd" is no operator that it has; w'):
        tensorrt_build.build(job, tmp_path / "work")
    assert not (tmp_path / "work" / "engine").exists()


@pytest.mark.parametrize("mebibytes", [8, 48], ids=["to load the library", "to build"])
def test_rtx_out_of_memory_is_one_sentence(mebibytes: int, rtx: None, tmp_path: Path) -> None:
    onnx.save(matmuls("MatMul"), tmp_path / "net.onnx")
    (tmp_path / "work").mkdir()
    shapes = {"x": [[1, 16], [8, 16], [32, 16]]}
    job = tensorrt_build.Job(library=RTX, onnx=tmp_path / "net.onnx", shapes=shapes, memory_bytes=mebibytes * 2**20)
    says = rf"there was not enough memory .* allow more than --memory-limit {mebibytes}, or"
    with pytest.raises(ExportError, match=says):
        tensorrt_build.build(job, tmp_path / "work")
    assert not (tmp_path / "work" / "engine").exists()


@pytest.mark.parametrize("version", ["10.2.1", "12.0.0.1", "8.6.1"])
def test_a_wrong_version_is_refused(version: str, standin: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_VERSION", version)
    code, error = export(monkeypatch)
    assert code == 6
    assert error.startswith(
        f"optimize: TensorRT {version} is installed, this version of paredown builds with 10.3 and later, below 12; "
    )
    assert not MADE & listing(out)


def test_no_library_is_exit_code_7(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tensorrt_library.MODULES.values():
        monkeypatch.setitem(sys.modules, name, None)
    code, error = export(monkeypatch)
    assert code == 7
    assert error.startswith(
        "optimize: neither TensorRT nor TensorRT-RTX is installed; pip install 'paredown[rtx]'; or pip install "
        "'paredown[tensorrt]'; a Jetson has it with JetPack"
    )
    code, error = export(monkeypatch, "--library", "rtx")
    assert (code, error) == (7, "optimize: TensorRT-RTX is not installed; pip install 'paredown[rtx]'")
    assert not MADE & listing(out)


def test_a_library_that_does_not_load_is_told(
    standin: None, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tensorrt.py").write_text('raise ImportError("libnvinfer.so.10: cannot open")')
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    code, error = export(monkeypatch)
    assert code == 7
    assert error.startswith("optimize: TensorRT does not load: libnvinfer.so.10: cannot open; pip install")
    assert any(line.startswith("--  TensorRT does not load") for line in tensorrt.examine())


# --- stale engines


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def changed(key: str, value: object) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / "model.engine.json").write_text(json.dumps(metadata(out) | {key: value}))

    return change


STALE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another engine": (
        lambda out: corrupt(out / "model.engine"),
        "model.engine: the engine is stale: it is not the file that model.engine.json was written for; export it again",
    ),
    "another graph": (
        lambda out: corrupt(out / "model.tensorrt.onnx"),
        "model.engine: the engine is stale: model.tensorrt.onnx has changed since it was built; export it again",
    ),
    "another version": (
        changed("version", "10.3.1"),
        "model.engine: the engine is stale: it was built with TensorRT 10.3.1, installed is 10.3.0; export it again",
    ),
    "another GPU": (
        changed("compute_capability", ["8.6", "8.9"]),
        "model.engine: the engine is stale: it was built for compute capability 8.6 and 8.9, this GPU has 8.7; "
        "export it again",
    ),
    "no metadata": (
        lambda out: (out / "model.engine.json").unlink(),
        "model.engine.json: the metadata is missing, so that nothing says what the engine is for; export it again",
    ),
    "strange metadata": (
        changed("schema", "paredown.engine/0"),
        "model.engine.json: this is no metadata of an engine ('schema'); export it again",
    ),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_engine_is_refused_with_the_reason(
    name: str, standin: None, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(built, tmp_path / "out")
    change, says = STALE[name]
    change(out)
    before = listing(out)
    outcome = optimize(monkeypatch, "verify", out, "--runtime", "tensorrt")
    assert (outcome.code, outcome.error) == (6, [f"optimize: {says}"])
    assert listing(out) == before


def test_a_missing_engine_says_how_to_make_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = optimize(monkeypatch, "verify", out, "--runtime", "tensorrt")
    says = "optimize: out/model.engine: is missing; run optimize export out --target tensorrt"
    assert (outcome.code, outcome.error) == (3, [says])
    with pytest.raises(InputError, match=r"model.engine: is missing; run optimize export --target tensorrt"):
        tensorrt.open(out / "model.engine")


# --- the page of failures

REFUSED = (
    "TensorRT 10.3.0, model.tensorrt.onnx: the graph is refused: "
    'Odd of layer "block.1.odd" is no operator that it has; write that part of the network with other operators, '
    "or use a version of TensorRT that has them"
)
WRONG = (
    "TensorRT 10.2.1 is installed, this version of paredown builds with 10.3 and later, below 12; "
    f"{tensorrt_library.INSTALL['tensorrt']} in a version of that range, or name the other with --library"
)
NONE = (
    "neither TensorRT nor TensorRT-RTX is installed; "
    f"{tensorrt_library.INSTALL['rtx']}; or {tensorrt_library.INSTALL['tensorrt']}"
)
NO_GPU = (
    "TensorRT 10.3.0 builds on a GPU, and there is no GPU here; run this on the machine that the engine is for, "
    "or use --library rtx, which builds without one"
)
BAD_CACHE = (
    '--timing-cache "out/cache": it was made by another version of TensorRT or for another GPU, or is no timing cache; '
    "delete it, or name another file"
)
AFTERWARDS = "every file of the folder as it was, an older engine too; nothing else"
Arrange: TypeAlias = Callable[[pytest.MonkeyPatch, Path], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A way to fail: what is arranged, what is run then, and how that answers."""

    when: str
    arrange: Arrange
    says: str
    code: int = 6
    command: tuple[str, ...] = ("export", "out", "--target", "tensorrt", "--force")


VERIFY = ("verify", "out", "--runtime", "tensorrt")


def ends(how: str) -> Arrange:
    return lambda patch, out: patch.setenv("STANDIN", how)


def is_stale(name: str) -> Failure:
    return Failure(
        when=f"stale engine: {name}",
        arrange=lambda patch, out: STALE[name][0](out),
        says=STALE[name][1],
        command=VERIFY,
    )


def without_library(patch: pytest.MonkeyPatch, out: Path) -> None:
    for name in tensorrt_library.MODULES.values():
        patch.setitem(sys.modules, name, None)


def failed(name: str) -> Failure:
    says = f"TensorRT 10.3.0, model.tensorrt.onnx: {FAILURES[name][1]}"
    return Failure(when=f"building: {name}", arrange=ends(FAILURES[name][0]), says=says)


TABLE = (
    Failure(
        when="unsupported operator",
        arrange=lambda patch, out: patch.setattr(tensorrt_write, "lower", lowering(matmuls("Odd"))),
        says=REFUSED,
    ),
    Failure(when="wrong version", arrange=lambda patch, out: patch.setenv("STANDIN_VERSION", "10.2.1"), says=WRONG),
    Failure(when="no library", arrange=without_library, says=NONE, code=7),
    Failure(
        when="no GPU, full library",
        arrange=lambda patch, out: patch.setattr(tensorrt_library, "capability", lambda: ""),
        says=NO_GPU,
        code=7,
    ),
    Failure(
        when="timing cache of something else",
        arrange=lambda patch, out: (out / "cache").write_bytes(b"of another version"),
        says=BAD_CACHE,
        command=("export", "out", "--target", "tensorrt", "--force", "--timing-cache", "out/cache"),
    ),
    *map(failed, FAILURES),
    *map(is_stale, STALE),
    Failure(
        when="no engine",
        arrange=lambda patch, out: (out / "model.engine").unlink(),
        says="out/model.engine: is missing; run optimize export out --target tensorrt",
        code=3,
        command=VERIFY,
    ),
)


@pytest.mark.parametrize("failure", TABLE, ids=[failure.when for failure in TABLE])
def test_a_failure_is_one_sentence_and_leaves_all_as_it_was(
    failure: Failure, standin: None, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path(shutil.copytree(built, "out"))
    failure.arrange(monkeypatch, out)
    before = contents(".")
    outcome = optimize(monkeypatch, *failure.command)
    assert (outcome.code, outcome.error) == (failure.code, [f"optimize: {failure.says}"])
    assert contents(".") == before


def test_the_page_of_failures_is_current() -> None:
    rows = [
        f"| {failure.when} | `optimize {failure.command[0]}` | {failure.code} | {failure.says} | {AFTERWARDS} |"
        for failure in TABLE
    ]
    head = [
        "# How engines fail\n",
        "What goes wrong while an engine is built, or before it is run: the exit code, the one line on standard error",
        "(after `optimize: `), and what is on disk afterwards. Each row is a test, with a stand-in of the library that",
        "ends as the real one does; unsupported operators and want of memory are tested with TensorRT-RTX itself too",
        "(`tests/exporters/test_tensorrt.py`, which writes and checks this page).\n",
        "| when | command | exit code | sentence | on disk afterwards |",
        "|---|---|---|---|---|",
    ]
    assert is_current("tensorrt_failures.md", "\n".join([*head, *rows, ""])), f"run this test with {WRITE}=1"


# --- timing cache


def test_the_timing_cache_is_read_used_and_written_back(
    standin: None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path("cache")
    for read, written in ((None, b"standin timed"), (b"standin timed", b"standin timed timed")):
        assert export(monkeypatch, "--timing-cache", cache, "--force") == (0, "")
        found = metadata(out)
        assert cache.read_bytes() == written
        assert found["timing_cache_sha256"] == hashlib.sha256(written).hexdigest()
        assert found["timing_cache_read_sha256"] == (read and hashlib.sha256(read).hexdigest())
    cache.write_bytes(b"of another version")
    before = listing(Path())
    assert export(monkeypatch, "--timing-cache", cache, "--force") == (
        6,
        'optimize: --timing-cache "cache": it was made by another version of TensorRT or for another GPU, or is no '
        "timing cache; delete it, or name another file",
    )
    assert (listing(Path()), cache.read_bytes()) == (before, b"of another version")
    code, error = export(monkeypatch, "--timing-cache", "no/cache", "--force")
    assert (code, error) == (2, 'optimize: --timing-cache: the folder "no" does not exist; name a file to write')


# --- running an engine


def test_an_engine_is_verified_at_sizes_of_its_profile(
    standin: None, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = optimize(monkeypatch, "verify", built, "--runtime", "tensorrt")
    assert (outcome.code, outcome.error) == (0, [])
    lines = outcome.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["TensorRT 10.3.0 batch 2", "TensorRT 10.3.0 batch 3"]
    assert all(line.endswith("first bad layer: none") for line in lines)


def test_a_runner_computes_what_the_model_does(standin: None, built: Path) -> None:
    model, runner = store.load(built), tensorrt.open(built / "model.engine")
    assert runner.inputs == model.inputs
    x = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    have = runner.run({"x": x.numpy()})
    with torch.no_grad():
        want = model.module()(x).numpy()
    assert list(have) == metadata(built)["outputs"]
    assert np.abs(next(iter(have.values())) - want).max() <= 1e-5 * np.abs(want).max()
    _, spec = tensorrt.comparison(built / "model.engine", model)
    assert (spec.batches, spec.rel, spec.inputs[0].shape[0]) == ((2, 3), None, 3)


@pytest.mark.parametrize(
    ("name", "precision"), [("pair", "fp16"), pytest.param("attention", "fp32", marks=pytest.mark.slow)]
)
def test_several_inputs_outputs_and_types(
    name: str, precision: Any, standin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_write, "lower", REAL)
    model, path = NETS[name](), tmp_path / "model.engine"
    sizes = {"seq": Sizes(2, 6, 8)} if name == "attention" else {}
    tensorrt.export(model, path, tensorrt.Options(precision=precision, profile=sizes))
    rows = verify(model, path)
    assert [row.batch for row in rows] == [1, 3]
    assert {row.limit for row in rows} == {1e-2 if precision == "fp16" else 1e-4}
    assert 0 < rows[1].rel < rows[1].limit
    assert listing(tmp_path) == MADE


def test_inputs_that_our_kernels_round_are_exact_in_an_engine(
    standin: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_write, "lower", REAL)
    plain = pack_all(build(Perceptron, ROWS), ("uniform 8",))
    model, path = replace(plain, dynamic=frozenset({"first.weight", "second.weight"})), tmp_path / "model.engine"
    tensorrt.export(model, path, tensorrt.Options(precision="fp32"))
    assert all(row.limit == 1e-4 and row.agreement_limit is None for row in verify(model, path))


def test_feeds_that_do_not_fit_are_named(standin: None, built: Path) -> None:
    runner = tensorrt.open(built / "model.engine")
    x = np.zeros((4, 3, 12, 12), np.float32)
    with pytest.raises(InputError, match=r"^feeds y: the engine takes the inputs x; pass exactly those$"):
        runner.run({"y": x})
    with pytest.raises(InputError, match=r'^input "x": dtype float64 was fed, the engine takes float32$'):
        runner.run({"x": x.astype(np.float64)})
    with pytest.raises(InputError, match=r"shape \[17, 3, 12, 12\] was fed, the engine was built for batch 2 to 16;"):
        runner.run({"x": np.zeros((17, 3, 12, 12), np.float32)})


def test_an_engine_needs_a_gpu_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeMissingError, match=r"uses no GPU here, .* install a CUDA build of torch"):
        tensorrt_engine.place()


@pytest.mark.parametrize(
    ("weight", "layer"), [("conv1", "conv1 (conv2d)"), ("linear", "linear (linear)")], ids=["first", "last"]
)
def test_the_first_bad_layer_of_an_engine_is_named(
    weight: str, layer: str, standin: None, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is of another weight: engines of prefixes find it, several values a time."""
    lower, opened = tensorrt_write.lower, list[int]()

    def wrong(model: Any, options: Any) -> tensorrt_write.Lowered:
        name = f"{weight}.weight"
        return lower(model.with_weights({name: Dense(values=model.weights[name].dense() * 1.5)}), options)

    build = tensorrt_build.build

    def counted(job: Any, folder: Path) -> tensorrt_build.Built:
        opened.append(len(onnx.load(job.onnx).graph.output))
        return build(job, folder)

    monkeypatch.setattr(tensorrt_write, "lower", wrong)
    assert export(monkeypatch, "--precision", "fp32") == (0, "")
    before = listing(out)
    monkeypatch.setattr(tensorrt_build, "build", counted)
    outcome = optimize(monkeypatch, "verify", out, "--runtime", "tensorrt")
    assert outcome.code == 6
    assert f", first in {layer};" in outcome.error[0]
    assert listing(out) == before
    assert 1 <= len(opened) <= 3
    assert max(opened) <= tensorrt_compare.AT_ONCE


class Probe:
    """Values "0", "1", ... that are wrong from one on; counts how often some were asked for."""

    def __init__(self, wrong: int, at_once: int) -> None:
        self.wrong, self.asked = wrong, 0
        self.search = SimpleNamespace(at_once=at_once)

    def first_bad(self, names: list[str]) -> str | None:
        assert len(names) <= self.search.at_once
        self.asked += 1
        return next((name for name in names if int(name) >= self.wrong), None)


@given(count=st.integers(0, 300), at_once=st.integers(1, 9), data=st.data())
def test_the_search_finds_the_first_bad_value(count: int, at_once: int, data: st.DataObject) -> None:
    probe = Probe(data.draw(st.integers(0, count)), at_once)
    found = onnx_layers._bisect(probe, [str(number) for number in range(count)], str(count))  # type: ignore[arg-type]
    assert found == str(probe.wrong)
    assert probe.asked <= np.ceil(np.log(count + 1) / np.log(at_once + 1) + 1e-9) + 1


def test_a_prefix_keeps_what_subgraphs_read() -> None:
    """y = x + 1 if c else x + 2; the branches read values of the outer graph. z hangs on y and is not in the prefix."""
    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT, shape=[2])
    branches = [
        helper.make_graph([helper.make_node("Add", ["d", number], ["out"])], number, [], [value("out")])
        for number in ("one", "two")
    ]
    nodes = [
        helper.make_node("Identity", ["x"], ["d"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Add", ["y", "three"], ["z"]),
    ]
    weights = [
        numpy_helper.from_array(np.full(2, n + 1, np.float32), name) for n, name in enumerate(("one", "two", "three"))
    ]
    fed = [value("x"), helper.make_tensor_value_info("c", TensorProto.BOOL, []), value("unused")]
    graph = helper.make_graph(nodes, "main", fed, [value("z")], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    part = onnx_layers._prefix(proto, [value("y")])
    onnx.checker.check_model(part)
    assert [node.op_type for node in part.graph.node] == ["Identity", "If"]
    assert [item.name for item in part.graph.initializer] == ["one", "two"]
    assert [item.name for item in part.graph.input] == ["x", "c"]
    assert [item.name for item in proto.graph.output] == ["z"]
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.ones(2, np.float32), "c": np.array(False)})
    assert y.tolist() == [3.0, 3.0]


# --- the building process


@pytest.mark.slow
def test_the_builder_ends_with_the_command(standin: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed or interrupted while building: no process goes on, nothing but a hidden folder of a killed run is left."""
    monkeypatch.setenv("STANDIN", "hang")
    code = (
        "from paredown.exporters import tensorrt_library; tensorrt_library.capability = lambda: '8.7'\n"
        "from paredown.optimizer import cli; cli.main()"
    )
    before = listing(out)
    assert not any(out.rglob("log"))
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        command = [sys.executable, "-c", code, "export", "out", "--target", "tensorrt"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        child = wait_for(lambda pid=process.pid: child_of(pid))
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error.strip()) == (status, "optimize: interrupted" if status == 130 else "")
        assert wait_for(lambda pid=child: not Path(f"/proc/{pid}").exists())
        left = {name.partition("/")[0] for name in listing(out) - before}
        assert all(name.startswith(".paredown-") for name in left)
        assert bool(left) == (number == signal.SIGKILL)


def child_of(pid: int) -> int:
    """Return the building process of a process, 0 as long as it has none that hangs."""
    if not any("hanging" in log.read_text() for log in Path().rglob("log")):
        return 0
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def wait_for(found: Callable[[], Any]) -> Any:
    for _ in range(600):
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError("waited a minute")


# --- doctor


def test_doctor_says_what_each_library_can_do(rtx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(tensorrt_library, "capability", lambda: "")
    full, small = tensorrt.examine()
    assert full.startswith("--  TensorRT: not installed; pip install 'paredown[tensorrt]'; a Jetson has it with")
    assert small.startswith("ok  TensorRT-RTX 1.")
    assert ": builds engines for 7.5, 8.0, 8.6, 8.9, " in small
    assert small.endswith("with or without a GPU; runs none, there is no GPU here")


def test_doctor_says_that_the_full_library_needs_a_gpu(standin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "ok  TensorRT 10.3.0: builds engines for this GPU (8.7) and runs them on this GPU (8.7)"
    assert tensorrt.examine()[0] == says
    monkeypatch.setattr(tensorrt_library, "capability", lambda: "")
    says = "--  TensorRT 10.3.0: builds and runs engines on the GPU that they are for, and there is no GPU here"
    assert tensorrt.examine()[0] == says


# --- the real library


@pytest.fixture
def machine() -> str:
    """The compute capability of the GPU of a machine with the full library."""
    pytest.importorskip("tensorrt", reason="the full TensorRT is not installed: engines are not run")
    return tensorrt_library.capability() or pytest.skip("there is no GPU: engines are not run")


@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_real_engines_compute_what_the_model_does(machine: str, net: Any, precision: str, tmp_path: Path) -> None:
    sizes = {name: Sizes(1, 4, 16) for spec in net.model.inputs for name in spec.shape if isinstance(name, str)}
    options = tensorrt.Options(precision=precision, profile=sizes, library="tensorrt")  # type: ignore[arg-type]
    path = tmp_path / "model.engine"
    tensorrt.export(net.model, path, options)
    rows = verify(net.model, path)
    assert [row.batch for row in rows] == [1, 3]
    assert json.loads((tmp_path / "model.engine.json").read_text())["compute_capability"] == [machine]


@pytest.mark.tensorrt
def test_a_real_timing_cache_is_used_again(machine: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert export(monkeypatch, "--library", "tensorrt", "--timing-cache", "cache", "--force") == (0, "")
        assert metadata(out)["timing_cache_sha256"] == digest(Path("cache"))
    assert metadata(out)["timing_cache_read_sha256"]
    Path("cache").write_bytes(b"x" * 100)
    code, error = export(monkeypatch, "--library", "tensorrt", "--timing-cache", "cache", "--force")
    assert code == 6
    assert "is no timing cache" in error


@pytest.mark.tensorrt
def test_the_first_bad_layer_of_a_real_engine(machine: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = tensorrt_write.lower

    def wrong(model: Any, options: Any) -> tensorrt_write.Lowered:
        weight = model.weights["conv2.weight"].dense()
        return lower(model.with_weights({"conv2.weight": Dense(values=weight * 1.5)}), options)

    monkeypatch.setattr(tensorrt_write, "lower", wrong)
    assert export(monkeypatch, "--library", "tensorrt") == (0, "")
    outcome = optimize(monkeypatch, "verify", out, "--runtime", "tensorrt")
    assert outcome.code == 6
    assert ", first in conv2 (" in outcome.error[0]
