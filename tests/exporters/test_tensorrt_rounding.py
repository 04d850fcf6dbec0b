"""What rounding does to the outputs of a network, and which layers stay float32 for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from paredown.exporters import tensorrt_rounding
from paredown.exporters.tensorrt_graph import GraphOptions, lower
from paredown.exporters.tensorrt_precision import wide
from paredown.optimizer.model import InputSpec, Model

from .conftest import NETS, ROWS, Perceptron, build


class Offset(nn.Module):
    """Adds a large number and takes it away again: 16 bits keep little of what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.far, self.near, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        nn.init.constant_(self.far.bias, 3000.0)
        nn.init.constant_(self.near.bias, 0.0)
        with torch.no_grad():
            self.near.weight.copy_(torch.eye(8))
            self.near.bias.fill_(-3000.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.near(self.far(x)))
        return y


def offset() -> Model:
    return build(Offset, InputSpec(name="x", shape=("batch", 8)))


def outputs(file: Any, x: np.ndarray) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    result: np.ndarray = found
    return result


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_value_is_rounded(precision: Any) -> None:
    """A chain of layers, computed by torch with a rounding behind each operator and of each constant."""
    model = build(Perceptron, ROWS)
    proto = lower(model, GraphOptions(precision="fp32")).proto
    x = np.random.default_rng(0).standard_normal((3, 20), np.float32)
    found = outputs(tensorrt_rounding.rounded(proto, precision, lambda node: True), x)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def near(value: Tensor) -> Tensor:
        return value.to(dtype).float()

    with torch.no_grad():
        net: Any = model.module()
        y = near(torch.from_numpy(x) + near(net.table.weight[:1]))
        for layer, bend in ((net.first, torch.relu), (net.second, torch.relu), (net.third, torch.clone)):
            y = near(y @ near(layer.weight).T + (0 if layer.bias is None else near(layer.bias)))
            y = bend(y)
        exact = net(torch.from_numpy(x))
    step = float(np.abs(exact.numpy()).max()) * {"fp16": 2.0**-10, "bf16": 2.0**-7}[precision]
    assert np.abs(found - y.numpy()).max() <= step
    assert np.array_equal(found, torch.from_numpy(found).to(dtype).float().numpy())
    assert 0 < np.abs(found - exact.numpy()).max() < 20 * step
    plain = tensorrt_rounding.rounded(proto, precision, lambda node: False)
    np.testing.assert_array_equal(outputs(plain, x), outputs(proto, x))


def test_layers_that_16_bits_ruin_stay_float32() -> None:
    model, options = offset(), GraphOptions(precision="fp16")
    settled, decisions = tensorrt_rounding.settle(model, options)
    assert settled.measured == {"far"}
    assert all(decision.form == "float32" and not decision.kept for decision in decisions)
    assert "fp16 moves the outputs by" in decisions[0].reason
    found = tensorrt_rounding.measure(model, options)
    assert found.before > 1e-2 >= found.error
    graph = lower(model, settled).proto.graph
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == 1}
    assert {name.partition(".")[0] for name in floats} == {"far"}


def test_a_layer_that_was_kept_is_not_asked_again() -> None:
    options = GraphOptions(precision="fp16", keep=frozenset({"far"}))
    assert tensorrt_rounding.measure(offset(), options).keep == {}


@pytest.mark.parametrize("name", ["attention", "products", pytest.param("recurrent", marks=pytest.mark.slow)])
def test_ordinary_networks_need_no_float32(name: str) -> None:
    found = tensorrt_rounding.measure(NETS[name](), GraphOptions(precision="fp16", forms="stored"))
    assert found.keep == {}
    assert 0 < found.error < 1e-2


def test_nothing_is_measured_in_float32_or_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = offset(), GraphOptions(precision="fp32")
    assert tensorrt_rounding.settle(model, options) == (options, ())

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no operator Odd\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    settled, (decision,) = tensorrt_rounding.settle(model, replace(options, precision="fp16"))
    assert settled.measured == frozenset()
    assert decision.kept
    assert decision.reason.endswith("onnxruntime does not run the float32 graph: no operator Odd")


def test_wide_names_what_keeps_its_range() -> None:
    import onnx_ir as ir

    proto = lower(build(Perceptron, ROWS), GraphOptions(precision="fp32")).proto
    assert wide(ir.from_proto(proto).graph, "fp16") == frozenset()
