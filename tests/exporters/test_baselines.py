"""What others make of an original: files that run, as exact as their formats allow, and reasons where there is none."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from paredown.exporters import onnx as target
from paredown.exporters import onnx_baselines, trtexec
from paredown.optimizer.errors import ExportError, RuntimeMissingError
from paredown.optimizer.sections import BASELINES

Arrays = dict[str, np.ndarray]
K, N = 64, 10


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A convolution, a pooled Gemm with transposed weights and a bias, and random weights."""
    return _network(tmp_path / "baseline.onnx", gemm=True)


def _network(path: Path, *, gemm: bool) -> Path:
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((K, 3, 3, 3)) / 5, "m": rng.standard_normal((N, K)), "b": np.arange(N)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f" if gemm else "y"], name="flatten"),
    ]
    if gemm:
        nodes.append(helper.make_node("Gemm", ["f", "m", "b"], ["y"], transB=1, name="head"))
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N if gemm else K])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()][
            : 3 if gemm else 1
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def _feeds(count: int = 4) -> list[Arrays]:
    return [{"x": np.random.default_rng(i).standard_normal((8, 3, 8, 8)).astype(np.float32)} for i in range(count)]


def _run(path: Path, feeds: Arrays) -> np.ndarray:
    (found,) = target.open(path).run(feeds).values()
    return found


def _operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# relative error: float16 has 11 bits; 8-bit grids 1/255 of a range; 4 bits 1/15 of a block's
@pytest.mark.parametrize(
    ("name", "least", "most"), [("fp16", 1e-6, 2e-3), ("int8", 1e-4, 3e-2), ("matmulnbits", 1e-3, 0.2)]
)
def test_a_baseline_computes_nearly_the_same(original: Path, name: str, least: float, most: float) -> None:
    path = original.with_name(f"baseline.{name}.onnx")
    how = onnx_baselines.make(name, original, path, _feeds())
    feeds = _feeds(6)[-1]
    want, have = _run(original, feeds), _run(path, feeds)
    assert how
    assert have.dtype == want.dtype == np.float32
    error = np.abs(have - want).max() / np.abs(want).max()
    assert least < error < most


def test_each_baseline_is_what_it_says(original: Path) -> None:
    made = {name: original.with_name(f"baseline.{name}.onnx") for name in BASELINES if name != "trtexec"}
    told = {name: onnx_baselines.make(name, original, path, _feeds()) for name, path in made.items()}
    assert told["matmulnbits"] == "MatMulNBits, 4 bits, block 32, accuracy level 4, in 1 linear layer"
    assert told["matmulnbits128"] == "MatMulNBits, 4 bits, block 128, accuracy level 4, in 1 linear layer"
    assert told["int8"].startswith("quantize_static, Q/DQ, per channel, ")
    half = onnx.load(made["fp16"]).graph
    assert {item.data_type for item in half.initializer} == {TensorProto.FLOAT16}
    assert {value.type.tensor_type.elem_type for value in (*half.input, *half.output)} == {TensorProto.FLOAT}
    assert "MatMulNBits" in _operators(made["matmulnbits"])
    assert "Gemm" not in _operators(made["matmulnbits"])
    int8 = onnx.load(made["int8"]).graph
    scales = [numpy_helper.to_array(item) for item in int8.initializer if item.name == "w_scale"]
    assert [scale.shape for scale in scales] == [(K,)]


def test_int8_has_the_settings_that_suit_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_baselines.platform, "machine", lambda: "aarch64")
    assert onnx_baselines._int8_settings() == (True, False)
    monkeypatch.setattr(onnx_baselines.platform, "machine", lambda: "x86_64")
    for flags, reduced in (("flags: avx512_vnni", False), ("flags: avx_vnni", False), ("flags: avx2", True)):
        (tmp_path / "cpuinfo").write_text(flags)
        monkeypatch.setattr(onnx_baselines, "Path", lambda _: tmp_path / "cpuinfo")
        assert onnx_baselines._int8_settings() == (False, reduced)


@pytest.mark.parametrize("settings", [{"transB": 1}, {"transB": 0}, {"transB": 1, "alpha": 2.0}])
def test_a_gemm_split_for_matmulnbits_computes_the_same(tmp_path: Path, settings: dict[str, float]) -> None:
    path = _network(tmp_path / "a.onnx", gemm=True)
    model = onnx.load(path)
    node = model.graph.node[-1]
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in settings.items())
    if not settings["transB"]:
        matrix = next(item for item in model.graph.initializer if item.name == "m")
        matrix.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(matrix).T), "m"))
    onnx.save(model, path)
    want = _run(path, _feeds()[0])
    onnx_baselines._split_gemms(model.graph)
    onnx.save(model, tmp_path / "b.onnx")
    kept = "alpha" in settings
    assert ("Gemm" in _operators(tmp_path / "b.onnx")) == kept
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", _feeds()[0]), want, rtol=1e-5, atol=1e-5)


def test_nothing_to_quantize_is_a_reason_and_leaves_no_file(tmp_path: Path) -> None:
    original, path = _network(tmp_path / "baseline.onnx", gemm=False), tmp_path / "made.onnx"
    with pytest.raises(ExportError, match="it has no product with a constant matrix for MatMulNBits"):
        onnx_baselines.make("matmulnbits", original, path, _feeds())
    assert [file.name for file in tmp_path.iterdir()] == ["baseline.onnx"]


def test_what_does_not_run_is_a_reason_and_leaves_no_file(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = original.with_name("made.onnx")

    def broken(_original: Path, to: Path, _feeds: Sequence[Arrays]) -> str:
        to.write_bytes(b"no model")
        to.with_name("made.onnx.data").write_bytes(b"weights")
        return "broken"

    monkeypatch.setitem(onnx_baselines._MAKERS, "fp16", broken)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="fp16: onnxruntime does not load it"):
        onnx_baselines.make("fp16", original, path, _feeds())
    assert [file.name for file in original.parent.iterdir()] == ["baseline.onnx"]


def test_a_file_with_packed_layers_is_no_original(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"..LutLinear..")
    with pytest.raises(ExportError, match="the original has packed layers; name the float original first"):
        onnx_baselines.make("fp16", path, tmp_path / "made.onnx", _feeds())


def test_large_weights_stand_beside_the_graph(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_baselines, "EXTERNAL_BYTES", 1000)
    path = original.with_name("baseline.fp16.onnx")
    onnx_baselines.make("fp16", original, path, _feeds())
    assert path.with_name("baseline.fp16.onnx.data").stat().st_size >= 2 * 27 * K
    assert _run(path, _feeds()[0]).shape == (8, N)


def test_the_tools_leave_logging_as_it_was(original: Path) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.manager.disable)
    onnx_baselines.make("matmulnbits", original, original.with_name("made.onnx"), _feeds())
    assert (list(root.handlers), root.level, root.manager.disable) == before


# --- trtexec: a stand-in that writes what the program writes

STANDIN = """#!/bin/sh
for word in "$@"; do
  case "$word" in --exportTimes=*) out="${word#--exportTimes=}";; esac
done
printf '%s\\n' "$*" > "$PAREDOWN_ARGUMENTS"
[ -n "$PAREDOWN_FAIL" ] && { echo "[E] Error[4]: no such operator"; echo "&&&& FAILED"; exit 1; }
cat "$PAREDOWN_TIMES" > "$out"
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for trtexec on the PATH, and where it writes its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "trtexec").write_text(STANDIN)
    (folder / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PAREDOWN_ARGUMENTS", str(tmp_path / "arguments"))
    monkeypatch.setenv("PAREDOWN_TIMES", str(tmp_path / "times"))
    (tmp_path / "times").write_text(json.dumps([_trace(1.0 + 0.01 * i) for i in range(100)]))
    return tmp_path


def _trace(compute: float) -> dict[str, float]:
    return {"startInMs": 5.0, "inMs": 0.25, "computeMs": compute, "outMs": 0.5, "latencyMs": compute + 0.75}


def test_trtexec_gives_times_with_and_without_transfers(program: Path) -> None:
    found = trtexec.measure(Path("a.onnx"), {"x": (4, 3, 8, 8), "ids": (4, 7)}, 2.4)
    np.testing.assert_allclose(found.compute, 1e-3 * (1 + 0.01 * np.arange(100)))
    np.testing.assert_allclose(found.with_transfers - found.compute, 0.75e-3)
    words = (program / "arguments").read_text().split()
    assert words[:2] == ["--onnx=a.onnx", "--duration=2"]
    assert words[-1] == "--shapes=x:4x3x8x8,ids:4x7"


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ("[]", "trtexec measured no run"),
        ("{", r"trtexec wrote no times that can be read \(JSONDecodeError\)"),
        ('[{"computeMs": 1}]', r"trtexec wrote no times that can be read \(KeyError\)"),
    ],
)
def test_times_that_cannot_be_read(program: Path, times: str, told: str) -> None:
    (program / "times").write_text(times)
    with pytest.raises(ExportError, match=told):
        trtexec.measure(Path("a.onnx"), {}, 1)


def test_a_failure_of_trtexec_is_told_in_its_words(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_FAIL", "1")
    with pytest.raises(ExportError, match=r"a.onnx: trtexec ended with 1: \[E\] Error\[4\]: no such operator"):
        trtexec.measure(Path("a.onnx"), {}, 1)
    assert (program / "arguments").exists()


def test_without_trtexec(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeMissingError, match="trtexec is not on this machine; install TensorRT"):
        trtexec.measure(Path("a.onnx"), {}, 1)
