"""int8 activations: grids, their ranges, stable names, and a module that computes as integer kernels do."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.optimizer import activations, quantize, store
from paredown.optimizer.activations_graph import channel_axis, choose
from paredown.optimizer.activations_grid import grid_of, operators
from paredown.optimizer.activations_module import dynamic_graph
from paredown.optimizer.activations_names import value_names
from paredown.optimizer.activations_range import Histogram, Rule
from paredown.optimizer.activations_range import choose as choose_grid
from paredown.optimizer.codes import Format
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.graph import capture
from paredown.optimizer.model import ActQuant, InputSpec, Model, Source, from_module
from paredown.optimizer.steps import Ground, Hooks
from paredown.optimizer.weight import Dense, Uniform

from ..zoo.nets import ZOO, in_turn
from .int8_nets import int8, rounded, w8

NETS = ("residual", "separable", "waves", "encoder_decoder", "squeeze_excite", "detector", "gated")


def onnx_pair(x: npt.NDArray[np.float32], grid: ActQuant) -> npt.NDArray[np.float32]:
    """QuantizeLinear then DequantizeLinear as the ONNX standard words them, one number after another."""
    low, high = (-128, 127) if grid.signed else (0, 255)
    scale, found = np.float32(grid.scale), np.empty_like(x)
    for place, value in np.ndenumerate(x):
        code = int(np.rint(np.float32(value) / scale)) + grid.zero
        found[place] = np.float32(min(max(code, low), high) - grid.zero) * scale
    return found


@pytest.mark.parametrize("signed", [False, True])
def test_fake_quantize_is_the_pair_of_onnx(signed: bool) -> None:
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)) * 4
    x[0, :4] = torch.tensor([0.0, 0.125, 0.375, -0.125])  # halves of a step, which go to the even code
    grid = ActQuant(scale=0.25, zero=-3 if signed else 9, signed=signed)
    y = operators()[0](x, grid.scale, grid.zero, grid.signed)
    np.testing.assert_array_equal(y.numpy(), onnx_pair(x.numpy(), grid))
    assert y[0, :4].tolist() == [0.0, 0.0, 0.5, 0.0]


def test_the_operators_are_sound() -> None:
    x, unit = torch.randn(2, 3, 4), torch.tensor([0.01, 0.02, 0.03])
    torch.library.opcheck(operators()[0], (x, 0.1, 3, False))
    torch.library.opcheck(operators()[1], (x, 0.1, 3, False, unit, 1))


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_a_grid_holds_zero_and_reaches_both_ends(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    grid = grid_of(low, high)
    assert 0 <= grid.zero <= 255
    assert grid.scale == float(np.float32(grid.scale))
    ends = ((0 - grid.zero) * grid.scale, (255 - grid.zero) * grid.scale)
    assert ends[0] <= min(low, 0) + 0.51 * grid.scale
    assert ends[1] >= max(high, 0) - 0.51 * grid.scale
    assert grid.zero == 0 or low < 0


def histogram(values: npt.NDArray[np.float64], bins: int = 512) -> Histogram:
    counts, edges = np.histogram(values, bins)
    return Histogram(low=float(edges[0]), high=float(edges[-1]), counts=torch.from_numpy(counts.astype(np.float64)))


def error(values: npt.NDArray[np.float64], grid: ActQuant) -> float:
    codes = np.clip(np.rint(values / grid.scale) + grid.zero, 0, 255)
    return float(np.square((codes - grid.zero) * grid.scale - values).sum())


def test_the_mse_range_is_near_the_best_of_all() -> None:
    values = np.random.default_rng(0).laplace(size=20_000) ** 3
    found = error(values, choose_grid(histogram(values, 8192), Rule(range="mse")))
    tries = [(a * values.min(), b * values.max()) for a in np.linspace(0.1, 1, 19) for b in np.linspace(0.1, 1, 19)]
    assert found <= 1.15 * min(error(values, grid_of(*ends)) for ends in tries)
    assert found < error(values, choose_grid(histogram(values), Rule(range="minmax")))


@pytest.mark.parametrize("rectified", [False, True])
def test_a_percentile_cuts_off_what_lies_outside(rectified: bool) -> None:
    values = np.random.default_rng(1).normal(size=50_000)
    values = np.maximum(values, 0) if rectified else values
    grid = choose_grid(histogram(values, 4096), Rule(range="percentile", percentile=99.0))
    low, high = -grid.zero * grid.scale, (255 - grid.zero) * grid.scale
    outside = np.mean((values < low - 0.02) | (values > high + 0.02))
    assert 0.007 < outside <= 0.0101
    assert grid.zero == 0 if rectified else 100 < grid.zero < 155


def test_a_constant_tensor_has_a_grid() -> None:
    only = Histogram(low=2.0, high=2.0, counts=torch.ones(1, dtype=torch.float64))
    for name in ("minmax", "percentile", "mse"):
        grid = choose_grid(only, Rule(range=name))  # type: ignore[arg-type]
        assert abs((255 - grid.zero) * grid.scale - 2.0) < 0.01


@pytest.mark.parametrize("name", in_turn(NETS, 0))
def test_names_do_not_change_between_captures(name: str) -> None:
    model, net = w8(name), ZOO[name]
    known = []
    for module in (model.module(), net.build(), int8(name).module()):
        graph = dynamic_graph(module, model)
        names = value_names(graph.nodes, graph.inputs, model.inputs)
        assert len(set(names.values())) == len(names)
        known.append({name for name in names.values() if "quantize" not in name and "batch_norm" not in name})
    assert known[0] == known[1] == known[2]
    assert set(int8(name).acts) <= known[0]


@pytest.mark.parametrize("name", NETS)
def test_the_module_keeps_names_sizes_and_roughly_values(name: str) -> None:
    model, net = int8(name), ZOO[name]
    module, plain = model.module(), w8(name).module()
    tied = set(model.aliases())
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in plain.named_parameters()} - tied
    for size in (1, 5):
        batch = net.batch(size, seed=3)
        flat = [torch.utils._pytree.tree_leaves(m(*[x.clone() for x in batch])) for m in (module, plain)]
        for y, z in zip(*flat, strict=True):
            assert y.shape == z.shape
            assert (y - z).abs().max() <= 0.15 * z.abs().max()


def integers(x: Tensor, grid: ActQuant) -> Tensor:
    return (x.double() / grid.scale).round()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.conv(x)).mean((2, 3)))
        return y


def test_the_module_computes_as_integer_kernels_do() -> None:
    """The reference multiplies and adds whole numbers, and rescales each sum once."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = from_module(Small(), [InputSpec(name="x", shape=("batch", 3, 8, 8))], Source(entry="n:n"))
    model = model.with_weights({name: rounded(weight) for name, weight in model.weights.items()})
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = activations.apply(model, [(x,)], Rule())[0]
    assert list(model.acts) == ["/mean", "/relu", "input/x"]
    mean, relu, first = model.acts.values()
    codes = (x / first.scale).round().add(first.zero).clamp(0, 255).sub(first.zero).double()
    conv = model.weights["conv.weight"]
    assert isinstance(conv, Uniform)
    unit = torch.tensor(first.scale) * conv.scale.flatten()
    bias = (model.tensors["conv.bias"].double() / unit.double()).round()
    kernel = (conv.codes.double() - 128).reshape(4, 3, 3, 3)
    sums = F.conv2d(codes, kernel, bias, stride=2, padding=1)
    assert sums.abs().max() > 5000
    steps = sums.float() * (unit / relu.scale).reshape(1, -1, 1, 1)
    rectified = steps.round().clamp(0, 255).double()
    pooled = (rectified.sum((2, 3)) * relu.scale / 16 / mean.scale).round().clamp(0, 255)
    head = model.weights["head.weight"]
    assert isinstance(head, Uniform)
    products = pooled @ (head.codes.double() - 128).T * (mean.scale * head.scale.flatten().double())
    want = products + model.tensors["head.bias"].double()
    assert torch.allclose(model.module()(x).double(), want, rtol=0, atol=1e-6)


def test_biases_are_whole_numbers_of_the_unit_of_sums() -> None:
    model = int8("residual")
    weight, grid = model.weights["blocks.0.conv2.weight"], model.acts["blocks.0/relu"]
    assert isinstance(weight, Uniform)
    codes = model.tensors["blocks.0.conv2.bias"].double() / (grid.scale * weight.scale.flatten().double())
    assert (codes - codes.round()).abs().max() < 1e-2
    assert codes.abs().max() > 100


def test_what_moves_values_keeps_their_grid() -> None:
    acts = int8("residual").acts
    assert acts["blocks.1/pad"] == acts["blocks.0/relu#2"]
    assert acts["/relu"].zero == 0
    assert acts["input/image"].zero > 0


def test_rows_of_negative_scale_are_turned() -> None:
    codes = torch.tensor([[0, 128, 255], [0, 128, 255], [7, 8, 9]], dtype=torch.uint8)
    scale = torch.tensor([[0.5], [-0.5], [0.0]])
    turned = activations.signed(Uniform(codes=codes, scale=scale, zero=128, code_bits=8))
    assert turned.dense()[:2].tolist() == [[-64.0, 0.0, 63.5], [63.5, 0.0, -63.5]]
    assert turned.dense()[2].tolist() == [0.0, 0.0, 0.0]
    assert (turned.scale > 0).all()


def test_layers_of_other_weights_stay_float() -> None:
    base = w8("residual")
    dense = Dense(values=base.weights["blocks.0.conv1.weight"].dense())
    wide = replace(rounded(dense), scale=rounded(dense).scale.expand(-1, 2).contiguous(), group=27)
    batches = ZOO["residual"].batches(8)
    for weight in (dense, wide):
        model, notes = activations.apply(base.with_weights({"blocks.0.conv1.weight": weight}), batches, Rule())
        assert activations.layers(model) == set(base.weights) - {"blocks.0.conv1.weight"}
        assert notes[0].startswith("int8 activations: 5 layers in integers, ")
    assert notes[1].endswith("or of 8-bit uniform weights: blocks.0.conv1")


def test_linear_outputs_stay_float_and_channels_are_found() -> None:
    graph = dynamic_graph(w8("waves").module(), w8("waves"))
    places = choose(graph, w8("waves").weights)
    nodes = {node.name: node for node in graph.nodes}
    axes = {site.param: channel_axis(nodes[name], site) for name, (site, *_) in graph.sites.items()}
    assert axes == {"encode.weight": 1, "context.weight": 1, "head.weight": 1}
    assert not any("linear" in name for name in places.own)


def test_a_stored_model_comes_back_with_its_grids(tmp_path: Path) -> None:
    model = int8("separable")
    store.save(model, tmp_path)
    again = store.load(tmp_path)
    assert dict(again.acts) == dict(model.acts)
    x = ZOO["separable"].batch(3)
    assert torch.equal(again.module()(*x), model.module()(*x))


def test_a_grid_of_no_value_is_refused() -> None:
    model = replace(w8("residual"), acts={"blocks.0/rel": ActQuant(scale=1.0, zero=0, signed=False)})
    with pytest.raises(
        InputError, match=r'^there is no value "blocks.0/rel" to quantize; did you mean "blocks.0/relu"'
    ):
        model.module()


def step(**changed: object) -> quantize.Spec:
    return quantize.Spec(quantizer="uniform", activations="int8", **changed)  # type: ignore[arg-type]


def ground(model: Model) -> Ground:
    return Ground(graph=capture(model.module(), ZOO["residual"].batch(2)))


def test_the_step_gives_the_same_grids_twice() -> None:
    model, batches = ZOO["residual"].model(), ZOO["residual"].batches(16, 16)
    options = quantize.quantizer_module("uniform").Spec(format=Format(bits=8))
    calibration = Calibration(batches=tuple(batches), samples=32)
    made = []
    for _ in range(2):
        decisions = quantize.plan(model, step(), (options,), ground(model))
        made.append(quantize.apply(model, step(), decisions, calibration, Hooks()))
    assert dict(made[0].model.acts) == dict(made[1].model.acts)
    assert "int8 activations: 6 layers in integers, 13 values on grids (minmax)" in made[0].notes
    with pytest.raises(RecipeError, match=r"^activations are quantized already; ask for activations: int8 in the last"):
        quantize.apply(made[0].model, step(), decisions, calibration, Hooks())


def test_a_step_without_fitting_weights_is_refused() -> None:
    model = ZOO["residual"].model()
    for made in (Format(bits=4), Format(bits=8, group=16)):
        options = quantize.quantizer_module("uniform").Spec(format=made)
        with pytest.raises(
            RecipeError, match=r"^activations: int8 needs layers of 8-bit uniform weights with one scale"
        ):
            quantize.plan(model, step(), (options,), ground(model))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"range": "entropy"}, 'range="entropy" is not supported'),
        ({"percentile": 40.0}, "percentile=40.0 is out of range; use more than 50, at most 100"),
    ],
)
def test_wrong_settings_are_refused(changed: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=f"^{text}"):
        step(**changed)
    assert dataclasses.asdict(step())["range"] == "minmax"
    assert math.isclose(step().percentile, 99.99)
