"""The portable bodies of all operators, in runtimes that know nothing of us, against numpy in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from paredown.kernels import layout
from paredown.kernels import pack as stream
from paredown.kernels.lut_spec import MODES, LutSpec
from paredown.kernels.onnx_bodies import onnx_function
from paredown.kernels.onnx_ops import (
    DECODE,
    DOMAIN,
    GATHER,
    GATHERS,
    LINEAR_OPS,
    ONNX_OPS,
    LinearOp,
    linear_op,
    onnx_attributes,
    supports,
    supports_left,
)

from .lut_cases import BYTES, SPECS, Case, activate, case, rounded, specs

LEVELS = [onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL]


def held(tensor: torch.Tensor, name: str) -> onnx.TensorProto:
    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, tuple(tensor.shape), raw, raw=True)
    return numpy_helper.from_array(tensor.numpy(), name)


def model_of(
    node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto], rank: int, tensors: dict[str, torch.Tensor], opset: int
) -> onnx.ModelProto:
    """One node, whose result has `rank` dimensions of any size."""
    (kind,) = (a.i for a in node.attribute if a.name == "dtype")
    output = helper.make_tensor_value_info(node.output[0], kind, [f"d{i}" for i in range(rank)])
    graph = helper.make_graph([node], "g", inputs, [output], [held(tensor, name) for name, tensor in tensors.items()])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    functions = [onnx_function(node.op_type, opset)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def linear_model(
    form: LinearOp, weight: Case, left: Case | None, opset: int = 20, bias: bool = True
) -> onnx.ModelProto:
    parts, spec = weight.parts, weight.spec
    tensors = {"codes": parts.codes, "table": parts.table, "scale": parts.scale, "bias": bias_of(spec.n if bias else 1)}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", spec.k])]
    if left:
        tensors |= {"left_codes": left.parts.codes, "left_table": left.parts.table, "left_scale": left.parts.scale}
        inputs.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, ["m", left.spec.k]))
    attributes = onnx_attributes(form.name, spec, TensorProto.FLOAT, left.spec if left else None)
    node = helper.make_node(form.name, list(form.inputs), ["y"], domain=DOMAIN, **attributes)
    return model_of(node, inputs, 2, tensors, opset)


def bias_of(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(3)) if n > 1 else torch.zeros(1)


def feeds_of(weight: Case, left: Case | None, m: int = 3) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((m, weight.spec.k)).astype(np.float32)}
    feeds["x"][0, : weight.spec.group or weight.spec.k] = 0
    if left:
        feeds["t"] = rng.standard_normal((m, left.spec.k)).astype(np.float32)
    return feeds


def wanted(form: LinearOp, weight: Case, left: Case | None, feeds: dict[str, NDArray[Any]], bias: bool) -> Any:
    """y and its bound: sums of k + 4 terms in float32, and a slope of activations below 1.2."""
    x = rounded(feeds["x"], weight.spec) if form.mode == "int8" else feeds["x"]
    exact = x.astype(np.float64) @ weight.weight.T.astype(np.float64) + bias_of(weight.spec.n if bias else 1).numpy()
    size = np.abs(x) @ np.abs(weight.weight.T) + 1
    terms = weight.spec.k + 8
    if left:
        exact += feeds["t"].astype(np.float64) @ left.weight.T.astype(np.float64)
        size, terms = size + np.abs(feeds["t"]) @ np.abs(left.weight.T), terms + left.spec.k
    y = activate(exact, form.activation)
    return y, 1.2 * size * terms * 2.0**-24 + np.abs(y) * 2.0**-20


def run(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]], level: Any = LEVELS[1]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = 1, level
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def left_of(form: LinearOp, n: int) -> Case | None:
    return case(LutSpec(n=n, k=5, bits=8, zero=BYTES[0], unit=BYTES[1]), 1) if form.low_rank else None


@pytest.mark.parametrize("name", LINEAR_OPS)
def test_every_form_gives_the_product(name: str) -> None:
    form = LINEAR_OPS[name]
    spec = SPECS[4] if form.planes else SPECS[3]
    weight, left = case(spec), left_of(form, spec.n)
    feeds = feeds_of(weight, left)
    y, bound = wanted(form, weight, left, feeds, bias=True)
    for opset in (18, 22):
        model = linear_model(form, weight, left, opset)
        onnx.checker.check_model(model, full_check=True)
        for level in LEVELS:
            (have,) = run(model, feeds, level)
            assert have.shape == y.shape
            assert (np.abs(have - y) <= bound).all(), (opset, level)


@settings(max_examples=40, deadline=None)
@given(spec=specs(), seed=st.integers(0, 9))
def test_the_identity_reproduces_the_weight(spec: LutSpec, seed: int) -> None:
    weight = case(spec, seed)
    model = linear_model(linear_op(spec), weight, None, bias=False)
    (have,) = run(model, {"x": np.eye(spec.k, dtype=np.float32)})
    assert np.array_equal(have.T, weight.weight)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 300), group=st.sampled_from([0, 30, 32, 128, 130, 256]), seed=st.integers(0, 9))
@example(k=20, group=1, seed=0)
@example(k=601, group=300, seed=1)
def test_inputs_are_rounded_to_the_same_bytes(k: int, group: int, seed: int) -> None:
    """The weight is the identity, so that y is x as it was rounded."""
    spec = LutSpec(n=k, k=k, bits=1, group=group)
    codes, scale = (
        layout.pack(torch.eye(k, dtype=torch.uint8), spec),
        layout.pack_scale(torch.ones(spec.scale_shape), spec),
    )
    table = torch.tensor([[0, 1]], dtype=torch.uint8)
    op = linear_op(spec, mode="int8")
    node = helper.make_node(op.name, list(op.inputs), ["y"], domain=DOMAIN, **onnx_attributes(op.name, spec, 1))
    x = np.random.default_rng(seed).standard_normal((3, k)).astype(np.float32) * np.float32(10.0**seed)
    x[1, : group or 3] = 0
    x[2] *= np.float32(1e-37)
    tensors = {"codes": codes, "table": table, "scale": scale, "bias": torch.zeros(1)}
    model = model_of(node, [helper.make_tensor_value_info("x", 1, ["m", k])], 2, tensors, 20)
    assert np.array_equal(run(model, {"x": x})[0], rounded(x, spec))


def gather_model(weight: Case, rank: int, kind: int = TensorProto.INT64, opset: int = 20) -> onnx.ModelProto:
    parts = weight.parts
    tensors = {"codes": parts.codes, "table": parts.table, "scale": parts.scale}
    attributes = onnx_attributes(GATHER, weight.spec, TensorProto.FLOAT)
    node = helper.make_node(GATHER, ["indices", *tensors], ["y"], domain=DOMAIN, **attributes)
    indices = helper.make_tensor_value_info("indices", kind, [f"i{i}" for i in range(rank)])
    return model_of(node, [indices], rank + 1, tensors, opset)


@settings(max_examples=40, deadline=None)
@given(spec=specs(bits=tuple(range(1, 9))), seed=st.integers(0, 9), rank=st.integers(0, 2))
def test_rows_are_looked_up_bit_for_bit(spec: LutSpec, seed: int, rank: int) -> None:
    weight = case(spec, seed)
    indices = np.random.default_rng(seed).integers(0, spec.n, (2, 3)[:rank])
    (have,) = run(gather_model(weight, rank), {"indices": np.asarray(indices)})
    assert np.array_equal(have, weight.weight[indices])


def test_rows_are_looked_up_by_short_integers_and_stay_packed() -> None:
    weight, indices = case(SPECS[1]), np.array([[3, 0, 32]], np.int32)
    for level in LEVELS:
        (have,) = run(gather_model(weight, 2, TensorProto.INT32), {"indices": indices}, level)
        assert np.array_equal(have, weight.weight[indices])


def test_rows_are_looked_up_in_halves() -> None:
    weight = case(SPECS[1])
    tensors = {"codes": weight.parts.codes, "table": weight.parts.table, "scale": weight.parts.scale}
    op = GATHERS[TensorProto.FLOAT16]
    attributes = onnx_attributes(op, weight.spec, TensorProto.FLOAT16)
    node = helper.make_node(op, ["indices", *tensors], ["y"], domain=DOMAIN, **attributes)
    indices = helper.make_tensor_value_info("indices", TensorProto.INT64, ["m"])
    (have,) = run(model_of(node, [indices], 2, tensors, 20), {"indices": np.array([32, 1])})
    assert np.array_equal(have, weight.weight[[32, 1]].astype(np.float16))


@settings(max_examples=30, deadline=None)
@given(spec=specs(bits=tuple(range(1, 9))), seed=st.integers(0, 9))
def test_the_stream_is_decoded_bit_for_bit(spec: LutSpec, seed: int) -> None:
    weight = case(spec, seed)
    scale = layout.unpack_scale(weight.parts.scale, spec)
    tensors = {"codes": stream.pack(weight.codes, spec.bits), "table": weight.parts.table, "scale": scale}
    attributes = onnx_attributes(DECODE, spec, TensorProto.FLOAT)
    node = helper.make_node(DECODE, [*tensors], ["W"], domain=DOMAIN, **attributes)
    (have,) = run(model_of(node, [], 2, tensors, 20), {})
    assert np.array_equal(have, weight.weight)


@pytest.mark.parametrize("opset", range(18, 26))
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_opset_has_a_body(opset: int, activation: Any) -> None:
    spec = SPECS[0]
    form = LinearOp(mode="int8", activation=activation, low_rank=True, planes=True)
    weight, left = case(spec), left_of(form, spec.n)
    feeds, model = feeds_of(weight, left), linear_model(form, weight, left, opset)
    onnx.checker.check_model(model, full_check=True)
    y, bound = wanted(form, weight, left, feeds, bias=True)
    assert (np.abs(run(model, feeds)[0] - y) <= bound).all()
    (rows,) = run(gather_model(weight, 1, opset=opset), {"indices": np.array([6, 0])})
    assert np.array_equal(rows, weight.weight[[6, 0]])


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_bodies_mean_the_same_to_the_reference_of_onnx(spec: LutSpec, mode: Any) -> None:
    weight, form = case(spec), linear_op(spec, mode=mode, activation="relu")
    feeds, model = feeds_of(weight, None), linear_model(form, weight, None)
    y, bound = wanted(form, weight, None, feeds, bias=True)
    assert (np.abs(ReferenceEvaluator(model).run(None, feeds)[0] - y) <= bound).all()
    (rows,) = ReferenceEvaluator(gather_model(weight, 1)).run(None, {"indices": np.array([spec.n - 1])})
    assert np.array_equal(rows, weight.weight[-1:])


@pytest.mark.parametrize("mode", MODES)
def test_halves_stay_halves(mode: Any) -> None:
    """onnxruntime computes float16 with its own roundings: W, products and sums each to half."""
    spec = SPECS[3]
    weight, form = case(spec), linear_op(spec, mode=mode, activation="gelu")
    parts = weight.parts
    bias = bias_of(spec.n).half()
    tensors = {"codes": parts.codes, "table": parts.table, "scale": parts.scale, "bias": bias}
    attributes = onnx_attributes(form.name, spec, TensorProto.FLOAT16)
    node = helper.make_node(form.name, list(form.inputs), ["y"], domain=DOMAIN, **attributes)
    for opset in (18, 22):
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["b", "m", spec.k])]
        x = feeds_of(weight, None, 6)["x"].astype(np.float16)
        (have,) = run(model_of(node, inputs, 3, tensors, opset), {"x": x.reshape(2, 3, -1)})
        y, _ = wanted(form, weight, None, {"x": x.astype(np.float32)}, bias=True)
        size = np.abs(x).astype(np.float64) @ np.abs(weight.weight.T) + 1
        assert have.dtype == np.float16
        assert (np.abs(have.reshape(6, -1) - y) <= 4 * 2.0**-11 * size).all()


def test_the_bodies_hold_only_operators_that_tensorrt_takes() -> None:
    """All of them were parsed by TensorRT-RTX 1.7.1; shifts, masks and arithmetic on bytes are what it refuses."""
    taken = (
        "Abs Add Cast Concat Constant Conv Div Equal Erf Gather Less MatMul Min Mul Range ReduceMax ReduceSum Relu "
        "Reshape Round Shape Sigmoid Slice Squeeze Sub Tanh Transpose Unsqueeze Where"
    )
    for op, opset in itertools.product(ONNX_OPS, (18, 22)):
        assert {node.op_type for node in onnx_function(op, opset).node} <= set(taken.split())


def test_names_and_forms() -> None:
    assert len(LINEAR_OPS) == 40
    spec = LutSpec(n=32, k=8, bits=3, zero=128.0)
    left = LutSpec(n=32, k=4, bits=8)
    assert linear_op(spec).name == "LutPlanesLinear"
    form = linear_op(spec, mode="int8", activation="gelu_tanh", left=left)
    assert form.name == "LutPlanesLinearInt8LowRankGeluTanh"
    assert form.inputs == ("x", "codes", "table", "scale", "bias", "t", "left_codes", "left_table", "left_scale")
    assert LINEAR_OPS[form.name] == form
    assert onnx_attributes(form.name, spec, 1, left)["rank"] == 4
    with pytest.raises(ValueError, match="5 bits have no operator; use 1, 2, 3, 4 or 8"):
        linear_op(LutSpec(n=1, k=1, bits=5))
    with pytest.raises(ValueError, match="a left factor of 3 bits has no operator; use 1, 2, 4 or 8"):
        linear_op(left, left=spec)
    with pytest.raises(ValueError, match="LutLinear is not the operator of a weight of 3 bits and left factor None"):
        onnx_attributes("LutLinear", spec, 1)


def test_what_has_no_operator_says_why() -> None:
    byte, half = torch.uint8, torch.float16
    assert supports(LutSpec(n=9, k=9, bits=4, zero=128.0), "int8", byte) == ""
    assert supports(LutSpec(n=9, k=9, bits=3, table_rows=16), "exact", half) == ""
    assert supports(LutSpec(n=9, k=9, bits=6), "exact", byte) == "6 bits have no operator"
    reason = "each table serves 8 rows, kernels take multiples of 16"
    assert supports(LutSpec(n=9, k=9, bits=4, table_rows=8), "exact", byte) == reason
    reason = "int8 products need a table of bytes, this one is float16"
    assert supports(LutSpec(n=9, k=9, bits=4), "int8", half) == reason
    reason = "int8 products need a whole zero point of 0 to 255, this one is 0.5"
    assert supports(LutSpec(n=9, k=9, bits=4, zero=0.5), "int8", byte) == reason
    assert supports_left(LutSpec(n=9, k=9, bits=3), byte) == "a left factor of 3 bits has no operator"
    assert supports_left(LutSpec(n=9, k=9, bits=8), byte) == ""
