"""Gates and output gradients against finite differences, autograd on a hand-written network, known Fisher matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.optimizer.data import Batch, Calibration
from paredown.optimizer.errors import InputError
from paredown.optimizer.gradients import Gradients, gradients, sampled_loss
from paredown.optimizer.graph import capture
from paredown.optimizer.model import Model, Source, from_module

from ..zoo.nets import ZOO, in_turn

TIED = {"llama": {"embed_tokens.weight"}, "raw": {"both_ways"}}
"""Weights that are used in more ways than the columns of one matrix."""


def valued(module: nn.Module) -> Model:
    return from_module(module.eval(), (), Source(entry="net.py:net"))


def calibration(*batches: Batch) -> Calibration:
    axes = tuple(0 for _ in batches[0])
    return Calibration(batches=batches, samples=sum(len(batch[0]) for batch in batches), axes=axes)


def wave(outputs: Any, batch: Batch) -> Tensor:
    """Return a fixed curved function of all floating outputs, one value per output."""
    leaves = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]
    return torch.stack([torch.sin(y * torch.linspace(0.5, 2, y.numel()).reshape(y.shape)).sum() for y in leaves])


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@pytest.mark.parametrize("name", in_turn(ZOO, 4))
def test_gates_are_the_slopes_of_the_loss_along_scaled_channels(name: str) -> None:
    """Scaling an input channel of a weight scales its columns: a central difference in float64, sample by sample."""
    net = ZOO[name]
    module = net.build().double()
    batch = tuple(x.double() if x.is_floating_point() else x for x in net.batch(2))
    uses = capture(module, batch).of_param()
    layouts = {param: sites[0].layout for param, sites in uses.items() if sites[0].kind != "embedding"}
    params = sorted(set(layouts) - TIED.get(name, set()))
    found = gradients(valued(module), calibration(batch), params, 0, wave)
    assert sorted(found.gates) == params
    state = dict(module.named_parameters())
    for param in params:
        layout, weight = layouts[param], state[param].detach().clone()
        taps = layout.matrix_shape[1] * layout.groups // found.gates[param].shape[1]
        channel = (found.gates[param].shape[1] - 1) // 2
        block, column = divmod(channel * taps, layout.matrix_shape[1])
        slopes: list[Tensor] = []
        for sign in (1.0, -1.0):
            matrix = layout.to_matrix(weight).reshape(layout.groups, -1, layout.matrix_shape[1]).clone()
            matrix[block, :, column : column + taps] *= 1 + sign * 1e-5
            with torch.no_grad():
                state[param].copy_(layout.to_param(matrix.reshape(layout.matrix_shape)))
                parts = [wave(module(*(x[i : i + 1] for x in batch)), ()).sum() for i in range(2)]
                slopes.append(torch.stack(parts))
        with torch.no_grad():
            state[param].copy_(weight)
        measured = (slopes[0] - slopes[1]) / 2e-5
        assert torch.allclose(found.gates[param][:, channel], measured, rtol=1e-4, atol=2e-5), param


class Tied(nn.Module):
    """An embedding tied with the head, a weight used twice, an activation in place on what was read before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.register_buffer("bend", torch.linspace(0.5, 1.5, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.bend
        y = x + self.mix(x)
        z = self.mix(y)
        y.relu_()
        return F.linear(torch.tanh(y + z), self.embed.weight)


def test_gates_and_outputs_are_those_of_autograd() -> None:
    module = seeded(Tied)
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    found = gradients(valued(module), calibration((tokens,)), {"embed.weight", "mix.weight"}, 0, wave)
    head, mix, outputs = [], [], []
    weights = dict(module.named_parameters())
    for i in range(3):
        x = (F.embedding(tokens[i : i + 1], weights["embed.weight"]) * module.bend).detach()  # type: ignore[operator]
        read = [x.requires_grad_()]
        y = x + F.linear(x, weights["mix.weight"], weights["mix.bias"])
        read.append(y)
        z = F.linear(y, weights["mix.weight"], weights["mix.bias"])
        last = torch.tanh(F.relu(y) + z)
        logits = F.linear(last, weights["embed.weight"])
        # y is read by the second layer and by the activation: the first needs the slope of its own path alone.
        d_last, d_logits = torch.autograd.grad(wave(logits, ()).sum(), (last, logits), retain_graph=True)
        d_z = d_last * (1 - last.square())
        d_mix_y = d_z @ weights["mix.weight"]
        d_y = d_mix_y + d_z * (y > 0)
        d_mix_x = d_y @ weights["mix.weight"]
        head.append((last * d_last).sum((0, 1)))
        mix.append((y * d_mix_y + x * d_mix_x).sum((0, 1)))
        outputs.append((d_logits.square().mean((0, 1)), 0.5 * (d_z.square() + d_y.square()).mean((0, 1))))
    assert torch.allclose(found.gates["embed.weight"], torch.stack(head).double(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.gates["mix.weight"], torch.stack(mix).double(), rtol=1e-4, atol=1e-6)
    for param, place in (("embed.weight", 0), ("mix.weight", 1)):
        expected = torch.stack([pair[place] for pair in outputs]).mean(0).double()
        assert torch.allclose(found.outputs[param], expected, rtol=1e-4, atol=1e-8)
    assert found.gates["mix.weight"].dtype == found.outputs["mix.weight"].dtype == torch.float64


def test_only_what_is_asked_for_is_there() -> None:
    module = seeded(Tied)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    found = gradients(valued(module), calibration((tokens,)), {"mix.weight"}, 0)
    assert set(found.gates) == set(found.outputs) == {"mix.weight"}


class Classifier(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x))).softmax(-1).movedim(-1, self.dim)


def test_the_mean_square_is_the_fisher_information() -> None:
    """Over draws of targets E[g] = 0 and E[g^2] = J^T (diag(p) - p p^T) J, J the slope of the scores along a gate."""
    module = seeded(lambda: Classifier(-1))
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    model, many = valued(module), calibration((x.expand(1500, 4).clone(),))
    found = gradients(model, many, {"head.weight"}, 0).gates["head.weight"]
    hidden = torch.tanh(module.hidden(x))[0].detach()  # type: ignore[operator]
    p = module(x)[0].detach()
    jacobian = module.head.weight.detach() * hidden  # type: ignore[union-attr,operator]
    fisher = (jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian).diagonal().double()
    assert torch.allclose(found.square().mean(0), fisher, rtol=0.15)
    assert (found.mean(0).abs() < 4 * (fisher / 1500).sqrt()).all()


def test_probabilities_give_the_gradients_of_their_scores() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 7, generator=rng, requires_grad=True)
    slopes = []
    for output in (scores, scores.softmax(1), scores.log_softmax(1)):
        loss = sampled_loss(output, torch.Generator().manual_seed(3))
        slopes.append(torch.autograd.grad(loss, scores)[0])
    assert torch.allclose(slopes[0], slopes[1], atol=1e-6)
    assert torch.allclose(slopes[0], slopes[2], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6000, 4), 1), ((60, 100, 4), 2), ((60, 4, 10, 10), 1), ((60, 4, 5, 5, 4), 1)]
)
def test_classes_lie_where_networks_put_them(shape: tuple[int, ...], axis: int) -> None:
    """The gradient of scores has, along the class axis, the covariance of p minus one at a class drawn from p."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    spread = [1] * len(shape)
    spread[axis] = 4
    output = p.log().reshape(spread).expand(shape).clone().requires_grad_()
    (slope,) = torch.autograd.grad(sampled_loss(3.0 + output, torch.Generator().manual_seed(1)), output)
    rows = slope.movedim(axis, -1).reshape(-1, 4)
    assert torch.allclose(rows.sum(1), torch.zeros(len(rows)), atol=1e-5)
    assert torch.allclose(rows.mean(0), torch.zeros(4), atol=0.03)
    assert torch.allclose(rows.T @ rows / len(rows), torch.diag(p) - p[:, None] * p, atol=0.01)
    assert abs(float(rows[:-1].flatten() @ rows[1:].flatten()) / len(rows)) < 0.03


def test_scores_that_are_ruled_out_have_no_slope() -> None:
    output = torch.tensor([[1.0, -torch.inf, 2.0]]).requires_grad_()
    loss = sampled_loss(output, torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(loss, output)
    assert torch.isfinite(loss)
    assert torch.isfinite(slope).all()
    assert (float(slope[0, 1]), bool(slope[0, 0] != 0)) == (0.0, True)


@pytest.mark.parametrize("shape", [(60,), (60, 1), (2, 1, 8, 8), (2, 3, 8, 8), (2, 9, 5)])
def test_signals_are_gaussian(shape: tuple[int, ...]) -> None:
    """The slope is a random sign, whatever the output (covariance 1); an input of that shape says it is a signal."""
    output = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = [torch.zeros(shape)] if len(shape) > 2 else []
    (slope,) = torch.autograd.grad(sampled_loss(output, torch.Generator().manual_seed(1), inputs), output)
    assert set(slope.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(slope.mean())) < 0.3


def test_the_same_bytes_twice_and_for_every_size_of_batch() -> None:
    net = ZOO["residual"]
    model, (x,) = net.model(), net.batch(6)
    split = calibration((x[:4],), (x[4:],))
    runs = [gradients(model, data, {"stem.weight", "head.weight"}, 7) for data in (calibration((x,)), split)]
    again = gradients(model, split, {"stem.weight", "head.weight"}, 7)
    for other in (runs[1], again):
        assert same(runs[0], other)
    assert not same(runs[0], gradients(model, split, {"stem.weight", "head.weight"}, 8))


def same(one: Gradients, other: Gradients) -> bool:
    pairs = [(one.gates, other.gates), (one.outputs, other.outputs)]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def test_neither_the_model_nor_the_samples_are_changed() -> None:
    net = ZOO["separable"]
    model, (x,) = net.model(), net.batch(2)
    before, data = {name: value.clone() for name, value in model.values().items()}, x.clone()
    gradients(model, calibration((x,)), set(model.weights), 0)
    assert all(torch.equal(value, model.values()[name]) for name, value in before.items())
    assert torch.equal(x, data)
    assert not any(value.requires_grad for value in model.values().values())


def test_a_fixed_batch_is_one_row() -> None:
    """What a network does with its batch is its own affair; the row is the sum over it."""
    module = seeded(lambda: Classifier(-1))
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    whole = Calibration(batches=((x[:3],), (x[3:],)), samples=6, axes=(0,), unit=3)
    found = gradients(valued(module), whole, {"head.weight"}, 0, lambda out, _: out[..., 0].sum())
    single = gradients(valued(module), calibration((x,)), {"head.weight"}, 0, lambda out, _: out[..., 0].sum())
    assert found.gates["head.weight"].shape == (2, 6)
    expected = single.gates["head.weight"].reshape(2, 3, 6).sum(1)
    assert torch.allclose(found.gates["head.weight"], expected, rtol=1e-4, atol=1e-7)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"low": self.a(x), "class": (self.a(x) * scale).argmax(1)}


def test_a_loss_sees_what_the_network_returns_and_the_batch() -> None:
    seen: list[tuple[Any, Batch]] = []

    def loss(outputs: Any, batch: Batch) -> Tensor:
        seen.append((outputs, batch))
        return outputs["low"].square().mean()

    x, scale = torch.ones(2, 4), torch.ones(2, 2)
    gradients(valued(seeded(Pair)), calibration((x, scale)), {"a.weight"}, 0, loss)
    assert [(sorted(outputs), outputs["low"].shape, batch[0].shape) for outputs, batch in seen] == [
        (["class", "low"], (1, 2), (1, 4))
    ] * 2


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, batch: 3.0, "the loss entry: it returned float; return a floating tensor"),
        (
            lambda outputs, batch: outputs["low"].sum() * torch.nan,
            "calibration: the loss is nan; look for overflow in the network",
        ),
        (
            lambda outputs, batch: outputs["low"].detach().sum(),
            "the loss does not depend on the layers to prune; compute it from the outputs",
        ),
    ],
)
def test_bad_losses(loss: Any, message: str) -> None:
    data = calibration((torch.ones(2, 4), torch.ones(2, 2)))
    with pytest.raises(InputError) as caught:
        gradients(valued(seeded(Pair)), data, {"a.weight"}, 0, loss)
    assert str(caught.value) == message


def test_networks_without_gradients_are_named() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).argmax(1)

    with pytest.raises(InputError) as caught:
        gradients(valued(seeded(Picks)), calibration((torch.ones(2, 4),)), {"a.weight"}, 0)
    assert str(caught.value) == "the network has no floating output to take gradients of; give a loss"
    net = ZOO["raw"]
    with pytest.raises(InputError) as caught:
        gradients(net.model(), calibration(net.batch(2)), {"both_ways"}, 0)
    assert str(caught.value) == '"both_ways": is used in two orientations and has no one set of inputs; skip it'
