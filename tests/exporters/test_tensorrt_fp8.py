"""Floats of 8 bits in place of int8: the graph computes what torch's own e4m3 does, and TensorRT-RTX builds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from paredown.exporters import tensorrt, tensorrt_fp8
from paredown.exporters.tensorrt_graph import GraphOptions, Lowered, lower
from paredown.exporters.tensorrt_integer import symmetric
from paredown.exporters.tensorrt_rounding import plain_outputs
from paredown.optimizer import data, quantize
from paredown.optimizer.codes import Format
from paredown.optimizer.errors import RecipeError
from paredown.optimizer.model import InputSpec, Model
from paredown.optimizer.quantizers import uniform
from paredown.optimizer.steps import Ground, Hooks
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Uniform

from .conftest import ROWS, build
from .test_tensorrt_graph import engine_bytes

IMAGE = InputSpec(name="x", shape=("batch", 3, 9, 9))
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


class Padded(nn.Module):
    """A convolution behind a Pad of its own, and one that pads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.pad(torch.relu(self.first(x)), (0, 1, 0, 1)))
        return y


def integers(model: Model) -> Model:
    """Return a model whose layers compute in int8 between grids."""
    spec = quantize.Spec(quantizer="uniform", activations="int8", feedback=False)
    calibration = data.batches([tuple(model.examples(16, seed=seed)) for seed in range(2)], model.inputs, 32)
    ground = Ground(graph=trace(model.module(), calibration.batches[:1]).graph, calibration=calibration)
    decisions = quantize.plan(model, spec, (uniform.Spec(format=Format(bits=8)),), ground)
    return quantize.apply(model, spec, decisions, calibration, Hooks()).model


@pytest.fixture(scope="module")
def line() -> Model:
    return integers(build(lambda: nn.Sequential(nn.Linear(20, 12)), ROWS))


def graph(model: Model, precision: Any = "fp32") -> Lowered:
    return lower(model, GraphOptions(precision=precision, fp8=True))


def nodes(lowered: Lowered, op: str) -> list[onnx.NodeProto]:
    return [node for node in lowered.proto.graph.node if node.op_type == op]


def test_a_layer_computes_in_e4m3(line: Model) -> None:
    lowered = graph(line)
    (decision,) = lowered.decisions
    assert (decision.form, decision.kept) == ("fp8", True)
    x = np.random.default_rng(1).standard_normal((5, 20), np.float32)
    (have,) = plain_outputs(lowered.proto, {"x": x})

    grids = [grid.scale * 127 / 448 for grid in symmetric(line).acts.values()]
    weight = line.weights["0.weight"]
    assert isinstance(weight, Uniform)
    step = weight.scale.float() * 127 / 448

    def rounded(value: Tensor, scale: Any) -> Tensor:
        return (value / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    held = rounded(weight.dense(), step)
    bias = line.tensors["0.bias"]
    wanted = [rounded(torch.from_numpy(x), scale) @ held.T + bias for scale in grids]
    closest = min(float(np.abs(have - value.numpy()).max()) for value in wanted)
    rounded_out = [rounded(value, scale) for value in wanted for scale in grids]
    closest = min(closest, *(float(np.abs(have - value.numpy()).max()) for value in rounded_out))
    assert closest <= 1e-4 * np.abs(have).max()


def test_every_pair_is_converted(line: Model) -> None:
    lowered = graph(line, "fp16")
    kinds = {value.name: value.data_type for value in lowered.proto.graph.initializer}
    assert onnx.TensorProto.INT8 not in kinds.values()
    assert onnx.TensorProto.FLOAT8E4M3FN in kinds.values()
    assert len(nodes(lowered, "DequantizeLinear")) > 1


def test_a_pad_between_grids_pads_floats() -> None:
    model = integers(build(Padded, IMAGE))
    lowered = graph(model)
    x = model.examples(4, seed=5)[0]
    (have,) = plain_outputs(lowered.proto, {"x": x.numpy()})
    with torch.no_grad():
        want = symmetric(model).module()(x).numpy()
    assert np.abs(have - want).max() <= 0.15 * np.abs(want).max()
    makers = {name: node for node in lowered.proto.graph.node for name in node.output}
    for node in nodes(lowered, "Conv"):
        assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2


def test_it_is_an_error_where_nothing_computes_in_integers(perceptron: Model) -> None:
    with pytest.raises(RecipeError, match="--fp8: no layer computes in int8, which floats of 8 bits would stand for"):
        graph(perceptron)
    with pytest.raises(RecipeError, match="--fp8: opset 18 has no floats of 8 bits; use 19 or more"):
        GraphOptions(fp8=True, opset=18)


def test_gpus_without_them_are_refused() -> None:
    tensorrt.check_fp8(("8.9", "12.0"))
    with pytest.raises(RecipeError, match=r"--fp8: compute capability 8\.6 has no floats of 8 bits"):
        tensorrt.check_fp8(("8.9", "8.6"))


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_tensorrt_rtx_builds_it(line: Model, precision: Any, tmp_path: Path) -> None:
    assert engine_bytes(line, graph(line, precision), tmp_path, sm="8.9") > 0
    folder = tmp_path / "padded"
    folder.mkdir()
    model = integers(build(Padded, IMAGE))
    assert engine_bytes(model, graph(model, precision), folder, sm="8.9") > 0


def test_the_largest_is_that_of_torch() -> None:
    assert torch.finfo(torch.float8_e4m3fn).max == tensorrt_fp8.LARGEST
