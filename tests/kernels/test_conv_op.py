"""The operators LutConvInt8: the body that files carry, and our library in onnxruntime, against numpy in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from paredown.kernels import layout, native
from paredown.kernels.lut_conv import ConvSpec, refusal, round_images, tap_codes, tap_spec
from paredown.kernels.lut_spec import LutSpec
from paredown.kernels.onnx_bodies import onnx_function
from paredown.kernels.onnx_ops import CONV_OPS, DOMAIN, ConvOp, conv_attributes

from .conv_cases import Conv, convolved, rounded

BUILT = pytest.mark.skipif(not native.available(), reason="the CPU kernels were not built here")
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}
CASE = Conv(n=19, channels=6, size=(9, 14), kernel=(3, 2), stride=(2, 1), dilation=(1, 2), pad=(1, 0, 2, 3), batch=2)
SPEC = ConvSpec(channels=6, kernel=(3, 2), stride=(2, 1), dilation=(1, 2), pads=(1, 0, 2, 3))
Floats = NDArray[np.float64]


def model_of(
    op: ConvOp, kind: int = TensorProto.FLOAT, bias: bool = True, **changed: object
) -> tuple[onnx.ModelProto, Floats, Floats]:
    """Return a file of one convolution, its kernel (n, height, width, channels) and its bias."""
    generator = torch.Generator().manual_seed(0)
    canonical = LutSpec(n=CASE.n, k=36, bits=3 if op.planes else 4, zero=120.0, unit=1 / 127)
    codes = torch.randint(0, 2**canonical.bits, (CASE.n, 36), generator=generator, dtype=torch.uint8)
    table = torch.randint(0, 256, canonical.table_shape, generator=generator, dtype=torch.uint8)
    scale, added = torch.rand(CASE.n, 1, generator=generator) + 0.5, torch.randn(CASE.n, generator=generator).half()
    spec = tap_spec(canonical, SPEC)
    tensors = {"codes": layout.pack(tap_codes(codes, SPEC), spec), "table": table}
    tensors["scale"] = layout.pack_scale(scale, spec)
    held = [numpy_helper.from_array(value.numpy(), name) for name, value in tensors.items()]
    added = added if bias else torch.zeros(1)
    held.append(helper.make_tensor("bias", kind, added.shape, added.float().numpy()))
    attributes = conv_attributes(spec, kind, SPEC) | changed
    node = helper.make_node(op.name, ["x", "codes", "table", "scale", "bias"], ["y"], domain=DOMAIN, **attributes)
    ends = [helper.make_tensor_value_info(name, kind, [None] * 4) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    functions = [onnx_function(op.name, 20)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    entries = (table.double().numpy()[0, codes.numpy()] - 120.0) / 127 * scale.double().numpy()
    kernel = entries.reshape(CASE.n, 6, 3, 2).transpose(0, 2, 3, 1)
    return model, kernel, added.double().numpy()


def session(model: onnx.ModelProto, library: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 4
    if library:
        options.register_custom_ops_library(str(native.ort_library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def images(dtype: Any = np.float32) -> NDArray[Any]:
    return np.random.default_rng(1).standard_normal((2, 6, *CASE.size)).astype(dtype)


def wanted(x: NDArray[Any], kernel: Floats, bias: Floats, relu: bool) -> Floats:
    y = convolved(rounded(x.astype(np.float64)), kernel, CASE) + bias.reshape(1, -1, 1, 1)
    return np.maximum(y, 0) if relu else y


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=BUILT)])
@pytest.mark.parametrize("name", CONV_OPS)
def test_every_form_is_what_numpy_says(name: str, library: bool) -> None:
    op = CONV_OPS[name]
    for bias in (True, False):
        model, kernel, added = model_of(op, bias=bias)
        x = images()
        y = wanted(x, kernel, added, op.relu)
        (have,) = session(model, library).run(None, {"x": x})
        assert have.dtype == np.float32
        np.testing.assert_allclose(have, y, atol=3e-6 * np.abs(y).max(), rtol=0)
        if not library:
            (slow,) = ReferenceEvaluator(model).run(None, {"x": x})
            np.testing.assert_allclose(slow, y, atol=3e-6 * np.abs(y).max(), rtol=0)


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=BUILT)])
def test_halves_are_rounded_once_at_the_end(library: bool) -> None:
    model, kernel, added = model_of(ConvOp(), TensorProto.FLOAT16)
    x = images(np.float16)
    y = wanted(x, kernel, added, False)
    (have,) = session(model, library).run(None, {"x": x})
    assert have.dtype == np.float16
    # The body multiplies halves: inputs are rounded to halves again, kernels too.
    np.testing.assert_allclose(have, y, rtol=2.0**-10, atol=(1e-5 if library else 3e-3) * np.abs(y).max())


@BUILT
def test_the_kernel_takes_sizes_from_each_run_and_names_what_it_refuses() -> None:
    model, *_ = model_of(ConvOp())
    with_library = session(model, True)
    for batch, height, width in itertools.product((0, 1, 3), (1, 9), (2, 40)):
        (y,) = with_library.run(None, {"x": np.ones((batch, 6, height, width), np.float32)})
        assert y.shape == (batch, CASE.n, *replace(CASE, size=(height, width)).outputs)
    with pytest.raises(Exception, match="5 channels; images of 6"):
        with_library.run(None, {"x": np.ones((1, 5, 9, 9), np.float32)})
    for changed, text in (
        ({"pad_left": -1}, "none of an int8 convolution"),
        ({"stride_h": 0}, "none of an int8 convolution"),
        ({"channels": 30}, "none of an int8 convolution"),
        (dict.fromkeys(("pad_top", "pad_left", "stride_h", "stride_w"), 2**31), "none of an int8 convolution"),
        ({"layout": "rows"}, 'layout "rows" has no kernel'),
        ({"bits": 3}, "this operator is for 1, 2, 4 and 8 bits"),
        ({"group": 16}, "codes has|is no weight|none of an int8 convolution"),
    ):
        with pytest.raises(Exception, match=text):
            session(model_of(ConvOp(), **changed)[0], True)


def test_codes_go_channels_last_and_images_round_as_one() -> None:
    codes = torch.arange(2 * 6 * 6, dtype=torch.uint8).reshape(2, 36)
    by_tap = tap_codes(codes, SPEC).reshape(2, 3, 2, 8)
    for row, u, v, channel in itertools.product(range(2), range(3), range(2), range(8)):
        want = row * 36 + channel * 6 + u * 2 + v if channel < 6 else 0
        assert by_tap[row, u, v, channel] == want
    x = images()
    assert np.array_equal(round_images(torch.from_numpy(x)).numpy(), rounded(x.astype(np.float64)).astype(np.float32))
    assert not round_images(torch.full((1, 2, 3, 3), 1e-38)).any()
    assert refusal(LutSpec(n=2, k=36, bits=4, group=9), SPEC).startswith("its scales are of groups of 9 inputs")
    assert refusal(LutSpec(n=2, k=36, bits=4, group=40), SPEC) == ""
    large = ConvSpec(channels=20000, kernel=(2, 2))
    assert "do not fit 32 bits" in refusal(LutSpec(n=2, k=80000, bits=4), large)
    with pytest.raises(ValueError, match="is no convolution"):
        ConvSpec(channels=0, kernel=(1, 1))
