"""Convolutions whose inputs are rounded to int8, in a file: by our library and by the portable bodies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from paredown.exporters import onnx as target
from paredown.exporters.runner import RunnerOptions
from paredown.kernels import native
from paredown.optimizer import packed as kernels
from paredown.optimizer.model import InputSpec, Model
from paredown.optimizer.packed_module import packed_module
from paredown.optimizer.weight import Dense, Layout, Weight

from .conftest import build, packed

IMAGES = InputSpec(name="x", shape=("batch", 3, 11, 13))
BUILT = pytest.mark.skipif(not native.available(), reason="the CPU kernels were not built here")
HOW = pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=BUILT)])
"""By the portable bodies of the file, and by our library."""


class Images(nn.Module):
    """Convolutions with and without bias and Relu, strides, dilations and unequal pads; one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 10, 3, padding=1)
        self.down = nn.Conv2d(10, 18, (3, 2), stride=2, padding=(1, 0), bias=False)
        self.twice = nn.Conv2d(18, 18, 3, padding=2, dilation=2)
        self.same = nn.Conv2d(18, 7, (4, 3), padding="same")
        self.point = nn.Conv2d(7, 5, 1, bias=False)
        self.alone = nn.Conv2d(18, 18, 3, groups=18)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        x = self.down(x)
        x = torch.relu(self.twice(torch.relu(self.twice(x)) + x))
        y = self.alone(x)
        return self.point(torch.relu(self.same(x))), y


def model_of(form: str, rounds: bool = True) -> Model:
    model = build(Images, IMAGES)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Weight] = {name: packed(w.dense(), form, generator) for name, w in model.weights.items()}
    able = {name for name, layout in model.layouts.items() if not kernels.dynamic_refusal(weights[name], layout)}
    return replace(model.with_weights(weights), dynamic=frozenset(able) if rounds else frozenset())


def operators(path: Path) -> dict[str, str]:
    """Return module -> operator, of our operators."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {node.name.rpartition("/")[0]: node.op_type for node in nodes if node.domain == "paredown"}


@pytest.mark.parametrize(
    "form",
    ["codebook 4", *(pytest.param(form, marks=pytest.mark.slow) for form in ("codebook 3", "uniform 2", "uniform 8"))],
)
@HOW
def test_a_file_convolves_as_the_module_does(form: str, kernels: bool, tmp_path: Path) -> None:
    model, path = model_of(form), tmp_path / "net.onnx"
    assert model.dynamic == model.weights.keys() - {"alone.weight"}
    target.export(model, path)
    (x,) = model.examples(3)
    with torch.no_grad():
        want = model.module()(x)
        exact = replace(model, dynamic=frozenset()).module()(x)
    found = target.open(path, RunnerOptions(kernels=kernels)).run({"x": x.numpy()})
    for have, right, unrounded in zip(found.values(), want, exact, strict=True):
        largest = float(right.abs().max())
        # A value beside a half rounds up in one and down in the other: few, each a step of 1/127 of its input.
        np.testing.assert_allclose(have, right.numpy(), atol=largest / 64, rtol=0)
        assert np.abs(have - right.numpy()).mean() < 0.1 * float((right - unrounded).abs().mean())
    prefix = "LutPlanesConv" if form == "codebook 3" else "LutConv"
    ops = operators(path)
    assert (ops["first"], ops["down"], ops["point"]) == (f"{prefix}Int8Relu", f"{prefix}Int8", f"{prefix}Int8")
    modes = target.modes(path, model)
    assert (modes["first.weight"].mode, modes["alone.weight"].mode) == ("int8 dynamic", "decoded")


def test_a_packed_module_rounds_the_images_too() -> None:
    model = model_of("codebook 4")
    (x,) = model.examples(2)
    with torch.no_grad():
        for have, want in zip(packed_module(model)(x), model.module()(x), strict=True):
            torch.testing.assert_close(have, want)


def test_reasons_name_what_a_convolution_lacks() -> None:
    generator = torch.Generator().manual_seed(0)

    def why(form: str, *shape: int, groups: int = 1) -> str:
        layout = Layout(kind="conv", shape=shape, groups=groups)
        return kernels.dynamic_refusal(packed(torch.randn(layout.matrix_shape), form, generator), layout)

    assert why("codebook 4", 8, 6, 3, 3) == ""
    assert why("codebook 4", 8, 1, 3, 3, groups=8) == "a convolution of 8 groups has no int8 kernel"
    assert why("codebook 4", 8, 6, 3) == "a convolution in 1 dimensions has no int8 kernel"
    assert why("codebook 5", 8, 6, 3, 3) == "5 bits have no operator"
    assert why("codebook 2 fp16", 8, 6, 3, 3).startswith("int8 products need a table of bytes")
    assert "scales are of groups of" in why("uniform 4 groups", 8, 6, 3, 3)
    layout = Layout(kind="conv", shape=(8, 6, 3, 3))
    assert kernels.dynamic_refusal(Dense(values=torch.randn(8, 54)), layout) == "its weights are floats"
