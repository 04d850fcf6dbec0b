"""The quantize step: what is planned, what each layer is quantized on, and what comes of the whole zoo."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.optimizer import data, fold, quantize
from paredown.optimizer.codes import Format
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import InfeasibleError, RecipeError
from paredown.optimizer.graph import quiet_export
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.quantize import Spec
from paredown.optimizer.quantizers import kmeans, lnq, uniform
from paredown.optimizer.stats import LayerStats
from paredown.optimizer.steps import Decision, Ground, Hooks, Result
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Codebook, Dense, Uniform, Weight

from ..zoo.nets import ZOO, Net, in_turn
from ..zoo.traced import case
from ..zoo.watched import Expected, raw_expected, watched

OPTIONS: dict[str, Any] = {
    "kmeans": kmeans.Spec(format=Format(bits=4)),
    "lnq": lnq.Spec(format=Format(bits=4, feedback=True), rounds=2, cycles=1),
}
KEPT = {"token", "positions", "start", "both_ways"}
"""Weights of the zoo that nothing multiplies, and one that is used in two orientations."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> object:
    """Small matrices: a second thread only adds hand-over time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calibration(net: Net, samples: int = 24) -> Calibration:
    batch = net.batch(samples, seed=9)
    return data.batches(batch, net.inputs, samples)


@functools.cache
def quantized(name: str, quantizer: str) -> tuple[Result, tuple[Decision, ...]]:
    """Return a network of the zoo after the step, without corrections."""
    net = case(name)
    spec = Spec(quantizer=quantizer, correct_bias=False, reestimate=False)
    decisions = quantize.plan(net.model, spec, (OPTIONS[quantizer],), Ground(graph=net.traced.graph))
    return quantize.apply(net.model, spec, decisions, calibration(net.net), Hooks()), decisions


def folded(name: str) -> Model:
    net = case(name)
    return fold.apply(net.model, fold.plan(net.model, net.traced.graph))


def fitted(net: Net) -> Sequence[tuple[Tensor, ...]]:
    """Return the batches that the step fits on: all but the held-out eighth."""
    return data.split(calibration(net), 0.125, 0)[0].batches


def run(model: Model, batch: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), quiet_export():
        return [y for y in pytree.tree_leaves(model.module()(*batch)) if y.is_floating_point()]


def rel(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    wrong = sum(float((x - y).double().square().sum()) for x, y in zip(one, other, strict=True))
    return float((wrong / sum(float(x.double().square().sum()) for x in one)) ** 0.5)


@pytest.mark.parametrize("quantizer", OPTIONS)
@pytest.mark.parametrize("name", in_turn(ZOO, 0))
def test_the_zoo_is_quantized(name: str, quantizer: str) -> None:
    result, decisions = quantized(name, quantizer)
    net = case(name)
    used = {line.split()[0] for line in net.net.sites.splitlines() if line} - KEPT
    compressed = {key for key, weight in result.model.weights.items() if not isinstance(weight, Dense)}
    assert compressed == used
    assert {row.layer for row in result.layers} == set(result.model.weights) == {d.layer for d in decisions}
    assert {row.layer for row in result.layers if row.reason} == set(result.model.weights) - used
    batch = net.net.batch(16, seed=11)
    assert rel(run(net.model, batch), run(result.model, batch)) < 0.35
    assert result.model.size_bytes() < net.model.size_bytes()
    assert result.notes == ()


def seen_by(name: str, model: Model) -> Expected:
    net = case(name)
    module = model.module()
    return raw_expected(module, fitted(net.net)) if name == "raw" else watched(module, fitted(net.net))


@pytest.mark.parametrize("name", in_turn(ZOO, 0))
def test_errors_are_relative_output_errors_on_what_the_prefix_gives(name: str) -> None:
    """A weight used once sees the quantized network; one used often sees the network as it was."""
    result, _ = quantized(name, "lnq")
    original = folded(name)
    before, after = seen_by(name, original), seen_by(name, result.model)
    uses = case(name).traced.graph.of_param()
    for row in result.layers:
        if row.reason:
            assert row.error_rel == 0.0
            continue
        weight = result.model.weights[row.layer]
        layout = result.model.layouts[row.layer]
        old = layout.to_matrix(original.layouts[row.layer].to_param(original.weights[row.layer].dense())).double()
        delta = weight.dense().double() - old
        seen = before if len(uses[row.layer]) > 1 else after
        if "_hh" in row.layer and len(uses[row.layer]) == 1:
            seen = seen_by(name, until(original, result.model, row.layer, list(uses)))
        if row.layer in seen.parts:
            rows = [seen.of_row(row.layer, i) for i in range(len(old))]
            wrong = sum(float((x @ d).square().sum()) for x, d in zip(rows, delta, strict=True))
            total = sum(float((x @ w).square().sum()) for x, w in zip(rows, old, strict=True))
        else:
            counts = seen.counts[row.layer]
            wrong, total = (float((m.square().sum(1) * counts).sum()) for m in (delta, old))
        assert row.error_rel == pytest.approx((wrong / total) ** 0.5, rel=2e-3), row.layer


def until(original: Model, result: Model, layer: str, order: list[str]) -> Model:
    """Return the model in which only what is visited before `layer` is quantized."""
    return original.with_weights({key: result.weights[key] for key in order[: order.index(layer)]})


@pytest.mark.parametrize(
    "name", ["separable", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cross_attention", "llama", "gru"))]
)
def test_two_runs_give_the_same_bytes(name: str) -> None:
    net, spec = case(name), Spec(quantizer="lnq")
    decisions = quantize.plan(net.model, spec, (OPTIONS["lnq"],), Ground(graph=net.traced.graph))
    one, two = (quantize.apply(net.model, spec, decisions, calibration(net.net), Hooks()) for _ in range(2))
    assert one.layers == two.layers
    assert one.notes == two.notes
    assert one.notes
    values = two.model.values()
    assert all(torch.equal(value, values[key]) for key, value in one.model.values().items())


def test_corrections_are_judged_on_data_that_nothing_else_saw() -> None:
    net = case("residual")
    spec = Spec(quantizer="lnq")
    decisions = quantize.plan(net.model, spec, (OPTIONS["lnq"],), Ground(graph=net.traced.graph))
    result = quantize.apply(net.model, spec, decisions, calibration(net.net), Hooks())
    held = data.split(calibration(net.net), 0.125, 0)[1].batches[0]
    plain = quantized("residual", "lnq")[0].model
    error, corrected = (rel(run(net.model, held), run(m, held)) for m in (plain, result.model))
    assert corrected <= error * (1 + 1e-6)
    assert [note.split(":")[0].rsplit(" ", 1)[0] for note in result.notes] == [
        "bias correction",
        "normalization correction",
    ]
    assert f"{error:.5f}" in result.notes[0]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


@functools.cache
def two() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return from_module(Two(), (InputSpec(name="x", shape=("batch", 6)),), Source(entry="net.py:net"))


def test_later_layers_see_the_quantized_prefix() -> None:
    model, x = two(), torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    options = lnq.Spec(format=Format(bits=2, feedback=True))
    spec = Spec(quantizer="lnq", correct_bias=False, reestimate=False)
    decisions = quantize.plan(model, spec, (options,), Ground(graph=trace(model.module(), [(x,)]).graph))
    result = quantize.apply(model, spec, decisions, data.batches(x, model.inputs, 32), Hooks())
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(32, dtype=torch.bool)
    kept[order[:4]] = False
    hidden, values = x[kept], model.values()
    for name in ("first", "second"):
        gram = (hidden.double().T @ hidden.double())[None]
        by_hand = lnq.quantize(values[f"{name}.weight"], LayerStats(rows=28, gram=gram), options)
        got = result.model.weights[f"{name}.weight"]
        assert isinstance(by_hand, Codebook)
        assert isinstance(got, Codebook)
        assert torch.equal(got.codes, by_hand.codes)
        assert torch.allclose(got.dense(), by_hand.dense(), rtol=1e-6)
        hidden = torch.tanh(hidden @ got.dense().T + values[f"{name}.bias"])


def planned(spec: Spec, model: Model | None = None, options: Any = None) -> dict[str, Decision]:
    model = model or two()
    graph = trace(model.module(), [(torch.zeros(2, 6),)]).graph
    return {d.layer: d for d in quantize.plan(model, spec, (options or OPTIONS[spec.quantizer],), Ground(graph=graph))}


def test_globs_choose_layers() -> None:
    assert [d.method for d in planned(Spec()).values()] == ["lnq", "lnq"]
    only = planned(Spec(layers=("sec*",)))
    assert (only["first.weight"].reason, only["second.weight"].reason) == ("not among the recipe's layers", "")
    skipped = planned(Spec(skip=("first",)))
    assert (skipped["first.weight"].reason, skipped["first.weight"].method) == ("skipped by the recipe", "")
    assert planned(Spec(skip=("*.weight",)))["second.weight"].reason == "skipped by the recipe"


def test_overrides_change_fields_one_after_the_other() -> None:
    override = {"*": {"bits": 3}, "second": {"bits": 8, "quantizer": "uniform"}}
    found = planned(Spec(override=override))
    first, second = found["first.weight"], found["second.weight"]
    assert (first.method, first.spec.format.bits, first.spec.rounds) == ("lnq", 3, 2)
    assert (second.method, second.spec) == ("uniform", uniform.Spec(format=Format(bits=8, feedback=True)))
    grouped = planned(Spec(override={"first": {"rounds": 7, "group": 5}}))["first.weight"].spec
    assert (grouped.rounds, grouped.format.group, grouped.format.feedback) == (7, 5, True)


BAD: dict[str, tuple[Spec, str]] = {
    "layers": (Spec(layers=("frist",)), '"frist" matches no layer; did you mean "first"?'),
    "skip": (Spec(skip=("layer7*",)), '"layer7*" matches no layer; use one of first, second'),
    "override": (Spec(override={"secnd": {"bits": 3}}), '"secnd" matches no layer; did you mean "second"?'),
    "quantizer": (
        Spec(override={"first": {"quantizer": "lnk"}}),
        'unknown quantizer "lnk"; did you mean "lnq"?',
    ),
    "module": (
        Spec(override={"first": {"quantizer": "nowhere.at_all"}}),
        "quantizer \"nowhere.at_all\" cannot be imported: No module named 'nowhere'; "
        "install the module or fix its name",
    ),
    "field": (
        Spec(override={"first": {"bit": 3}}),
        'override "first": there is no key "bit"; did you mean "bits"?',
    ),
    "value": (
        Spec(override={"first": {"bits": 5}}),
        'override "first": bits=5 is not supported; use 2, 3, 4 or 8',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plans_are_named(name: str) -> None:
    spec, text = BAD[name]
    with pytest.raises(RecipeError) as caught:
        planned(spec)
    assert str(caught.value) == text


def test_a_layer_is_quantized_once() -> None:
    result, _ = quantized("waves", "kmeans")
    graph = trace(result.model.module(), [ZOO["waves"].batch(1)]).graph
    with pytest.raises(RecipeError) as caught:
        quantize.plan(result.model, Spec(), (OPTIONS["lnq"],), Ground(graph=graph))
    assert str(caught.value) == 'layer "encode" is compressed already; quantize each layer in one step only'


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1])
def test_the_held_out_part_is_checked(value: float) -> None:
    with pytest.raises(RecipeError) as caught:
        Spec(held_out=value)
    assert str(caught.value) == f"held_out={value} is out of range; use a part between 0 and 1"


@pytest.mark.parametrize("name", ["raw", "vision", "residual"])
def test_decisions_come_back_from_plain_data(name: str) -> None:
    for quantizer in OPTIONS:
        for decision in quantized(name, quantizer)[1]:
            plain = json.loads(json.dumps(quantize.describe(decision)))
            assert quantize.restore(decision.layer, plain) == decision
    reasons = {d.layer: d.reason for d in quantized(name, "lnq")[1] if d.reason}
    nothing = "no operator that paredown knows multiplies it"
    expected = {"raw": {"both_ways": "used in two orientations"}, "vision": {"token": nothing, "positions": nothing}}
    assert reasons == expected.get(name, {})


def test_a_described_decision_is_short() -> None:
    found = planned(Spec(quantizer="kmeans", skip=("first",)))
    assert quantize.describe(found["first.weight"]) == {"keep": "skipped by the recipe"}
    plain = quantize.describe(found["second.weight"])
    assert (plain["quantizer"], plain["bits"], plain["group"]) == ("kmeans", 4, 0)


class Memory:
    """A cache that knows one layer."""

    def __init__(self, known: dict[str, Weight]) -> None:
        self.known, self.put_keys = known, list[str]()

    def get(self, key: str) -> Weight | None:
        return self.known.get(key)

    def put(self, key: str, weight: Weight) -> None:
        self.put_keys.append(key)


def apply_two(spec: Spec, decisions: Sequence[Decision], hooks: Hooks) -> Result:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return quantize.apply(two(), spec, decisions, data.batches(x, two().inputs, 32), hooks)


def test_finished_layers_come_from_the_cache() -> None:
    spec = Spec(quantizer="kmeans", correct_bias=False, reestimate=False)
    decisions = list(planned(spec).values())
    known = Uniform(codes=torch.full((10, 6), 3).byte(), scale=torch.ones(10, 1), zero=2, code_bits=2)
    memory = Memory({"first.weight": known})
    labels: list[tuple[float, float, str]] = []
    hooks = Hooks(cache=memory, progress=lambda done, total, label: labels.append((done, total, label)))
    result = apply_two(spec, decisions, hooks)
    assert result.model.weights["first.weight"] is known
    assert memory.put_keys == ["second.weight"]
    assert labels == [(0, 2, "quantize first"), (1, 2, "quantize second")]
    hidden = Memory({"first.weight": known, "second.weight": result.model.weights["second.weight"]})
    assert apply_two(spec, decisions, Hooks(cache=hidden)).layers == result.layers


def test_errors_carry_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(quantizer="kmeans", correct_bias=False, reestimate=False)
    raiser(monkeypatch, RecipeError("k=6 is too small", fix="use more"))
    decisions = broken(spec)
    with pytest.raises(RecipeError) as caught:
        apply_two(spec, decisions, Hooks())
    assert str(caught.value) == 'layer "first": k=6 is too small; use more'
    raiser(monkeypatch, None)
    with pytest.raises(InfeasibleError) as infeasible:
        apply_two(spec, decisions, Hooks())
    assert str(infeasible.value) == 'layer "first" has non-finite weights after broken.module'


def broken(spec: Spec) -> list[Decision]:
    return [replace(decision, method="broken.module") for decision in planned(spec).values()]


def raiser(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    """Install a quantizer that raises, or returns infinities."""
    module: Any = ModuleType("broken.module")

    def fail(w: Tensor, stats: LayerStats | None, spec: Any) -> Weight:
        if error is not None:
            raise error
        return Dense(values=torch.full_like(w, float("inf")))

    module.Spec, module.needs, module.quantize = kmeans.Spec, frozenset(), fail
    monkeypatch.setitem(sys.modules, "broken", ModuleType("broken"))
    monkeypatch.setitem(sys.modules, "broken.module", module)
