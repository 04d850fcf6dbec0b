"""The op in torch and its ONNX functions, against numpy that decodes weight by weight."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from paredown.kernels.lut_linear import (
    DOMAIN,
    LutParts,
    LutSpec,
    decode,
    lut_linear,
    onnx_attributes,
    onnx_function,
    pack,
    reference,
    supports,
)

SPECS = [
    LutSpec(n=7, k=13, bits=3, zero=128.0, unit=1 / 127),
    LutSpec(n=33, k=30, bits=4, group=8, table_rows=16),
    LutSpec(n=5, k=9, bits=8, group=4, zero=100.0),
    LutSpec(n=5, k=9, bits=2, group=4, table_rows=2, zero=128.0, unit=1 / 127),
    LutSpec(n=4, k=6, bits=7, table_rows=4),
    LutSpec(n=1, k=1, bits=5),
    LutSpec(n=3, k=11, bits=6, group=11),
    LutSpec(n=6, k=3, bits=1, table_rows=5),
]


@st.composite
def specs(draw: st.DrawFn) -> LutSpec:
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    group, table_rows = draw(st.integers(0, k)), draw(st.integers(0, n))
    zero, unit = draw(st.sampled_from([(128.0, 1 / 127), (0.0, 1.0), (7.0, 1.0)]))
    return LutSpec(n=n, k=k, bits=draw(st.integers(1, 8)), group=group, table_rows=table_rows, zero=zero, unit=unit)


def codes_and_parts(spec: LutSpec, seed: int = 0) -> tuple[torch.Tensor, LutParts]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=generator, dtype=torch.uint8)
    table = torch.randn(spec.table_shape, generator=generator).half()
    if spec.unit != 1.0:
        table = torch.randint(1, 256, spec.table_shape, generator=generator, dtype=torch.uint8)
    scale = torch.randn(spec.scale_shape, generator=generator)
    return codes, LutParts(codes=pack(codes, spec.bits), table=table, scale=scale.half() if seed % 2 else scale)


def slow_decode(spec: LutSpec, codes: torch.Tensor, parts: LutParts) -> np.ndarray:
    f = np.float32
    table, scale = parts.table.numpy().astype(f), parts.scale.numpy().astype(f)
    weights = np.empty((spec.n, spec.k), f)
    for r in range(spec.n):
        for c in range(spec.k):
            entry = table[r // spec.table_rows if spec.table_rows else 0, int(codes[r, c])]
            factor = scale[r, c // spec.group if spec.group else 0]
            weights[r, c] = ((entry - f(spec.zero)) * f(spec.unit)) * factor
    return weights


def onnx_model(spec: LutSpec, parts: LutParts, opset: int = 20) -> onnx.ModelProto:
    """W by LutDecode and y = x W^T by LutLinear, in one graph."""
    tensors = {"codes": parts.codes, "table": parts.table, "scale": parts.scale}
    attributes = onnx_attributes(spec, onnx.TensorProto.FLOAT)
    nodes = [
        helper.make_node("LutDecode", [*tensors], ["W"], domain=DOMAIN, **attributes),
        helper.make_node("LutLinear", ["x", *tensors], ["y"], domain=DOMAIN, **attributes),
    ]
    x, w, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["m", spec.k]), ("W", [spec.n, spec.k]), ("y", ["m", spec.n]))
    )
    held = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [w, y], held),
        functions=[onnx_function("LutDecode", opset), onnx_function("LutLinear", opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@given(spec=specs(), seed=st.integers(0, 9))
def test_decode_equals_numpy_bit_for_bit(spec: LutSpec, seed: int) -> None:
    codes, parts = codes_and_parts(spec, seed)
    assert np.array_equal(decode(parts, spec).numpy(), slow_decode(spec, codes, parts))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_identity_reproduces_the_weight(spec: LutSpec) -> None:
    codes, parts = codes_and_parts(spec)
    product = lut_linear(torch.eye(spec.k), parts, spec)
    assert np.array_equal(product.T.numpy(), slow_decode(spec, codes, parts))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_products_stay_within_the_rounding_of_the_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    spec = SPECS[1]
    codes, parts = codes_and_parts(spec)
    x = torch.randn(*shape, 2 * spec.k, generator=torch.Generator().manual_seed(1)).to(dtype)[..., ::2]
    weight = slow_decode(spec, codes, parts).astype(np.float64)
    want = x.double().numpy() @ weight.T
    bound = (np.abs(x.double().numpy()) @ np.abs(weight).T) * (spec.k + 4) * torch.finfo(dtype).eps
    if dtype == torch.float64:
        bound = bound + np.abs(want) * 1e-6
    have = lut_linear(x, parts, spec)
    assert have.dtype == dtype
    assert have.shape == (*shape, spec.n)
    assert (np.abs(have.double().numpy() - want) <= bound).all()


@pytest.mark.parametrize("spec", SPECS[:4], ids=str)
def test_opcheck(spec: LutSpec) -> None:
    _, parts = codes_and_parts(spec)
    sizes = (spec.n, spec.k, spec.bits, spec.group, spec.table_rows, spec.zero, spec.unit)
    arguments = (torch.randn(2, spec.k), parts.codes, parts.table, parts.scale, *sizes)
    result = torch.library.opcheck(torch.ops.paredown.lut_linear.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


@settings(max_examples=25)
@given(spec=specs(), seed=st.integers(0, 9))
def test_one_onnx_body_serves_every_form_in_onnxruntime(spec: LutSpec, seed: int) -> None:
    codes, parts = codes_and_parts(spec, seed)
    x = torch.randn(2, spec.k, generator=torch.Generator().manual_seed(seed))
    weight, product = session(onnx_model(spec, parts)).run(None, {"x": x.numpy()})
    assert np.array_equal(weight, slow_decode(spec, codes, parts))
    np.testing.assert_allclose(product, reference(x, parts, spec).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_bodies_are_standard_onnx(spec: LutSpec) -> None:
    codes, parts = codes_and_parts(spec)
    model = onnx_model(spec, parts)
    onnx.checker.check_model(model, full_check=True)
    weight, _ = ReferenceEvaluator(model).run(None, {"x": np.ones((1, spec.k), np.float32)})
    assert np.array_equal(weight, slow_decode(spec, codes, parts))


def test_the_bodies_hold_only_operators_that_tensorrt_takes() -> None:
    used = {node.op_type for op in ("LutDecode", "LutLinear") for node in onnx_function(op, 20).node}
    taken = (
        "Add Cast Concat Constant Div Equal Gather MatMul Mul Range ReduceSum Reshape Shape Slice Squeeze Sub "
        "Transpose Unsqueeze Where"
    )
    assert used <= set(taken.split())


def test_bodies_of_several_widths_run_in_one_onnxruntime_session() -> None:
    models = [onnx.compose.add_prefix(onnx_model(s, codes_and_parts(s)[1]), f"{i}_") for i, s in enumerate(SPECS)]
    merged = models[0]
    for model in models[1:]:
        merged.graph.node.extend(model.graph.node)
        merged.graph.initializer.extend(model.graph.initializer)
        merged.graph.output.append(model.graph.output[0])
        merged.graph.input.extend(model.graph.input)
    for node in merged.graph.node:
        node.op_type, node.domain = node.op_type.split("_")[-1], DOMAIN
    for function in merged.functions:
        function.name, function.domain = function.name.split("_")[-1], DOMAIN
    feeds = {f"{i}_x": np.ones((1, spec.k), np.float32) for i, spec in enumerate(SPECS)}
    have = dict(zip([o.name for o in merged.graph.output], session(merged).run(None, feeds), strict=True))
    for i, spec in enumerate(SPECS):
        codes, parts = codes_and_parts(spec)
        assert np.array_equal(have[f"{i}_W"], slow_decode(spec, codes, parts))


def test_bad_tensors_are_named() -> None:
    spec = SPECS[0]
    _, parts = codes_and_parts(spec)
    with pytest.raises(ValueError, match=r"x has 12 columns, the weight \(7, 13\) takes 13"):
        lut_linear(torch.randn(2, 12), parts, spec)
    with pytest.raises(ValueError, match=r"codes is torch.uint8 \(3,\), must be torch.uint8 \(36,\)"):
        lut_linear(torch.randn(2, 13), LutParts(codes=parts.codes[:3], table=parts.table, scale=parts.scale), spec)
    with pytest.raises(
        ValueError, match=r"table is torch.int8 \(1, 8\), must be torch.uint8 or torch.float16 \(1, 8\)"
    ):
        lut_linear(
            torch.randn(2, 13), LutParts(codes=parts.codes, table=parts.table.to(torch.int8), scale=parts.scale), spec
        )
    with pytest.raises(ValueError, match=r"activations of torch.int64 are not floating point"):
        lut_linear(torch.ones(2, 13, dtype=torch.int64), parts, spec)
    assert supports(spec, torch.float16) == ""


def test_bad_specs_are_named() -> None:
    with pytest.raises(ValueError, match="bits=9 is out of range; use 1 to 8"):
        LutSpec(n=1, k=1, bits=9)
    with pytest.raises(ValueError, match=r"\(0, 1\), group=0, table_rows=0 is no weight"):
        LutSpec(n=0, k=1, bits=4)
