"""Corrections: the moments of each layer's output become the original's, and only what helps is kept."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paredown.optimizer import correct, fold
from paredown.optimizer.correct import Data
from paredown.optimizer.model import Model, Source, from_module
from paredown.optimizer.walk import Traced, trace
from paredown.optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

from ..zoo.nets import ZOO


@functools.cache
def folded(name: str) -> tuple[Model, Traced]:
    """Return a network of the zoo with its normalizations folded, and enough data for moments."""
    net = ZOO[name]
    model, batches = net.model(), net.batches(24, 16)
    traced = trace(model.module(), batches)
    changed = fold.apply(model, fold.plan(model, traced.graph))
    return changed, trace(changed.module(), batches)


def coarse(weight: Weight) -> Uniform:
    """Round to eight levels a row, with scales in float32."""
    w = weight.dense()
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-6) / 3.5
    return Uniform(codes=((w / scale).round() + 4).clamp(0, 7).byte(), scale=scale, zero=4, code_bits=3)


def outputs(model: Model, batches: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return what each convolution and linear layer gave, channels last, by hooks."""
    module, found = model.module(), dict[str, list[Tensor]]()

    def keep(path: str, layer: nn.Module, args: Any, y: Tensor) -> None:
        flat = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
        found.setdefault(path, []).append(flat.reshape(-1, flat.shape[-1]).double())

    for path, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            layer.register_forward_hook(functools.partial(keep, path))
    with torch.no_grad():
        for batch in batches:
            module(*[x.clone() for x in batch])
    return {path: torch.cat(parts) for path, parts in found.items()}


CORRECTED = {
    "residual": ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "head"],
    "waves": ["encode", "context", "head"],
    "encoder_decoder": ["down1", "down2", "up", "out"],
    "grouped": ["first", "second", "head"],
    "separable": ["0", "3.0", "3.3", "4.0", "4.3", "8"],
}
FOLDED = {
    "residual": CORRECTED["residual"][:-1],
    "waves": ["encode", "head"],
    "encoder_decoder": ["down1", "down2", "up"],
    "grouped": ["first"],
    "separable": CORRECTED["separable"][:-1],
}


@pytest.mark.parametrize("kind", ["bias", "normalization"])
@pytest.mark.parametrize("name", CORRECTED)
def test_moments_become_the_originals(name: str, kind: correct.Kind) -> None:
    model, traced = folded(name)
    compressed = model.with_weights({key: coarse(weight) for key, weight in model.weights.items()})
    corrected = correct.apply(compressed, traced, correct.measure(model, traced), kind)
    wanted, broken, got = (outputs(m, traced.batches) for m in (model, compressed, corrected))
    for layer in CORRECTED[name]:
        size = wanted[layer].std(0).mean()
        assert torch.allclose(got[layer].mean(0), wanted[layer].mean(0), atol=1e-4 * float(size)), layer
        assert not torch.allclose(broken[layer].mean(0), wanted[layer].mean(0), atol=1e-3 * float(size))
    for layer in FOLDED[name] if kind == "normalization" else ():
        ratio = wanted[layer].std(0) / broken_std(corrected, compressed, layer, got)
        inside = (ratio > 1 / correct.MAX_GAIN) & (ratio < correct.MAX_GAIN)
        assert torch.allclose(got[layer].std(0)[inside], wanted[layer].std(0)[inside], rtol=1e-4)
        assert bool(inside.any())
    if kind == "bias":
        assert all(corrected.weights[key] is weight for key, weight in compressed.weights.items())


def broken_std(corrected: Model, compressed: Model, layer: str, got: dict[str, Tensor]) -> Tensor:
    """Return the spread before the correction: what it is now, without the gain that the row scales got."""
    before, after = compressed.weights[f"{layer}.weight"], corrected.weights[f"{layer}.weight"]
    assert isinstance(before, Uniform)
    assert isinstance(after, Uniform)
    return got[layer].std(0) * (before.scale / after.scale).flatten()


def test_layers_without_a_bias_of_their_own_are_left_alone() -> None:
    """No bias, one shared by two calls, or one of two layers that share it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.twice = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.one, self.two, self.own = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.bias = self.one.bias
            self.own.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.own(self.two(torch.relu(self.one(self.twice(torch.relu(self.twice(self.none(x))))))))
            return y

    torch.manual_seed(0)
    model = from_module(Net().eval(), (), Source(entry="net.py:net"))
    traced = trace(model.module(), [(torch.randn(32, 4),)])
    moments = correct.measure(model, traced)
    assert set(moments) == {"own.bias"}
    compressed = model.with_weights({key: coarse(weight) for key, weight in model.weights.items()})
    corrected = correct.apply(compressed, traced, moments, "bias")
    assert [key for key, t in corrected.tensors.items() if t is not compressed.tensors[key]] == ["own.bias"]
    got, wanted = (outputs(m, traced.batches)["own"].mean(0) for m in (corrected, model))
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scaled_rows_are_scaled_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, gain = torch.randint(0, 8, (6, 5), generator=generator).byte(), torch.rand(6, generator=generator).double()
    scale = torch.rand(6, 3, generator=generator).to(dtype)
    uniform = Uniform(codes=codes, scale=scale, zero=3, code_bits=3, group=2)
    table = torch.randint(-127, 128, (1, 8), generator=generator).to(torch.int8)
    codebook = Codebook(codes=codes, table=table, scale=scale, code_bits=3, group=2)
    low_rank = LowRank(left=Dense(values=torch.randn(6, 2, generator=generator)), right=Dense(values=torch.ones(2, 5)))
    for weight in (uniform, codebook, low_rank, Sum(terms=(uniform, low_rank)), Dense(values=torch.ones(6, 5))):
        scaled = correct.scale_rows(weight, gain)
        wanted = weight.dense().double() * gain[:, None]
        assert torch.allclose(scaled.dense().double(), wanted, rtol=2e-3, atol=1e-3)
        assert type(scaled) is type(weight)
        assert scaled.bits() == weight.bits()


def linear(weight: Tensor, bias: Tensor) -> Model:
    layer = nn.Linear(*weight.T.shape)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)  # type: ignore[union-attr]
    return from_module(layer.eval(), (), Source(entry="net.py:net"))


def data(model: Model, fit: Tensor, held_out: Tensor) -> Data:
    module = model.module()
    return Data(fit=trace(module, [(fit,)]), held_out=trace(module, [(held_out,)]))


def test_a_correction_that_helps_is_kept() -> None:
    """The error is a constant shift for inputs of mean 1, in fit and held-out data alike."""
    original = linear(torch.eye(3), torch.zeros(3))
    compressed = linear(torch.eye(3) * 1.5, torch.zeros(3))
    x = 1.0 + 0.1 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    best, notes = correct.choose(original, compressed, data(original, x[:32], x[32:]), ["bias"])
    assert torch.allclose(best.tensors["bias"], -0.5 * x[:32].mean(0), atol=1e-5)
    assert notes[0].startswith("bias correction kept: held-out output error 0.50000 -> 0.0")
    assert torch.equal(compressed.tensors["bias"], torch.zeros(3))


def test_a_correction_that_hurts_is_dropped() -> None:
    """The shift seen on the fit data has the other sign on the held-out data."""
    original = linear(torch.eye(3), torch.zeros(3))
    compressed = linear(torch.eye(3) * 1.5, torch.zeros(3))
    x = 1.0 + 0.1 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    best, notes = correct.choose(original, compressed, data(original, x[:32], -x[32:]), ["bias", "normalization"])
    assert best is compressed
    assert [note.split(":")[0] for note in notes] == ["bias correction dropped"]  # nothing was folded
    assert notes[0].endswith("held-out output error 0.50000 -> 1.00" + notes[0][-3:])


def test_the_spread_is_restored_within_bounds() -> None:
    """Rows shrunk to 0.8, 1.2 and 0.1 of their length: the last one is too broken to be stretched back."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(64, 3)
    plain = from_module(net, (), Source(entry="net.py:net"))
    model = fold.apply(plain, fold.plan(plain, trace(net, [(x,)]).graph))
    weight, change = model.weights["0.weight"].dense(), torch.tensor([0.8, 1.2, 0.1])
    compressed = model.with_weights({"0.weight": Dense(values=weight * change[:, None])})
    traced = trace(model.module(), [(x,)])
    corrected = correct.apply(compressed, traced, correct.measure(model, traced), "normalization")
    gain = torch.tensor([1 / 0.8, 1 / 1.2, correct.MAX_GAIN])
    assert torch.allclose(corrected.weights["0.weight"].dense(), weight * (change * gain)[:, None], rtol=1e-4)
    before, after = (outputs(m, [(x,)])["0"].mean(0) for m in (model, corrected))
    assert torch.allclose(before, after, atol=1e-5)


def test_output_error_is_relative_over_everything() -> None:
    before = [(torch.tensor([3.0, 0.0]), torch.tensor([1])), (torch.tensor([0.0, 4.0]),)]
    after = [(torch.tensor([3.0, 1.0]), torch.tensor([9])), (torch.tensor([0.0, 4.0]),)]
    assert correct.output_error(before, after) == pytest.approx(0.2)
    assert correct.output_error(before, before) == 0.0
