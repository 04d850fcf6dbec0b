"""The graph for TensorRT: forms against numpy, networks against the portable file, engines by TensorRT-RTX."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from paredown.exporters import onnx as portable
from paredown.exporters import tensorrt_build, tensorrt_library, tensorrt_profile
from paredown.exporters.difference import difference
from paredown.exporters.tensorrt_graph import GraphOptions, Lowered, lower
from paredown.exporters.tensorrt_integer import symmetric
from paredown.optimizer import data, quantize
from paredown.optimizer.codes import Format
from paredown.optimizer.errors import RecipeError
from paredown.optimizer.model import InputSpec, Model
from paredown.optimizer.quantizers import kmeans, uniform
from paredown.optimizer.residual import Residual
from paredown.optimizer.steps import Ground, Hooks
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

from ..zoo.nets import ZOO
from .conftest import NETS, ROWS, Attention, Perceptron, build, pack_all, packed

SLOW = pytest.mark.slow
FORBIDDEN = {"BitShift", "BitwiseAnd", "BitwiseOr", "Mod"}
UNSIGNED = {onnx.TensorProto.UINT8, onnx.TensorProto.UINT4, onnx.TensorProto.INT2, onnx.TensorProto.UINT2}
FORMS = (
    *("uniform 1", "uniform 2 groups", "uniform 3", "uniform 4", "uniform 4 groups", "uniform 5", "uniform 8"),
    *("uniform 8 groups", "codebook 1", "codebook 2", "codebook 2 blocks groups", "codebook 3", "codebook 4"),
    *("codebook 4 blocks", "codebook 4 fp16", "codebook 6", "codebook 8 blocks groups", "codebook 8 fp16"),
)
QUICK = ("attention", "products")
STEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "int8": (uniform, {"bits": 8, "activations": "int8"}),
    "int4": (uniform, {"bits": 4}),
    "codebook 4": (kmeans, {"bits": 4}),
    "codebook 3": (kmeans, {"bits": 3}),
    "codebook 2": (kmeans, {"bits": 2}),
    "codebook 4 + rank 2": (kmeans, {"bits": 4, "residual": Residual(rank=2, bits=8)}),
}
EPSILON = 2.0**-11
"""Half the distance of 1 to the next number in float16."""


class Line(nn.Module):
    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.line = nn.Linear(k, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.line(x)
        return y


class Statistics(nn.Module):
    """What float16 cannot hold: a square, an epsilon and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-12)
        return torch.softmax(self.second(y) + torch.triu(torch.full((8, 8), -3e38), 1), -1)


def run(lowered: Lowered, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 4, 1
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    content, providers = lowered.proto.SerializeToString(), ["CPUExecutionProvider"]
    return list(onnxruntime.InferenceSession(content, settings, providers=providers).run(None, feeds))


def feeds(model: Model, batch: Sequence[Tensor]) -> dict[str, np.ndarray]:
    return {spec.name: value.numpy() for spec, value in zip(model.inputs, batch, strict=True)}


def stored(precision: Any = "fp32", **rest: Any) -> GraphOptions:
    return GraphOptions(precision=precision, forms="stored", **rest)


def line(weight: Weight) -> Model:
    n, k = weight.shape
    model = build(functools.partial(Line, n, k), InputSpec(name="x", shape=("batch", k)))
    return model.with_weights({"line.weight": weight})


def engine_bytes(model: Model, lowered: Lowered, folder: Path, sm: str = "8.6") -> int:
    onnx.save(lowered.proto, folder / "net.onnx")
    named = {size for spec in model.inputs for size in spec.shape if isinstance(size, str)}
    known = tensorrt_profile.parse([f"{name}=4:8:16" for name in sorted(named - {"batch"})])
    job = tensorrt_build.Job(
        library=tensorrt_library.find("rtx"),
        onnx=folder / "net.onnx",
        shapes=tensorrt_profile.shapes(model.inputs, tensorrt_profile.complete(model.inputs, known)),
        sm=(sm,),
    )
    (folder / "build").mkdir()
    return tensorrt_build.build(job, folder / "build").engine.stat().st_size


needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


def check_graph(lowered: Lowered) -> None:
    """No unsigned codes, no functions, names of their own, and what TensorRT has no operator for."""
    graph = lowered.proto.graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert not lowered.proto.functions
    assert {node.domain for node in graph.node} <= {""}
    assert not FORBIDDEN & {node.op_type for node in graph.node}
    assert not UNSIGNED & {tensor.data_type for tensor in graph.initializer}
    assert all(decision.reason for decision in lowered.decisions)


@pytest.mark.parametrize(
    "form", [form if i % 6 == 1 else pytest.param(form, marks=SLOW) for i, form in enumerate(FORMS)]
)
@pytest.mark.parametrize("shape", [(5, 7), pytest.param((34, 20), marks=SLOW), pytest.param((6, 64), marks=SLOW)])
def test_a_form_holds_the_weight(form: str, shape: tuple[int, int]) -> None:
    """The identity gives W back: as `dense()` computes it, but for the order in which unit and scale multiply."""
    weight = packed(torch.randn(shape, generator=torch.Generator().manual_seed(0)), form, torch.Generator())
    lowered = lower(line(weight), stored())
    check_graph(lowered)
    (have,) = run(lowered, {"x": np.eye(shape[1], dtype=np.float32)})
    np.testing.assert_allclose(have.T, weight.dense().numpy(), rtol=2.0**-22)
    (decision,) = lowered.decisions
    assert decision.kept


@pytest.mark.parametrize("form", ["codebook 4", pytest.param("uniform 4", marks=SLOW), "uniform 8"])
def test_float16_errs_by_what_it_rounds(form: str) -> None:
    """|y' - y| <= sum |x w| ((1 + e)^3 (1 + e) - 1) + e |y|: scale, level, their product, input; then the result."""
    n, k = 24, 40
    weight = packed(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), form, torch.Generator())
    x = np.random.default_rng(0).standard_normal((9, k)).astype(np.float32)
    (have,) = run(lower(line(weight), stored("fp16")), {"x": x})
    w = weight.dense().double().numpy()
    want, size = x.astype(np.float64) @ w.T, np.abs(x) @ np.abs(w.T)
    sums = k * EPSILON  # a runtime may also add in float16
    assert (np.abs(have - want) <= size * ((1 + EPSILON) ** 4 * (1 + sums) - 1) + EPSILON * np.abs(want)).all()


def test_negative_and_zero_scales_are_held() -> None:
    """TensorRT dequantizes by positive scales alone: rows are turned, or multiplied by their scales."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 8), generator=generator, dtype=torch.uint8)
    scale = torch.tensor([0.5, -0.25, 0.0, 0.125, -1.0, 2.0])[:, None]
    for changed in (codes, codes.clamp(min=1)):
        weight = Uniform(codes=changed, scale=scale, zero=8, code_bits=4)
        lowered = lower(line(weight), stored())
        (have,) = run(lowered, {"x": np.eye(8, dtype=np.float32)})
        np.testing.assert_array_equal(have.T, weight.dense().numpy())
        used = {name for node in lowered.proto.graph.node if node.op_type == "DequantizeLinear" for name in node.input}
        held = [t for t in lowered.proto.graph.initializer if t.name in used and "scale" in t.name]
        assert all((onnx.numpy_helper.to_array(tensor) > 0).all() for tensor in held)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in NETS])
def test_a_network_computes_what_the_portable_file_does(name: str, exported: Callable[[str], Any]) -> None:
    net = exported(name)
    batch = net.model.examples(3)
    want = list(portable.open(net.path).run(feeds(net.model, batch)).values())
    roundings = 1e-5 if name != "half" else 64 * EPSILON
    for options, most in ((stored(), roundings), (stored("fp16"), 64 * EPSILON)):
        lowered = lower(net.model, options)
        check_graph(lowered)
        have = run(lowered, feeds(net.model, batch))
        assert [x.dtype for x in have] == [x.dtype for x in want]
        assert max(difference(a, b)[1] for a, b in zip(want, have, strict=True)) <= most


def test_every_layer_has_a_reason() -> None:
    model = pack_all(build(Attention, InputSpec(name="tokens", shape=("batch", "seq"), dtype="int64")))
    few = {decision.layer: decision for decision in lower(model).decisions}
    assert few.keys() == model.weights.keys()
    assert {decision.form for decision in few.values()} == {"dense"}
    assert "decoding costs an engine" in few["inner.weight"].reason or "would take" in few["inner.weight"].reason


def test_large_products_stay_packed_and_convolutions_have_8_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    big = line(packed(torch.randn(512, 512, generator=generator), "codebook 4", generator))
    (decision,) = lower(big).decisions
    assert (decision.form, decision.kept) == ("codebook 4", True)
    assert len(lower(big).proto.SerializeToString()) < 0.15 * 4 * 512 * 512
    forms = {decision.layer: decision.form for decision in lower(NETS["convolutions"](), stored()).decisions}
    assert set(forms.values()) == {"int8", "dense"}
    assert forms["up.weight"] == "dense"


@SLOW
def test_a_recurrent_operator_takes_floats() -> None:
    decisions = lower(NETS["recurrent"](), stored()).decisions
    assert {(decision.form, decision.kept) for decision in decisions} == {("dense", False)}
    assert decisions[0].reason == "LSTM takes its weights as floats"


def test_what_float16_cannot_hold_stays_float32() -> None:
    model = build(Statistics, InputSpec(name="x", shape=(8, 8)))
    (x,) = model.examples(8)
    with torch.no_grad():
        want = model.module()(x).numpy()
    lowered = lower(model, GraphOptions(precision="fp16"))
    types = {value.name: value.type.tensor_type.elem_type for value in _typed(lowered)}
    kinds = {node.op_type: types[node.output[0]] for node in lowered.proto.graph.node if node.output[0] in types}
    assert kinds["MatMul" if "MatMul" in kinds else "Gemm"] == onnx.TensorProto.FLOAT16
    assert kinds["Pow"] == kinds["Softmax"] == onnx.TensorProto.FLOAT
    reasons = " ".join(decision.reason for decision in lowered.decisions)
    assert "-3e+38" in reasons
    assert "1e-12" in reasons
    (have,) = run(lowered, {"x": x.numpy()})
    np.testing.assert_allclose(have, want, atol=32 * EPSILON)


def test_weights_too_small_for_float16_stay_float32() -> None:
    """Products with weights of 1e-8 and inputs of 1e4 are of float16's range, the weights are not."""
    weight = Dense(values=torch.randn(24, 40, generator=torch.Generator().manual_seed(1)) * 1e-8)
    lowered = lower(line(weight), GraphOptions(precision="fp16"))
    x = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32) * 1e4
    (have,) = run(lowered, {"x": x})
    want = x @ weight.dense().numpy().T
    assert np.linalg.norm(have - want) < 0.01 * np.linalg.norm(want)
    assert any("float16 does not" in decision.reason for decision in lowered.decisions)


def _typed(lowered: Lowered) -> list[onnx.ValueInfoProto]:
    inferred = onnx.shape_inference.infer_shapes(lowered.proto).graph
    return [*inferred.value_info, *inferred.output]


def test_a_layer_is_kept_in_float32() -> None:
    model = pack_all(build(Perceptron, ROWS))
    lowered = lower(model, stored("fp16", keep=frozenset({"second"})))
    types = {value.name: value.type.tensor_type.elem_type for value in _typed(lowered)}
    products = {node.name.partition("/")[0]: node for node in lowered.proto.graph.node if node.op_type == "MatMul"}
    kinds = {name: types[node.output[0]] for name, node in products.items()}
    assert kinds == {"first": 10, "second": 1, "third": 10}
    with pytest.raises(RecipeError, match=r'^there is no layer "secnd" to keep in float32; did you mean "second"\?$'):
        lower(model, GraphOptions(keep=frozenset({"secnd"})))


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"^opset=23 is out of range; use 18 to 22; 21 has INT4$"):
        GraphOptions(opset=23)
    with pytest.raises(RecipeError, match=r'^unknown precision "fp8"'):
        GraphOptions(precision="fp8")  # type: ignore[arg-type]


def quantized(name: str, step: str) -> Model:
    net, (quantizer, fields) = ZOO[name], dict(STEPS)[step]
    model, fields = net.model(), dict(fields)
    calibration = data.batches(net.batch(16, seed=4), model.inputs, 16)
    activations, kind = fields.pop("activations", "float"), quantizer.__name__.rpartition(".")[2]
    spec = quantize.Spec(quantizer=kind, activations=activations, feedback=False)
    ground = Ground(graph=trace(model.module(), calibration.batches[:1]).graph, calibration=calibration)
    plan = quantize.plan(model, spec, (quantizer.Spec(format=Format(**fields)),), ground)
    return quantize.apply(model, spec, plan, calibration, Hooks()).model


def cases() -> list[Any]:
    found = []
    for name in ZOO:
        for step in STEPS:
            quick = (name, step) == ("residual", "int8")
            found.append((name, step) if quick else pytest.param(name, step, marks=SLOW))
    return found


@needs_rtx
@pytest.mark.parametrize(("name", "step"), cases())
def test_every_network_of_the_zoo_lowers_equal_and_builds(name: str, step: str, tmp_path: Path) -> None:
    """Static grids are compared as TensorRT has them: symmetric."""
    model = quantized(name, step)
    lowered = lower(model, stored())
    check_graph(lowered)
    even = symmetric(model)
    portable.export(even, tmp_path / "portable.onnx")
    batch = ZOO[name].batch(2, seed=9)
    want = list(portable.open(tmp_path / "portable.onnx").run(feeds(model, batch)).values())
    have = run(lowered, feeds(model, batch))
    most = 1e-5 if step != "int8" else 2e-2
    assert max(difference(a, b)[1] for a, b in zip(want, have, strict=True)) <= most
    assert engine_bytes(model, lower(model, stored("fp16")), tmp_path) > 0


@needs_rtx
def test_an_engine_keeps_codes_packed(tmp_path: Path) -> None:
    """4 bits and what decoding costs: at most a fifth of the dense float32 engine, whose weights alone are 4 MiB."""
    generator = torch.Generator().manual_seed(0)
    model = line(packed(torch.randn(1024, 1024, generator=generator), "codebook 4", generator))
    assert engine_bytes(model, lower(model, GraphOptions()), tmp_path) <= 0.2 * 4 * 1024 * 1024


def test_a_sum_is_multiplied_term_by_term() -> None:
    generator = torch.Generator().manual_seed(0)
    base = packed(torch.randn(8, 12, generator=generator), "codebook 3", generator)
    sides = [packed(torch.randn(shape, generator=generator), "codebook 4", generator) for shape in ((8, 2), (2, 12))]
    weight = Sum(terms=(base, LowRank(left=sides[0], right=sides[1])))
    lowered = lower(line(weight), stored())
    assert isinstance(base, Codebook)
    assert [node.op_type for node in lowered.proto.graph.node].count("MatMul") == 3
    (have,) = run(lowered, {"x": np.eye(12, dtype=np.float32)})
    np.testing.assert_allclose(have.T, weight.dense().numpy(), rtol=1e-5, atol=1e-5)
