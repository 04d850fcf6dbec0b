"""The prune step: what is chosen, how the rest makes up for it, and what the whole zoo becomes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.optimizer import budget, cost, data, prune, store
from paredown.optimizer.budget import Curve, Footprint
from paredown.optimizer.errors import InfeasibleError, RecipeError
from paredown.optimizer.groups import Group
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.prune import Spec, Width
from paredown.optimizer.steps import Decision, Ground, Hooks, Result
from paredown.optimizer.walk import trace

from ..zoo.nets import NETS, ZOO, Net, in_turn
from .tiny import edit, optimize, project

PRUNABLE = [net.name for net in NETS if net.name not in ("gru", "lstm", "cells")]
CRITERIA = ["obs", "magnitude", "flap", "taylor", "fisher", "random"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pruned(model: Model, batch: tuple[Tensor, ...], spec: Spec) -> tuple[Result, tuple[Decision, ...]]:
    calibration = data.batches(batch, model.inputs, len(batch[0]))
    ground = Ground(graph=trace(model.module(), calibration.batches[:1]).graph, calibration=calibration)
    decisions = prune.plan(model, spec, (), ground)
    return prune.apply(model, spec, decisions, calibration, Hooks()), decisions


def of_zoo(net: Net, spec: Spec) -> tuple[Result, tuple[Decision, ...]]:
    return pruned(net.model(), net.batch(16, seed=4), spec)


@pytest.mark.parametrize("name", in_turn(PRUNABLE, 2))
def test_every_network_is_pruned_stored_and_trained_on(name: str, tmp_path: Path) -> None:
    net = ZOO[name]
    result, decisions = of_zoo(net, Spec(ratio=0.4))
    assert any(decision.method for decision in decisions)
    assert result.model.parameters() < net.model().parameters()
    store.save(result.model, tmp_path)
    module, batch = store.load(tmp_path).module(), net.batch(5)
    with torch.no_grad():
        for a, b in zip(
            pytree.tree_leaves(result.model.module()(*batch)), pytree.tree_leaves(module(*batch)), strict=True
        ):
            assert torch.equal(a, b)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = pytree.tree_leaves(module(*batch))
        loss = sum(y.double().square().mean() for y in outputs if y.is_floating_point())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes_to_the_same_budget(criterion: str) -> None:
    net = ZOO["residual"]
    model = net.model()
    result, _ = of_zoo(net, Spec(criterion=criterion, remove_macs=0.3))
    before, after = (cost.macs(trace(m.module(), [net.batch(4)]).graph) for m in (model, result.model))
    assert 0.5 * before < after <= 0.7 * before


def test_bn_scale_takes_the_channels_of_small_gain() -> None:
    net = ZOO["separable"]
    model = net.model()
    gains = torch.linspace(1, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    model = model.with_tensors({"3.4.weight": gains, "4.1.weight": torch.ones(12)})
    _, decisions = pruned(model, net.batch(8), Spec(criterion="bn_scale", ratio=0.25, scope="layer"))
    (chosen,) = (decision.spec.remove for decision in decisions if decision.layer == "3.3")
    assert set(chosen) == set(gains.argsort()[:3].tolist())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)))
        return y


def pair(seed: int = 0) -> tuple[Model, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(200, 6)
    return from_module(Pair().eval(), (InputSpec(name="x", shape=("batch", 6)),), Source(entry="")), x


def test_what_remains_is_the_least_squares_solution() -> None:
    """Against numpy's lstsq with the ridge as further equations; the target is the original's output."""
    model, x = pair()
    spec = Spec(ratio=0.5, correct=False)
    result, decisions = pruned(model, (x,), spec)
    fit, _ = data.split(data.batches(x, model.inputs, 200), spec.held_out, 0)
    module = model.module()
    with torch.no_grad():
        hidden = torch.relu(module.one(torch.cat([batch[0] for batch in fit.batches]))).double().numpy()
    weight = model.weights["two.weight"].dense().double().numpy()
    gone = decisions[0].spec.remove
    keep = [place for place in range(10) if place not in gone]
    gram = hidden.T @ hidden
    ridge = np.sqrt(0.01 * np.diag(gram).mean())
    left = np.concatenate([hidden[:, keep], ridge * np.eye(10)[:, keep]])
    right = np.concatenate([hidden @ weight.T, ridge * weight.T])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(result.model.weights["two.weight"].dense().numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_the_units_that_go_cost_least_of_all_choices() -> None:
    """Greedy removal of two units is compared with every pair, by least squares on the same data."""
    hits = 0
    for seed in range(5):
        model, x = pair(seed)
        _, decisions = pruned(model, (x,), Spec(ratio=0.2, correct=False))
        fit, _ = data.split(data.batches(x, model.inputs, 200), 0.125, 0)
        with torch.no_grad():
            hidden = torch.relu(model.module().one(torch.cat([batch[0] for batch in fit.batches]))).double().numpy()
        weight = model.weights["two.weight"].dense().double().numpy()

        def loss(gone: Sequence[int], hidden: Any = hidden, weight: Any = weight) -> float:
            keep = [place for place in range(10) if place not in gone]
            fitted = np.linalg.lstsq(hidden[:, keep], hidden @ weight.T, rcond=None)[0]
            return float(np.square(hidden[:, keep] @ fitted - hidden @ weight.T).sum())

        losses = sorted(loss(two) for two in itertools.combinations(range(10), 2))
        hits += loss(decisions[0].spec.remove) <= losses[1] * 1.02
    assert hits >= 4


def test_compensation_and_corrections_lower_the_error() -> None:
    net = ZOO["encoder_decoder"]
    batch, model = net.batch(48, seed=2), net.model()
    with torch.no_grad():
        wanted = model.module()(*batch)

        def error(spec: Spec) -> float:
            result, _ = pruned(model, batch, spec)
            return float((result.model.module()(*batch) - wanted).norm() / wanted.norm())

        plain, solved = (error(Spec(ratio=0.3, compensate=done, correct=False)) for done in (False, True))
    assert solved < 0.8 * plain


def test_a_dead_channel_costs_nothing() -> None:
    model, x = pair()
    weight = model.weights["one.weight"].dense().clone()
    weight[3] = 0
    bias = model.tensors["one.bias"].clone()
    bias[3] = -1
    model = model.with_weights({"one.weight": replace(model.weights["one.weight"], values=weight)})  # type: ignore[type-var]
    model = model.with_tensors({"one.bias": bias})
    result, decisions = pruned(model, (x,), Spec(ratio=0.1, correct=False))
    assert decisions[0].spec == Width(keep=9, of=10, remove=(3,))
    torch.testing.assert_close(result.model.module()(x), model.module()(x), atol=1e-5, rtol=1e-5)


def curves(widths: Sequence[int], costs: Sequence[Sequence[float]]) -> list[Curve]:
    groups = [Group(name=f"g{i}", cells=((),)) for i in range(len(widths))]
    return [
        Curve(group=group, removed=tuple(range(len(own) + 1)), costs=(0.0, *itertools.accumulate(own)))
        for group, own in zip(groups, costs, strict=True)
    ]


def test_the_greedy_allocation_is_near_the_best_of_all() -> None:
    """Convex costs, three groups with rows in one weight and columns in the next: every allocation is tried."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = [torch.rand(5, generator=generator).sort().values.tolist() for _ in range(3)]
        found = curves((6, 6, 6), costs)
        weights = {f"w{i}": float(torch.rand(1, generator=generator)) + 0.5 for i in range(4)}
        rows = {f"w{i}": {f"g{i}": 1 / 6} for i in range(3)}
        columns = {f"w{i + 1}": {f"g{i}": 1 / 6} for i in range(3)}
        footprint = Footprint(weights=weights, rows=rows, columns=columns)
        chosen = budget.cheapest(found, footprint, 0.4, {})
        assert footprint.total(chosen) <= 0.6 * footprint.total({})

        def price(counts: Sequence[int], found: Sequence[Curve] = found) -> float:
            return sum(c.costs[n] for c, n in zip(found, counts, strict=True))

        allowed = [
            price(counts)
            for counts in itertools.product(range(6), repeat=3)
            if footprint.total({f"g{i}": n for i, n in enumerate(counts)}) <= 0.6 * footprint.total({})
        ]
        assert price([chosen[f"g{i}"] for i in range(3)]) <= 1.35 * min(allowed)


def test_widths_are_multiples_of_round_to() -> None:
    net = ZOO["swiglu"] if "swiglu" in ZOO else ZOO["llama"]
    _, decisions = of_zoo(net, Spec(ratio=0.3, round_to=4))
    kept = [decision.spec.keep for decision in decisions if decision.method]
    assert kept
    assert all(width % 4 == 0 for width in kept)


def test_ratios_of_single_layers_and_skipped_ones() -> None:
    spec = Spec(ratio=0.25, scope="layer", skip=("4.3",), override={"3.3": {"ratio": 0.5}})
    _, decisions = of_zoo(ZOO["separable"], spec)
    found = {decision.layer: decision for decision in decisions}
    assert found["0"].spec.keep == 6
    assert found["3.3"].spec.keep == 6
    assert found["4.3.weight"].reason == "skipped by the recipe"


def test_too_much_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match=r"can be removed at most, 95.0% is asked for; ask for less"):
        of_zoo(ZOO["residual"], Spec(remove_macs=0.95, max_ratio=0.5))


def test_plans_survive_as_data() -> None:
    _, decisions = of_zoo(ZOO["residual"], Spec(ratio=0.3))
    for decision in decisions:
        plain = json.loads(json.dumps(prune.describe(decision)))
        assert prune.restore(decision.layer, plain) == decision
    with pytest.raises(RecipeError, match="keep: 3 and 1 removed units are not 8"):
        prune.restore("conv1", {"criterion": "obs", "keep": 3, "of": 8, "remove": [1]})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ratio": 0.3, "remove_macs": 0.2}, "ratio and remove_macs both say how much to remove; keep one of them"),
        ({"ratio": 1.0}, "ratio=1.0 is out of range; use a part between 0 and 1"),
        ({"round_to": 0}, "round_to=0 is out of range; use 1, 8 or 16"),
        ({"criterion": "obd"}, 'unknown criterion "obd"; did you mean "obs"?'),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Spec(**fields)
    assert str(caught.value) == says


STEPS = """steps:
  - prune: {ratio: 0.25, scope: layer, skip: [linear]}
  - quantize: {quantizer: kmeans, bits: 4}
"""


def test_the_command_prunes_and_quantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project(tmp_path))
    edit(tmp_path / "recipe.yaml", "steps:\n  - quantize: {quantizer: kmeans, bits: 4}\n", STEPS)
    assert optimize(monkeypatch, "run", "recipe.yaml", "--out", "out").code == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["final"]["macs"] < report["baseline"]["macs"]
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["conv1.weight"]["channels_kept"] == rows["conv1.weight"]["shape"][0] < 8
    assert {row["format"] for row in rows.values()} == {"codebook 4"}
    loaded = store.load(tmp_path / "out")
    assert loaded.module().conv1.out_channels == rows["conv1.weight"]["channels_kept"]
    again = optimize(monkeypatch, "run", "recipe.yaml", "--out", "again", "--plan", "out/plan.yaml")
    assert again.code == 0, again.err
    for name in ("model.safetensors", "model.json", "plan.yaml", "model.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        (
            "steps: [quantize: {quantizer: kmeans, bits: 4}, prune: {ratio: 0.2}]",
            'recipe.yaml:4: "conv1" is changed already by the step at recipe.yaml:4; '
            "prune in one step, before factorize and quantize",
        ),
        (
            "steps: [prune: {ratio: 0.2, skip: [conv9]}]",
            'recipe.yaml:4: "conv9" matches no layer; did you mean "conv2"?',
        ),
    ],
)
def test_bad_recipes_are_named(steps: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project(tmp_path))
    edit(tmp_path / "recipe.yaml", "steps:\n  - quantize: {quantizer: kmeans, bits: 4}", steps)
    outcome = optimize(monkeypatch, "plan", "recipe.yaml")
    assert outcome.code == 2
    assert outcome.error == [f"optimize: {says}"]


RAW = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return torch.relu(x @ self.w1.T) @ self.w2.T

def build():
    torch.manual_seed(0)
    return Net()

def calibration(samples, seed):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
"""


def test_a_group_may_have_the_name_of_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw parameter has no ".weight" to lose: group and layer are both "w1"."""
    (tmp_path / "raw.py").write_text(RAW)
    (tmp_path / "recipe.yaml").write_text(
        'model: {entry: "raw.py:build", inputs: {x: [batch, 6]}}\ndata: {entry: "raw.py:calibration", samples: 32}\n'
        "steps: [prune: {ratio: 0.25}, quantize: {quantizer: kmeans, bits: 4}]\nexport: [onnx]\n"
    )
    monkeypatch.chdir(tmp_path)
    outcome = optimize(monkeypatch, "run", "recipe.yaml", "--out", "out")
    assert outcome.code == 0, outcome.err
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/report.json").read_text())["layers"]}
    assert rows["w1"]["shape"] == [6, 6]
    assert rows["w2"]["shape"] == [3, 6]


PLAIN = "steps: [prune: {ratio: 0.25, scope: layer}]"
EDITED = """schema: paredown.plan/1
steps:
- prune:
    conv1: {criterion: obs, keep: 15, of: 16, remove: [0]}
    conv2: {keep: by hand}
    linear.weight: {keep: by hand}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "", 'the plan: "conv1" has 8 units, the plan says 16; plan again'),
        (
            "linear.weight: {keep: by hand}",
            "linear.weight: {criterion: obs, keep: 9, of: 10, remove: [0]}",
            'the plan: "linear.weight" cannot be pruned; leave its keep as planned',
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    old: str, new: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project(tmp_path))
    edit(tmp_path / "recipe.yaml", "steps:\n  - quantize: {quantizer: kmeans, bits: 4}", PLAIN)
    text = EDITED.replace(old, new) if old else EDITED
    text = text.replace("keep: 15, of: 16", "keep: 7, of: 8") if old else text
    (tmp_path / "plan.yaml").write_text(text)
    outcome = optimize(monkeypatch, "run", "recipe.yaml", "--out", "out", "--plan", "plan.yaml")
    assert outcome.code == 2
    assert outcome.error == [f"optimize: {says}"]


BAD_CRITERIA = {
    "needs = frozenset()\ndef score(model, group, stats): return [1.0]\n": (
        3,
        'criterion "mine.criterion", group "conv1": it gave scores (1,) for 8 units, or some that are not finite; '
        "score every unit",
    ),
    "def score(model, group, stats): return 1\n": (
        2,
        'recipe.yaml:4: criterion "mine.criterion" is no criterion; '
        "define needs = frozenset() and score(model, group, stats)",
    ),
    "1 / 0\n": (2, "mine/criterion.py:1 raised ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("text", BAD_CRITERIA)
def test_a_bad_criterion_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project(tmp_path))
    package = f"mine{list(BAD_CRITERIA).index(text)}"  # a name of its own: modules stay imported
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / package).mkdir()
    (tmp_path / package / "criterion.py").write_text(text)
    steps = f"steps: [prune: {{criterion: {package}.criterion}}]"
    edit(tmp_path / "recipe.yaml", "steps:\n  - quantize: {quantizer: kmeans, bits: 4}", steps)
    outcome = optimize(monkeypatch, "plan", "recipe.yaml")
    code, says = BAD_CRITERIA[text]
    assert outcome.code == code
    (line,) = outcome.error
    assert says.replace("mine", package) in line


def test_other_keys_in_an_override_are_refused() -> None:
    with pytest.raises(RecipeError, match="a group's own keys are ratio, round_to and max_ratio"):
        Spec(override={"conv1": {"criterion": "random"}})


def test_why_nothing_can_be_removed_is_told() -> None:
    model = from_module(nn.Linear(4, 3).eval(), (InputSpec(name="x", shape=("batch", 4)),), Source(entry=""))
    with pytest.raises(InfeasibleError) as caught:
        pruned(model, (torch.randn(16, 4),), Spec())
    assert str(caught.value) == (
        "no channel of the network can be removed (weight: it is an output of the network); leave prune out"
    )
