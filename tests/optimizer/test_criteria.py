"""Every criterion of the folder: one finite score per unit, blind to order, dead channels last, needs, formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.optimizer import criteria, obs
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import InfeasibleError, RecipeError
from paredown.optimizer.groups import Group, Part, Unit
from paredown.optimizer.importance import (
    STATISTICS,
    ChannelStats,
    Wanted,
    consumers,
    criterion_module,
    gather,
    readers,
)
from paredown.optimizer.model import Model, Source, from_module
from paredown.optimizer.walk import trace

NAMES = sorted(path.stem for path in Path(cast(Any, criteria).__path__[0]).glob("[a-z]*.py"))
BLIND = {"random"}
"""What does not look at the channels cannot follow them."""
DATA_FREE = {"bn_scale", "magnitude", "random"}


class Net(nn.Module):
    """A group of four channels, and one of eight that a grouped and a depthwise convolution and a linear layer read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.deep_bn = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.grouped_bn = nn.Conv2d(8, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.side, self.head = nn.Linear(8, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.deep_bn(self.deep(F.relu(self.bn(self.first(x))))))
        y = F.relu(self.grouped_bn(self.grouped(x)))
        return self.side(x.mean((2, 3))) + self.head(y.mean((2, 3)))


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Net().eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.3, 2.0)
                nn.init.uniform_(part.bias, 0.1, 0.5)
    return module


def span(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)


def norm_parts(name: str, channel: int) -> list[Part]:
    fields = ("weight", "bias", "running_mean", "running_var")
    return [Part(param=f"{name}.{f}", axis="elements", index=torch.tensor([channel])) for f in fields]


def wide_unit(c: int) -> Unit:
    parts = [
        Part(param="first.weight", axis="rows", index=torch.tensor([c])),
        Part(param="first.bias", axis="elements", index=torch.tensor([c])),
        Part(param="deep.weight", axis="rows", index=torch.tensor([c])),
        Part(param="deep.weight", axis="columns", index=span(0, 9), block=c),
        *norm_parts("bn", c),
        *norm_parts("deep_bn", c),
        Part(param="grouped.weight", axis="columns", index=span(9 * (c % 4), 9), block=c // 4),
        Part(param="side.weight", axis="columns", index=torch.tensor([c])),
    ]
    return Unit(parts=tuple(parts))


def narrow_unit(c: int) -> Unit:
    rows = [Part(param="grouped.weight", axis="rows", index=torch.tensor([c]))]
    elements = [Part(param="grouped.bias", axis="elements", index=torch.tensor([c])), *norm_parts("grouped_bn", c)]
    return Unit(parts=(*rows, *elements, Part(param="head.weight", axis="columns", index=torch.tensor([c]))))


WIDE = Group(name="first", cells=(tuple(wide_unit(c) for c in range(4)), tuple(wide_unit(c) for c in range(4, 8))))
NARROW = Group(name="grouped", cells=(tuple(narrow_unit(c) for c in range(4)),))
LAYERS = ("deep.weight", "grouped.weight", "side.weight", "head.weight")


def images(count: int = 24) -> Calibration:
    x = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    return Calibration(batches=((x,),), samples=count, axes=(0,))


def valued(module: nn.Module) -> Model:
    return from_module(module, (), Source(entry="net.py:net"))


def scores(name: str, module: nn.Module, group: Group, needs: frozenset[str] | None = None) -> Tensor:
    model, criterion = valued(module), criterion_module(name)
    wanted = Wanted(needs=criterion.needs if needs is None else needs, params=LAYERS, seed=3, loss=smooth)
    return criterion.score(model, group, gather(model, images(), wanted))


def smooth(outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
    """Return a loss that draws nothing, so that two networks can be compared."""
    return (outputs * torch.linspace(-1, 1, 5)).sum() + outputs.square().sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [WIDE, NARROW], ids=["wide", "narrow"])
def test_one_finite_score_for_each_unit(name: str, group: Group) -> None:
    found = scores(name, net(), group)
    assert (found.shape, found.dtype) == ((len(group.units),), torch.float64)
    assert torch.isfinite(found).all()
    assert len(set(found.tolist())) == len(found)
    assert torch.equal(found, scores(name, net(), group))


@pytest.mark.parametrize("name", sorted(set(NAMES) - BLIND))
def test_scores_follow_a_permutation_of_the_channels(name: str) -> None:
    """The same network with the channels of the head's input in another order."""
    order = torch.tensor([1, 0, 3, 2])  # within the groups of the convolution that makes them
    module, moved = net(), net()
    with torch.no_grad():
        for key, value in moved.state_dict().items():
            if key.startswith("grouped") and value.ndim:
                value.copy_(value[order].clone())
        moved.head.weight.copy_(module.head.weight[:, order])
    x = images().batches[0][0]
    assert torch.allclose(module(x), moved(x), atol=1e-5)
    assert torch.allclose(scores(name, moved, NARROW), scores(name, module, NARROW)[order], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channel", [0, 6])
def test_a_channel_that_nobody_reads_scores_lowest(name: str, channel: int) -> None:
    module = net()
    with torch.no_grad():
        module.side.weight[:, channel] = 0.0
        module.grouped.weight[2 * (channel // 4) : 2 * (channel // 4) + 2, channel % 4] = 0.0
    found = scores(name, module, WIDE)
    assert torch.isfinite(found).all()
    assert int(found.argmin()) == channel
    assert (found > found[channel]).sum() == 7


@pytest.mark.parametrize("name", sorted(set(NAMES) - DATA_FREE))
def test_a_channel_that_is_never_on_scores_lowest(name: str) -> None:
    """Its weights are the largest of all, and its normalization sends it below the rectifier."""
    module = net()
    with torch.no_grad():
        module.deep_bn.weight[5], module.deep_bn.bias[5] = 0.0, -1.0
        module.side.weight[:, 5] = 9.0
        module.grouped.weight[2:4, 1] = 9.0
    found = scores(name, module, WIDE)
    assert int(found.argmin()) == 5
    assert (found > found[5]).sum() == 7


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_dead_channels_has_finite_scores(name: str) -> None:
    module = net()
    with torch.no_grad():
        module.head.weight.zero_()
    assert torch.equal(scores(name, module, NARROW), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_what_is_read(name: str) -> None:
    """With all statistics the scores are the same; without any one that it needs there are none."""
    needs = criterion_module(name).needs
    assert needs <= STATISTICS
    full = scores(name, net(), WIDE)
    assert torch.equal(full, scores(name, net(), WIDE, STATISTICS))
    for need in needs:
        with pytest.raises(InfeasibleError):
            scores(name, net(), WIDE, needs - {need})


@pytest.mark.parametrize("needs", [set(), {"gram"}, {"mean"}, {"gates"}, {"gram", "mean", "gates"}])
def test_gathering_fills_what_is_needed_and_nothing_else(needs: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = valued(net())
    if not needs:
        monkeypatch.setattr("paredown.optimizer.importance.trace", None)
    found = gather(model, images(8), Wanted(needs=frozenset(needs), params=LAYERS[1:3], seed=4))
    assert found.seed == 4
    assert set(found.layers) == (set(LAYERS[1:3]) if needs & {"gram", "mean"} else set())
    assert all(
        (s.gram is not None, s.mean is not None) == ("gram" in needs, "mean" in needs) for s in found.layers.values()
    )
    assert set(found.gates) == set(found.outputs) == (set(LAYERS[1:3]) if "gates" in needs else set())
    assert all(gates.shape == (8, 8) for gates in found.gates.values())


def test_a_network_that_is_traced_already_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = valued(net()), images(8)
    traced = trace(model.module(), data.batches)
    plain = gather(model, data, Wanted(needs=frozenset({"gram"})))
    monkeypatch.setattr("paredown.optimizer.importance.trace", None)
    found = gather(model, data, Wanted(needs=frozenset({"gram"}), traced=traced))
    assert torch.equal(cast(Tensor, found.layers["side.weight"].gram), cast(Tensor, plain.layers["side.weight"].gram))


# --- who reads a unit


def test_readers_are_what_outlives_the_unit() -> None:
    """Two blocks of the grouped convolution and the linear layer; the depthwise filters go with their channels."""
    found = readers(valued(net()), WIDE)
    places = {(c.param, c.block): [columns.tolist() for columns in c.columns] for c in found}
    assert set(places) == {("grouped.weight", 0), ("grouped.weight", 1), ("side.weight", None)}
    assert places["grouped.weight", 1][5] == list(range(9, 18))
    assert places["grouped.weight", 1][1] == places["grouped.weight", 0][5] == []
    assert [channels.tolist() for c in found if c.block == 1 for channels in c.channels] == [[]] * 4 + [
        [4],
        [5],
        [6],
        [7],
    ]
    assert {c.param: c.weight.shape for c in found} == {"grouped.weight": (2, 36), "side.weight": (5, 8)}


def _column(param: str, place: int, *, table: bool) -> Part:
    return Part(param=param, axis="columns", index=torch.tensor([place]), table=table)


def test_an_embedding_writes_and_its_tied_head_reads() -> None:
    class Words(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight if tied else self.head.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    for tied, readers_ in ((True, ["embed.weight"]), (False, ["head.weight"])):
        params = ("embed.weight",) if tied else ("embed.weight", "head.weight")
        units = tuple(
            Unit(parts=tuple(_column(param, c, table=param == "embed.weight" and not tied) for param in params))
            for c in range(4)
        )
        found = consumers(valued(Words(tied)), Group(name="embed", cells=(units,)))
        assert [c.param for c in found] == readers_


@pytest.mark.parametrize("name", sorted(set(NAMES) - DATA_FREE))
def test_a_group_that_no_weight_reads_is_named(name: str) -> None:
    rows = tuple(Unit(parts=unit.parts[:1]) for unit in NARROW.units)
    with pytest.raises(InfeasibleError) as caught:
        scores(name, net(), replace(NARROW, cells=(rows,)))
    assert str(caught.value) == (
        'group "grouped": its channels are read by no weight; use criterion magnitude, or skip its layers'
    )


def test_a_group_without_gains_is_named() -> None:
    bare = tuple(Unit(parts=tuple(p for p in unit.parts if p.axis != "elements")) for unit in NARROW.units)
    with pytest.raises(InfeasibleError) as caught:
        scores("bn_scale", net(), replace(NARROW, cells=(bare,)))
    assert str(caught.value) == (
        'group "grouped": it has no batch normalization with gains; use another criterion, or skip its layers'
    )


# --- formulas, by numpy


def array(value: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(value.detach().double().numpy())


def inputs_of(module: Net) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the grouped convolution, the side and the head read."""
    with torch.no_grad():
        x = F.relu(module.deep_bn(module.deep(F.relu(module.bn(module.first(images().batches[0][0]))))))
        y = F.relu(module.grouped_bn(module.grouped(x)))
    return x, x.mean((2, 3)), y.mean((2, 3))


def test_magnitude_is_the_group_norm_of_torch_pruning() -> None:
    module = net()
    first, deep, grouped = (array(layer.weight) for layer in (module.first, module.deep, module.grouped))
    gains = array(module.bn.weight) ** 2 + array(module.deep_bn.weight) ** 2
    columns = np.concatenate([(grouped[:2] ** 2).sum((0, 2, 3)), (grouped[2:] ** 2).sum((0, 2, 3))])
    own = (first**2).sum((1, 2, 3)) + 2 * (deep**2).sum((1, 2, 3)) + (array(module.side.weight) ** 2).sum(0)
    expected = own + columns + gains
    assert np.allclose(scores("magnitude", module, WIDE).numpy(), expected / expected.mean(), rtol=1e-6)


def test_bn_scale_is_the_mean_gain() -> None:
    module = net()
    with torch.no_grad():
        module.bn.weight[2] *= -1.0
    expected = (np.abs(array(module.bn.weight)) + np.abs(array(module.deep_bn.weight))) / 2
    assert np.allclose(scores("bn_scale", module, WIDE).numpy(), expected / expected.mean(), rtol=1e-6)


def test_flap_is_the_standardized_fluctuation() -> None:
    module = net()
    x, side, head = inputs_of(module)
    patches = array(F.unfold(x, 3)).transpose(0, 2, 1).reshape(-1, 8, 9)
    grouped = array(module.grouped.weight).reshape(2, 2, 4, 9)
    spread = patches.var(0) * (grouped**2).sum(1).reshape(8, 9)
    raw = spread.sum(1) + array(side).var(0) * (array(module.side.weight) ** 2).sum(0)
    assert np.allclose(scores("flap", module, WIDE).numpy(), (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    narrow = array(head).var(0) * (array(module.head.weight) ** 2).sum(0)
    expected = (narrow - narrow.mean()) / narrow.std()
    assert np.allclose(scores("flap", module, NARROW).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_obs_is_the_part_of_the_output_that_is_lost() -> None:
    """Refit without each channel, by least squares on rows that a ridge has been added to."""
    module = net()
    _, _, head = inputs_of(module)
    x, weight = array(head), array(module.head.weight)
    ridge = math.sqrt(obs.DAMPING * (x**2).sum(0).mean())
    rows = np.concatenate([x, ridge * np.eye(4)])
    whole = ((rows @ weight.T) ** 2).sum()
    expected = []
    for channel in range(4):
        keep = [c for c in range(4) if c != channel]
        residual = rows @ weight.T - rows[:, keep] @ np.linalg.lstsq(rows[:, keep], rows @ weight.T, rcond=None)[0]
        expected.append((residual**2).sum() / whole)
    assert np.allclose(scores("obs", module, NARROW).numpy(), expected, rtol=1e-5)


def test_taylor_and_fisher_are_moments_of_the_slope_along_a_gate() -> None:
    """The gate of the wide group scales what the grouped convolution and the side read."""
    module = net()
    slopes: list[Tensor] = []
    for image in images().batches[0][0]:
        gate = torch.ones(8, requires_grad=True)
        x = F.relu(module.deep_bn(module.deep(F.relu(module.bn(module.first(image[None]))))))
        x = x * gate[:, None, None]
        y = F.relu(module.grouped_bn(module.grouped(x)))
        loss = smooth(module.side(x.mean((2, 3))) + module.head(y.mean((2, 3))), ())
        slopes.append(torch.autograd.grad(loss, gate)[0].double())
    stacked = array(torch.stack(slopes))
    assert np.allclose(scores("taylor", module, WIDE).numpy(), np.abs(stacked).mean(0), rtol=1e-4)
    assert np.allclose(scores("fisher", module, WIDE).numpy(), 0.5 * (stacked**2).mean(0), rtol=1e-4)


def test_random_differs_between_groups_and_seeds() -> None:
    model, criterion = valued(net()), criterion_module("random")
    draws = [
        criterion.score(model, group, ChannelStats(seed=seed)).tolist()
        for group in (NARROW, replace(NARROW, name="other"))
        for seed in (0, 1)
    ]
    assert len({tuple(draw) for draw in draws}) == 4
    assert all(0 <= value < 1 for draw in draws for value in draw)


# --- the registry


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_defines_its_two_names(name: str) -> None:
    criterion = criterion_module(name)
    assert isinstance(criterion.needs, frozenset)
    assert list(criterion.score.__annotations__) == ["model", "group", "stats", "return"]


def test_the_folder_is_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(NAMES) == {"bn_scale", "fisher", "flap", "magnitude", "obs", "random", "taylor"}
    with pytest.raises(RecipeError) as caught:
        criterion_module("magnitud")
    assert str(caught.value) == 'unknown criterion "magnitud"; did you mean "magnitude"?'
    with pytest.raises(RecipeError) as caught:
        criterion_module("nobody.made")
    assert str(caught.value) == (
        "criterion \"nobody.made\" cannot be imported: No module named 'nobody'; install the module or fix its name"
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "first.py").write_text("needs = frozenset()\ndef score(model, group, stats): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert criterion_module("theirs.first").needs == frozenset()


def test_an_unknown_need_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        Wanted(needs=frozenset({"grams"}))
    assert str(caught.value) == 'unknown statistic "grams"; did you mean "gram"?'


def test_scoring_changes_nothing() -> None:
    model = valued(net())
    before = copy.deepcopy(dict(model.values()))
    stats = gather(model, images(8), Wanted(needs=STATISTICS, params=LAYERS))
    kept: Sequence[Tensor] = [value.clone() for value in stats.gates.values()]
    for name in NAMES:
        criterion_module(name).score(model, WIDE, stats)
    assert all(torch.equal(value, before[name]) for name, value in model.values().items())
    assert all(torch.equal(*pair) for pair in zip(kept, stats.gates.values(), strict=True))
