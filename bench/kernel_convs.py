"""Rows of convolutions: ours of packed codes beside onnxruntime's in float32 and in int8, for `bench/kernels.py`.

Shapes are layers of ResNets for CIFAR and ImageNet, and of DnCNN. A model is one convolution; the int8 rival also has
its QuantizeLinear and DequantizeLinear, so that all take and give floats. Its scales are fixed, ours are found at run
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from ..exporters.onnx_session import session_options
from ..kernels import layout, native
from ..kernels.lut_conv import ConvSpec, tap_codes, tap_spec
from ..kernels.lut_spec import LutSpec
from ..kernels.onnx_ops import DOMAIN, VERSION, ConvOp, conv_attributes
from .kernel_models import IR, OPSET
from .measure import Call, Sampling, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A square image through a square kernel, stride 1 or 2, borders that keep its size."""

    name: str
    channels: int
    n: int
    size: int
    kernel: int = 3
    stride: int = 1

    @property
    def pads(self) -> list[int]:
        return [self.kernel // 2] * 4


SHAPES = (
    Shape(name="ResNet-20, first stage", channels=16, n=16, size=32),
    Shape(name="ResNet-20, last stage", channels=64, n=64, size=8),
    Shape(name="ResNet-50, second stage", channels=128, n=128, size=28),
    Shape(name="ResNet-50, 1 x 1", channels=256, n=64, size=56, kernel=1),
    Shape(name="ResNet-50, stride 2", channels=256, n=256, size=28, stride=2),
    Shape(name="DnCNN", channels=64, n=64, size=64),
)
FLOATS, INTEGERS = "Conv fp32", "QLinearConv int8"
BITS = (4, 2)


def rows(threads: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Return the times of every form of every shape, alternating in one process; best and median microseconds."""
    return [row for count in threads for shape in SHAPES for row in _measured(shape, count, seconds)]


def _measured(shape: Shape, threads: int, seconds: float) -> list[dict[str, Any]]:
    forms = {FLOATS: _floats(shape), INTEGERS: _integers(shape)}
    forms |= {f"ours {bits}b int8": _ours(shape, bits) for bits in BITS}
    x = np.random.default_rng(0).standard_normal((1, shape.channels, shape.size, shape.size), dtype=np.float32)
    limits = Sampling(min_seconds=seconds, min_count=10, max_seconds=20 * seconds, min_rounds=8, warmup_seconds=seconds)
    with TemporaryDirectory() as folder:
        calls = [_call(model, Path(folder) / f"{i}.onnx", threads, x) for i, model in enumerate(forms.values())]
        samples = sample(calls, limits)
    return [
        {
            "what": f"{shape.name}: {shape.channels} to {shape.n} channels, {shape.size} x {shape.size}",
            "shape": asdict(shape),
            "threads": threads,
            "form": form,
            "min_us": float(times.min()) * 1e6,
            "median_us": float(np.median(times)) * 1e6,
            "waited": samples.waited,
        }
        for form, times in zip(forms, samples.seconds, strict=True)
    ]


def _call(model: onnx.ModelProto, path: Path, threads: int, x: np.ndarray) -> Call:
    onnx.save_model(model, str(path))
    settings = session_options(threads=threads, library=native.ort_library())
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _floats(shape: Shape) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((shape.n, shape.channels, shape.kernel, shape.kernel), dtype=np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=shape.pads, strides=[shape.stride] * 2)
    return _model([node], {"w": w})


def _integers(shape: Shape) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    one, zero = np.float32(0.03), np.uint8(128)
    weights = {
        "w": rng.integers(-127, 128, (shape.n, shape.channels, shape.kernel, shape.kernel), dtype=np.int8),
        "w_scale": rng.uniform(0.5 / 512, 1.5 / 512, shape.n).astype(np.float32),
        "w_zero": np.zeros(shape.n, np.int8),
        "scale": np.array(one),
        "zero": np.array(zero),
    }
    inputs = ["xq", "scale", "zero", "w", "w_scale", "w_zero", "scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("QLinearConv", inputs, ["yq"], pads=shape.pads, strides=[shape.stride] * 2),
        helper.make_node("DequantizeLinear", ["yq", "scale", "zero"], ["y"]),
    ]
    return _model(nodes, weights)


def _ours(shape: Shape, bits: int) -> onnx.ModelProto:
    top, left, bottom, right = shape.pads
    kernel, stride = (shape.kernel, shape.kernel), (shape.stride, shape.stride)
    conv = ConvSpec(channels=shape.channels, kernel=kernel, stride=stride, pads=(top, left, bottom, right))
    inputs = shape.channels * shape.kernel**2
    spec = tap_spec(LutSpec(n=shape.n, k=inputs, bits=bits, zero=128.0, unit=1 / 127), conv)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (shape.n, inputs), generator=generator, dtype=torch.uint8)
    weights = {
        "codes": layout.pack(tap_codes(codes, conv), spec).numpy(),
        "table": torch.randint(0, 256, spec.table_shape, generator=generator, dtype=torch.uint8).numpy(),
        "scale": layout.pack_scale(torch.rand(shape.n, 1, generator=generator) + 0.5, spec).numpy(),
        "bias": np.zeros(1, np.float32),
    }
    op = ConvOp()
    attributes: dict[str, Any] = conv_attributes(spec, TensorProto.FLOAT, conv)
    return _model([helper.make_node(op.name, ["x", *weights], ["y"], domain=DOMAIN, **attributes)], weights)


def _model(nodes: Sequence[onnx.NodeProto], weights: dict[str, Any]) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in ("x", "y")]
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    imports = [helper.make_opsetid(*pair) for pair in (("", OPSET), (DOMAIN, VERSION))]
    graph = helper.make_graph(nodes, "convolution", ends[:1], ends[1:], held)
    return helper.make_model(graph, opset_imports=imports, ir_version=IR)
