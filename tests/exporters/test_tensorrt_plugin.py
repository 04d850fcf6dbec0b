"""Graphs with nodes of a plugin: what they compute, by numpy in place of the plugin, and what is left to constants."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor, nn

from paredown.exporters import tensorrt, tensorrt_child, tensorrt_library, tensorrt_plugin
from paredown.exporters.board import plugin_aot
from paredown.exporters.difference import difference
from paredown.exporters.tensorrt_graph import GraphOptions, Lowered, lower
from paredown.exporters.tensorrt_library import Library
from paredown.exporters.tensorrt_profile import Sizes
from paredown.kernels import layout_mma16
from paredown.kernels.cuda import cubins, launch
from paredown.kernels.lut_spec import LutSpec
from paredown.kernels.tensorrt import node as nodes
from paredown.optimizer.errors import RecipeError, RuntimeMissingError
from paredown.optimizer.model import InputSpec, Model
from paredown.optimizer.weight import LowRank, Sum

from .conftest import build, packed

ROWS = InputSpec(name="x", shape=("batch", "time", 32))
NONE = frozenset[str]()


class Stack(nn.Module):
    """Linear layers with every ending, one of them too narrow for the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 64, bias=False)
        self.third, self.fourth = nn.Linear(64, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.gelu(self.second(x))
        y: Tensor = self.fourth(nn.functional.silu(self.third(x)))
        return y


FORMS = ("codebook 4 blocks", "codebook 3 fp16", "uniform 2", "uniform 4")


def stack() -> Model:
    """Return the network with a low rank beside the codes of its second layer."""
    model, seeded = build(Stack, ROWS), torch.Generator().manual_seed(0)
    changed = {
        name: packed(weight.dense(), form, seeded)
        for (name, weight), form in zip(model.weights.items(), FORMS, strict=True)
    }
    w = model.weights["second.weight"].dense()
    left, right = (packed(part * 0.1, "uniform 8", seeded) for part in (w[:, :3], w[:3]))
    changed["second.weight"] = Sum(terms=(changed["second.weight"], LowRank(left=left, right=right)))
    return model.with_weights(changed)


@cache
def lowered(precision: Any = "fp16", keep: frozenset[str] = NONE) -> Lowered:
    return lower(stack(), GraphOptions(precision=precision, forms="stored", plugin=True, keep=keep))


class LutLinearMma16(OpRun):
    """The operator, in float64: codes by the layout's own inverse, the rest by numpy."""

    op_domain = "paredown"

    def _run(self, *inputs: np.ndarray, **told: Any) -> tuple[np.ndarray]:
        codes, table, scale, x, _, bias, left, t = inputs
        n, k, bits, kind = told["n"], told["k"], told["bits"], nodes.KINDS[told["kind"]]
        spec = LutSpec(n=n, k=k, bits=bits, group=told["group"], table_rows=told["table_rows"])
        columns = layout_mma16.unpack(torch.from_numpy(codes.copy()).view(torch.uint8), spec).numpy()
        rows = np.arange(n)[:, None]
        entries = levels(table, kind, told)[rows // spec.table_rows if spec.table_rows else rows * 0, columns]
        sizes = layout_mma16.shape(spec)
        held = scale.view(np.float16 if told["scale_type"] == 1 else np.float32)
        by = held.reshape(sizes.blocks, sizes.slots, 16)[rows // 16, slots(spec), rows % 16]
        unit = np.int32(told["unit_bits"]).view(np.float32)
        w = entries * np.float64(unit) * by.astype(np.float64)
        y = x.astype(np.float64) @ w.T + (bias.astype(np.float64) if told["has_bias"] else 0.0)
        if told["rank"]:
            y = y + t.astype(np.float64) @ left.astype(np.float64)[:, : told["rank"]].T
        return (activated(y, told["activation"]).astype(x.dtype),)


def levels(table: np.ndarray, kind: str, told: dict[str, Any]) -> np.ndarray:
    octets, count = table.view(np.uint8), 2 ** told["bits"]
    if kind == "f16b":
        zero = np.array([told["shift_bits"]], np.int32).view(np.float16)[0] - 1024
        return octets.reshape(-1, count).astype(np.float64) - float(zero)
    low, high = octets.reshape(-1, 2, count).transpose(1, 0, 2).astype(np.uint16)
    return (low | high << 8).view(np.float16).astype(np.float64)


def slots(spec: LutSpec) -> np.ndarray:
    sizes, columns = layout_mma16.shape(spec), np.arange(spec.k)
    group = columns // spec.group_columns
    step = group * sizes.group_steps + columns % spec.group_columns // 32
    if sizes.steps_per_slot == 4:
        return step // 4 // sizes.units_per_slot
    return step // sizes.steps_per_slot


def activated(y: np.ndarray, number: int) -> np.ndarray:
    functions: tuple[Any, ...] = (
        lambda x: x,
        torch.relu,
        nn.functional.gelu,
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        nn.functional.silu,
    )
    return np.asarray(functions[number](torch.from_numpy(y)).numpy())


def nodes_of(found: Lowered) -> list[onnx.NodeProto]:
    return [node for node in found.proto.graph.node if node.domain == "paredown"]


def told(node: onnx.NodeProto) -> dict[str, Any]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}


def test_the_graph_computes_what_the_model_does() -> None:
    model = stack()
    evaluator = ReferenceEvaluator(lowered().proto, new_ops=[LutLinearMma16])
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    (y,) = evaluator.run(None, {"x": x.numpy()})
    with torch.no_grad():
        wanted = model.module()(x).numpy()
    assert y.dtype == np.float32
    assert difference(wanted, y)[1] < 1e-2


def test_nodes_say_what_a_plugin_needs_to_know() -> None:
    found = nodes_of(lowered())
    assert {node.op_type for node in found} == {nodes.OP}
    assert [told(node)["activation"] for node in found] == [1, 2, 4]
    assert [told(node)["rank"] for node in found] == [0, 3, 0]
    assert [told(node)["has_bias"] for node in found] == [1, 0, 1]
    assert [nodes.KINDS[told(node)["kind"]] for node in found] == ["f16b", "f16", "f16"]
    assert {(told(node)["plugin_version"], told(node)["plugin_namespace"]) for node in found} == {(b"1", b"paredown")}
    assert {len(node.input) for node in found} == {len(launch.INPUTS)}


def test_constants_are_words_and_floats_of_one_type() -> None:
    for precision, kind in (("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)):
        found = lowered(precision)
        types = {tensor.name: tensor.data_type for tensor in found.proto.graph.initializer}
        for node in nodes_of(found):
            assert {types[name] for name in node.input[:3]} == {onnx.TensorProto.INT32}
            assert {types.get(name, kind) for name in node.input[3:]} == {kind}
        assert not found.proto.functions
        assert "paredown" in {entry.domain for entry in found.proto.opset_import}


def test_what_the_kernels_do_not_take_is_held_as_constants() -> None:
    found = {decision.layer: decision for decision in lowered().decisions}
    assert found["first.weight"].reason.endswith("multiplied by the plugin, its kernels were never run on a GPU")
    assert found["fourth.weight"].reason.endswith(
        "not by the plugin: rows of 20 inputs in groups of 20 are not read in place: multiples of 8 and 32"
    )
    kept = {decision.layer: decision for decision in lowered(keep=frozenset({"first"})).decisions}
    assert "not float32" in kept["first.weight"].reason
    assert len(nodes_of(lowered(keep=frozenset({"first"})))) == 2


def test_a_plugin_has_no_float32() -> None:
    with pytest.raises(RecipeError, match=r"^--plugin: the plugin multiplies float16 and bfloat16, not float32; use"):
        GraphOptions(precision="fp32", plugin=True)


def test_layers_that_round_their_inputs_are_computed_exactly() -> None:
    model = replace(stack(), dynamic=frozenset({"first.weight"}))
    (first, *_) = nodes_of(lower(model, GraphOptions(forms="stored", plugin=True)))
    assert nodes.KINDS[told(first)["kind"]] == "f16b"


# --- engines with an embedded plugin


def test_only_a_library_that_embeds_plugins_builds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tensorrt.Options(plugin=True, profile={"time": Sizes(1, 5, 9)})
    for name, error, said in (
        ("rtx", RecipeError, r"^--plugin: TensorRT-RTX 1.7 has no plugins; use --library tensorrt$"),
        ("tensorrt", RuntimeMissingError, r"^--plugin: TensorRT 1.7 does not embed plugins; use 10.9 or later, or "),
    ):
        monkeypatch.setattr(tensorrt_library, "find", lambda _, name=name: Library(name=name, version="1.7"))
        with pytest.raises(error, match=said):
            tensorrt.export(stack(), tmp_path / "model.engine", options)
    assert list(tmp_path.iterdir()) == []


def test_the_builder_knows_the_plugin_before_it_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Parser:
        num_errors = 0

        def __init__(self, *_: object) -> None:
            calls.append("parser")

        def parse_from_file(self, path: str) -> bool:
            return False

    class Anything:
        def __getattr__(self, name: str) -> Any:
            return Parser if name == "OnnxParser" else Anything()

        def __call__(self, *_: object) -> Any:
            return Anything()

        def __int__(self) -> int:
            return 1

    monkeypatch.setattr(tensorrt_library, "module", lambda _: Anything())
    monkeypatch.setattr(plugin_aot, "register", calls.append)
    job = {"library": "tensorrt", "onnx": "model.onnx", "plugin": str(tmp_path)}
    assert tensorrt_child.build(job, tmp_path) == {"refused": []}
    assert calls == [tmp_path, "parser"]


def test_without_a_compiler_there_is_nothing_to_embed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "compilers", lambda: ())
    with pytest.raises(RuntimeMissingError, match=r"^--plugin: compute_80 needs a CUDA compiler"):
        tensorrt_plugin.write_kernels(lowered().proto, tmp_path / "kernels")


@pytest.mark.slow
def test_kernels_of_a_graph_are_compiled(tmp_path: Path) -> None:
    if not cubins.compilers():
        pytest.skip("kernels not compiled: there is neither nvcc nor NVRTC")
    tensorrt_plugin.write_kernels(lowered().proto, tmp_path / "kernels")
    names = {"paredown_bucket_f16b_b4", "paredown_bucket_f16_b3", "paredown_bucket_f16_b2"}
    assert {path.name for path in (tmp_path / "kernels").iterdir()} == {f"{name}.ptx" for name in names}
    for name in names:
        text = (tmp_path / "kernels" / f"{name}.ptx").read_text()
        assert f".entry {name}(" in text
        assert ".target sm_80" in text
