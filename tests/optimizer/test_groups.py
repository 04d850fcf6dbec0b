"""Channel groups: a cut network computes what the masked one does, whatever is removed, on every network of the zoo."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.optimizer import channel_rules, cut, groups, prune, widths
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import InfeasibleError
from paredown.optimizer.graph import capture
from paredown.optimizer.groups import Group, Unit
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.prune import Analysis, Spec

from ..zoo.nets import ZOO, in_turn

WIDTHS = {
    "residual": {"stem": 6, "blocks.0.conv1": 6, "blocks.1.conv1": 10},
    "separable": {"0": 8, "3.3": 12, "4.3": 8},
    "waves": {"encode": 8},
    "encoder_decoder": {"down2": 8, "down1": 12, "grouped_up": 4},
    "squeeze_excite": {"conv": 8, "squeeze": 4},
    "grouped": {"first": 6, "second": 6},
    "detector": {"stem": 8},
    "vision": {f"blocks.{i}.{n}": w for i in (0, 1) for n, w in (("attention.in_proj_weight", 2), ("grow", 16))},
    "cross_attention": {"attention.in_proj_weight": 2, "shared.in_proj_weight": 2},
    "llama": {f"layers.{i}.{n}": w for i in (0, 1) for n, w in (("q_proj", 2), ("gate_proj", 20))},
    "bert": {"layers.0.grow": 16, "layers.1.grow": 16},
    "raw": {"linear": 8},
    "gru": {},
    "lstm": {},
    "cells": {},
}
"""Group -> its units, in graph order: what a person finds by reading the networks (others are not listed)."""


@functools.cache
def analysed(name: str) -> Analysis:
    net = ZOO[name]
    model, batch = net.model(), net.batch(4)
    return prune.analyse(
        model, Spec(), capture(model.module(), batch), Calibration(batches=(batch,), samples=4, axes=(0,) * len(batch))
    )


@pytest.mark.parametrize("name", WIDTHS)
def test_groups_are_those_that_a_reader_finds(name: str) -> None:
    assert {group.name: len(group.units) for group in analysed(name).groups} == WIDTHS[name]


@st.composite
def removals(draw: st.DrawFn, found: tuple[Group, ...]) -> dict[str, list[Unit]]:
    """Return some groups with units that go, as many from each cell."""
    chosen = draw(st.lists(st.sampled_from(found), min_size=1, unique_by=lambda group: group.name))
    gone = {}
    for group in chosen:
        count = draw(st.integers(1, group.width - 1))
        cells = [draw(st.permutations(list(cell))) for cell in group.cells]
        gone[group.name] = [unit for cell in cells for unit in cell[:count]]
    return gone


@pytest.mark.parametrize("name", in_turn([name for name in ZOO if WIDTHS.get(name, {"": 1})], 3))
@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_cut_network_computes_what_the_masked_one_does(name: str, data: st.DataObject) -> None:
    found = analysed(name)
    gone = data.draw(removals(found.groups))
    attributes: dict[str, object] = {}
    for group, own in gone.items():
        attributes |= widths.values(found.model, found.channels, own, found.fit.attributes.get(group, ()))
    units = [unit for own in gone.values() for unit in own]
    small, masked = cut.cut(found.model, units, attributes), cut.masked(found.model, units)
    batch = ZOO[name].batch(3, seed=data.draw(st.integers(0, 3)))
    with torch.no_grad():
        wanted, got = (pytree.tree_leaves(m.module()(*batch)) for m in (masked, small))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a, atol=2e-5 * float(a.abs().max()) + 1e-7, rtol=0)
    assert small.parameters() < found.model.parameters()


@pytest.mark.parametrize("name", ["residual", "vision", "llama"])
def test_what_is_masked_makes_a_difference(name: str) -> None:
    """The comparison above would pass for units that do nothing: most do something."""
    found, batch = analysed(name), ZOO[name].batch(3)
    with torch.no_grad():
        before = pytree.tree_leaves(found.model.module()(*batch))[0]
        moved = [
            max(
                float((pytree.tree_leaves(cut.masked(found.model, [unit]).module()(*batch))[0] - before).abs().max())
                for unit in group.units
            )
            for group in found.groups
        ]
    assert min(moved) > 1e-4


def model_of(module: nn.Module, *shape: int) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return from_module(module.eval(), (InputSpec(name="x", shape=("batch", *shape)),), Source(entry="")), torch.randn(
        2, *shape
    )


def found_in(module: nn.Module, *shape: int, spec: Spec | None = None) -> Analysis:
    model, x = model_of(module, *shape)
    return prune.analyse(model, spec or Spec(), capture(model.module(), (x,)), Calibration(batches=((x,),), samples=2))


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x).sort(dim=-1).values)
        return y


def test_an_unknown_operator_is_named_with_its_place() -> None:
    with pytest.raises(InfeasibleError) as caught:
        found_in(nn.Sequential(nn.Linear(4, 4), Sorted(), nn.Linear(3, 2)), 4)
    assert str(caught.value) == (
        '"1": channels cannot be followed through aten.sort.default; '
        "name the layers before it in skip, or replace it by operators that are known"
    )


def test_an_unknown_operator_is_no_matter_where_nothing_removable_reaches_it() -> None:
    spec = Spec(skip=("1.one",))
    found = found_in(nn.Sequential(nn.Linear(4, 5), Sorted5(), nn.Linear(3, 2)), 4, spec=spec)
    assert [group.name for group in found.groups] == ["0", "1.two"]
    assert found.kept["1.one.weight"] == "skipped by the recipe"


class Sorted5(Sorted):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 6)


class Written(nn.Module):
    """A width in the code: it can be cut nowhere else than in whole quarters."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), 2, 4).mean(1)


def test_a_width_in_the_code_is_refused_with_its_reason() -> None:
    found = found_in(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Written(), nn.Linear(4, 6), nn.Linear(6, 2)), 4)
    assert [group.name for group in found.groups] == ["3"]
    assert "is averaged" in found.kept["0.weight"] or "fixes its width" in found.kept["0.weight"]


class Halves(nn.Module):
    """Widths kept as attributes: a number and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.left, self.right = nn.Linear(4, 12), nn.Linear(7, 3), nn.Linear(5, 3)
        self.sizes = (7, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.grow(x)).split(self.sizes, dim=-1)
        y: Tensor = self.left(a) + self.right(b)
        return y


def test_attributes_that_hold_widths_are_rewritten() -> None:
    found = found_in(Halves(), 4)
    assert [(group.name, len(group.units)) for group in found.groups] == [("grow", 7), ("grow#2", 5)]
    assert found.fit.attributes["grow"] == ("sizes",)
    units = [found.groups[0].units[2], *found.groups[1].units[:2]]
    changed = widths.values(found.model, found.channels, units, ("sizes",))
    assert changed == {"sizes": [6, 3]}
    small = cut.cut(found.model, units, changed)
    x = torch.randn(3, 4)
    torch.testing.assert_close(small.module()(x), cut.masked(found.model, units).module()(x))


class TwoWays(nn.Module):
    """A weight that is multiplied by and also added: no cut leaves both right."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(F.linear(x, self.one.weight) + self.one.weight.sum(0))
        return y


def test_a_weight_that_is_read_in_another_way_too_keeps_its_width() -> None:
    assert not found_in(TwoWays(), 4).groups


def test_the_width_of_a_table_is_cut() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(10, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    model = from_module(net, (InputSpec(name="x", shape=("batch", 5), dtype="int64"),), Source(entry=""))
    x = torch.randint(0, 10, (2, 5))
    found = prune.analyse(model, Spec(), capture(model.module(), (x,)), Calibration(batches=((x,),), samples=2))
    (group,) = found.groups
    assert (group.name, group.producers, len(group.units)) == ("0", ("0.weight",), 8)
    assert found.kept == {"2.weight": "it is an output of the network"}
    small = cut.cut(found.model, group.units[3:6]).module()
    assert small[0].embedding_dim == small[0].weight.shape[1] == 5
    torch.testing.assert_close(small(x), cut.masked(found.model, group.units[3:6]).module()(x))


def test_tied_weights_are_cut_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 6)
            self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.mix(self.words(x))))
            return y

    torch.manual_seed(0)
    model = from_module(Tied().eval(), (InputSpec(name="x", shape=("batch", 5), dtype="int64"),), Source(entry=""))
    x = torch.randint(0, 9, (2, 5))
    found = prune.analyse(model, Spec(), capture(model.module(), (x,)), Calibration(batches=((x,),), samples=2))
    (group,) = found.groups
    small = cut.cut(found.model, group.units[:2])
    module = small.module()
    assert module.head.weight is module.words.weight
    assert module.words.weight.shape == (9, 4)
    torch.testing.assert_close(module(x), cut.masked(found.model, group.units[:2]).module()(x))


def test_every_weight_is_in_a_group_or_kept_for_a_reason() -> None:
    for name in ZOO:
        found = analysed(name)
        covered = {param for group in found.groups for param in group.params("rows")}
        sites = set(found.graph.of_param())
        made = {param for group in found.groups for param in group.producers}
        assert covered | set(found.kept) | made == sites, name
        assert all(found.kept.values())


def test_ids_follow_the_graph_and_not_the_module_tree() -> None:
    model, x = model_of(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)), 4)
    found = channel_rules.follow(capture(model.module(), (x,)))
    first, second = groups.find(found)
    assert first.params("columns") == ("1.weight",)
    assert second.params("columns") == ("2.weight",)
    assert first.params("elements") == ("0.bias",)
