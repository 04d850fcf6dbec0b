"""The factorize step on the zoo: what is planned, what each layer becomes, and quantization on top of it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.exporters import onnx as target
from paredown.exporters.verify import verify
from paredown.optimizer import cost, data, factorize, quantize, summary
from paredown.optimizer import recipe as recipes
from paredown.optimizer.codes import Format, Residual
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import RecipeError
from paredown.optimizer.factorize import Spec, Target
from paredown.optimizer.graph import capture, quiet_export
from paredown.optimizer.lowrank import break_even
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.quantizers import lnq
from paredown.optimizer.steps import Decision, Ground, Hooks, Result
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

from ..zoo.nets import ZOO, Net, in_turn
from ..zoo.traced import case
from .tiny import edit, optimize, project

PLAIN: dict[str, Any] = {"correct_bias": False, "reestimate": False}
FINE = lnq.Spec(format=Format(bits=8, feedback=True), rounds=1, cycles=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> object:
    """Small matrices: a second thread only adds hand-over time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def calibration(net: Net, samples: int = 24) -> Calibration:
    return data.batches(net.batch(samples, seed=9), net.inputs, samples)


@functools.cache
def factorized(name: str, **fields: Any) -> tuple[Result, tuple[Decision, ...]]:
    net, spec = case(name), Spec(**fields)
    decisions = factorize.plan(net.model, spec, (), Ground(graph=net.traced.graph))
    return factorize.apply(net.model, spec, decisions, calibration(net.net), Hooks()), decisions


def low_ranks(model: Model) -> dict[str, LowRank]:
    return {name: weight for name, weight in model.weights.items() if isinstance(weight, LowRank)}


def run(model: Model, batch: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), quiet_export():
        return [y for y in pytree.tree_leaves(model.module()(*batch)) if y.is_floating_point()]


def rel(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    wrong = sum(float((x - y).double().square().sum()) for x, y in zip(one, other, strict=True))
    return float((wrong / sum(float(x.double().square().sum()) for x in one)) ** 0.5)


def exported(model: Model, path: Path) -> int:
    """Export and verify a network of the zoo; return at how many batch sizes."""
    target.export(model, path)
    return len(verify(model, path, target.open))


def quantized(model: Model, net: Net, options: Any = FINE, **fields: Any) -> Result:
    spec = quantize.Spec(quantizer="lnq", **fields)
    graph = trace(model.module(), calibration(net).batches[:1]).graph
    decisions = quantize.plan(model, spec, (options,), Ground(graph=graph))
    return quantize.apply(model, spec, decisions, calibration(net), Hooks())


@pytest.mark.parametrize("name", in_turn(ZOO, 1))
def test_the_zoo_is_factorized_where_that_saves(name: str) -> None:
    """Every layer has a result; a low rank has fewer weights and multiplications; the rest stays and says why."""
    net, (result, decisions) = case(name), factorized(name, ratio=0.3)
    made = low_ranks(result.model)
    assert {d.layer for d in decisions} == {row.layer for row in result.layers} == set(net.model.weights)
    assert {row.layer for row in result.layers if not row.reason} == set(made)
    for weight in made.values():
        assert isinstance(weight.left, Dense)
        assert isinstance(weight.right, Dense)
        rows, columns = weight.shape
        assert weight.left.shape[1] == math.floor(0.7 * rows * columns / (rows + columns) + 1e-9) >= 1
        assert weight.bits() <= 0.7 * 32 * rows * columns
    for layer in set(net.model.weights) - set(made):
        assert result.model.weights[layer].shape == net.model.weights[layer].shape
    if made:
        graph = trace(result.model.module(), net.batches[:1]).graph
        assert cost.macs(graph, result.model.weights) < cost.macs(graph)
        assert result.model.size_bytes() < net.model.size_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_factorized_quantized_exported_and_verified(name: str, tmp_path: Path) -> None:
    low = factorized(name, ratio=0.3)[0].model
    model = quantized(low, case(name).net).model
    for layer in low_ranks(low):
        weight = model.weights[layer]
        assert isinstance(weight, LowRank)
        assert isinstance(weight.left, Uniform)
        assert isinstance(weight.right, Uniform)
    batch = case(name).net.batch(8, seed=11)
    assert rel(run(low, batch), run(model, batch)) < 0.05
    assert exported(model, tmp_path / "net.onnx") == 2
    held = (tmp_path / "net.onnx").read_bytes()
    stored = [(f"{layer}.left.codes".encode(), f"{layer}.left.c16.codes".encode()) for layer in low_ranks(low)]
    assert all(decoded in held or packed in held for decoded, packed in stored)


class Chain(nn.Module):
    """A convolution, its normalization, and two linear layers: each feeds the next."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide, self.head = nn.Linear(16, 24), nn.Linear(24, 20, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        y: Tensor = self.head(torch.relu(self.wide(x)))
        return y


@pytest.fixture(scope="module")
def chain() -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Chain()
    with torch.no_grad():
        module.norm.weight.copy_(torch.rand(16, generator=generator) * 3)
        assert module.norm.running_var is not None
        module.norm.running_var.copy_(0.1 + torch.rand(16, generator=generator))
    return from_module(module, [InputSpec(name="image", shape=("batch", 3, 6, 6))], Source(entry="n:n"))


def images(samples: int = 40) -> Calibration:
    x = torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(1)).cumsum(3)
    return data.batches(x, (InputSpec(name="image", shape=("batch", 3, 6, 6)),), samples)


def ground(model: Model) -> Ground:
    return Ground(graph=trace(model.module(), images().batches[:1]).graph)


def applied(model: Model, spec: Spec) -> Result:
    return factorize.apply(model, spec, factorize.plan(model, spec, (), ground(model)), images(), Hooks())


def test_each_layer_is_the_truncated_svd_on_what_the_prefix_gives_it(chain: Model) -> None:
    """numpy on the inputs that the factorized layers before make; the convolution is seen behind its normalization."""
    result = applied(chain, Spec(rank=4, **PLAIN))
    module = result.model.module()
    with torch.no_grad():
        x = torch.cat([batch[0] for batch in data.split(images(), 0.125, 0)[0].batches])
        patches = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 27)
        pooled = torch.relu(module.norm(module.conv(x))).mean((2, 3))  # type: ignore[operator, union-attr]
        inner = torch.relu(module.wide(pooled))  # type: ignore[operator, union-attr]
    norm = chain.tensors
    gain = norm["norm.weight"] / (norm["norm.running_var"] + 1e-5).sqrt()
    seen = {"conv": patches, "wide": pooled, "head": inner}
    rows = {row.layer: row for row in result.layers}
    for layer, inputs in seen.items():
        old = chain.weights[f"{layer}.weight"].dense().double()
        old = old * gain.double()[:, None] if layer == "conv" else old
        outputs = (inputs.double() @ old.T).numpy()
        values = np.linalg.svd(outputs, compute_uv=False) ** 2
        new = result.model.weights[f"{layer}.weight"].dense().double()
        wrong = float(((inputs.double() @ new.T).numpy() - outputs).__pow__(2).sum())
        assert wrong == pytest.approx(values[4:].sum(), rel=1e-3)
        assert rows[f"{layer}.weight"].error_rel == pytest.approx((values[4:].sum() / values.sum()) ** 0.5, rel=1e-3)


def test_the_energy_is_kept_and_more_of_it_takes_more_rank(chain: Model) -> None:
    ranks = []
    for energy in (0.5, 0.8, 0.9):
        result = applied(chain, Spec(energy=energy))
        made = low_ranks(result.model)
        assert all(row.error_rel**2 <= 1 - energy + 1e-6 for row in result.layers if row.layer in made)
        ranks.append([weight.left.shape[1] for weight in made.values()])
    assert len(ranks[0]) == 3
    assert ranks[0] <= ranks[1] <= ranks[2]
    assert ranks[0] < ranks[2]


def test_a_layer_stays_dense_where_its_energy_needs_too_much_rank(chain: Model) -> None:
    result = applied(chain, Spec(energy=1.0))
    assert not low_ranks(result.model)
    reasons = {row.layer: row.reason for row in result.layers}
    assert reasons["wide.weight"] == "rank 16 of 24 x 16 saves no weights"
    assert "wide stays dense: rank 16 of 24 x 16 saves no weights" in result.notes
    assert rel(run(chain, images().batches[0]), run(result.model, images().batches[0])) < 1e-5


@pytest.mark.parametrize("layer", ["conv", "wide", "head"])
def test_break_even_is_exact(chain: Model, layer: str) -> None:
    most = break_even(*chain.weights[f"{layer}.weight"].shape)
    found = {
        rank: next(d for d in factorize.plan(chain, Spec(rank=rank), (), ground(chain)) if d.layer == f"{layer}.weight")
        for rank in (most, most + 1)
    }
    rows, columns = chain.weights[f"{layer}.weight"].shape
    assert found[most].method
    assert found[most + 1].reason == f"rank {most + 1} of {rows} x {columns} saves no weights"
    weight = low_ranks(applied(chain, Spec(layers=(layer,), rank=most)).model)[f"{layer}.weight"]
    assert weight.bits() < chain.weights[f"{layer}.weight"].bits()


def test_a_transposed_convolution_that_would_multiply_more_stays_dense() -> None:
    """Its second factor works at the larger output: fewer weights, yet more multiplications."""
    module = nn.Sequential(nn.ConvTranspose2d(4, 16, 2, stride=2))
    model = from_module(module, [InputSpec(name="image", shape=("batch", 4, 6, 6))], Source(entry="n:n"))
    x = torch.randn(20, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    batches = data.batches(x, model.inputs, 20)
    graph = trace(model.module(), batches.batches[:1]).graph
    (few,) = factorize.plan(model, Spec(rank=3), (), Ground(graph=graph))
    (many,) = factorize.plan(model, Spec(rank=4), (), Ground(graph=graph))
    # dense 16 * 16 = 256 per input position; rank r takes 16 r there and 16 r at each of its four outputs: 80 r
    assert few.method
    assert many.reason == "rank 4 of 16 x 16 saves no multiplications"
    low = factorize.apply(model, Spec(rank=3), (few,), batches, Hooks()).model
    shown = trace(low.module(), batches.batches[:1]).graph
    assert cost.macs(shown, low.weights) == 36 * 80 * 3


def test_reasons_that_are_known_before_anything_runs() -> None:
    def reasons(name: str) -> dict[str, str]:
        return {
            d.layer: d.reason
            for d in factorize.plan(case(name).model, Spec(), (), Ground(graph=case(name).traced.graph))
        }

    assert set(reasons("gru").values()) == {"a recurrent operator takes its matrix whole", ""}
    assert reasons("encoder_decoder")["grouped_up.weight"] == "a grouped convolution has thin matrices already"
    assert reasons("encoder_decoder")["up.weight"] == ""
    assert "an embedding looks rows up and multiplies nothing" in reasons("llama").values()
    assert "an operator uses only some of its rows" in reasons("cross_attention").values()


def test_overrides_take_the_place_of_the_step(chain: Model) -> None:
    spec = Spec(ratio=0.5, skip=("head",), override={"conv": {"rank": 2}, "c*": {"energy": 0.7}})
    found = {d.layer: d for d in factorize.plan(chain, spec, (), ground(chain))}
    assert found["conv.weight"].spec == Target(energy=0.7)
    assert found["wide.weight"].spec == Target(ratio=0.5)
    assert found["head.weight"].reason == "skipped by the recipe"
    assert [factorize.shown(found[f"{n}.weight"]) for n in ("conv", "wide")] == [
        "low rank, keeping 0.7 of the energy",
        "low rank, removing 0.5 of the weights",
    ]
    assert factorize.shown(Decision(layer="x", method="y", spec=Target(rank=3))) == "low rank, rank 3"
    default = factorize.plan(chain, Spec(), (), ground(chain))
    assert {d.spec for d in default} == {Target(energy=0.98)}


def test_decisions_survive_the_plan_file(chain: Model) -> None:
    spec = Spec(energy=0.9, skip=("head",), override={"conv": {"rank": 2}})
    for decision in factorize.plan(chain, spec, (), ground(chain)):
        plain = json.loads(json.dumps(factorize.describe(decision)))
        assert factorize.restore(decision.layer, plain) == decision
        assert len(plain) == 1


def test_two_runs_give_the_same_bytes(chain: Model) -> None:
    one, two = (applied(chain, Spec(energy=0.8)) for _ in range(2))
    assert one.layers == two.layers
    values = two.model.values()
    assert all(torch.equal(value, values[key]) for key, value in one.model.values().items())


def test_corrections_are_kept_where_held_out_data_agree(chain: Model) -> None:
    """As in the quantize step: the file that ships is no further from the original on data that nothing saw."""
    plain, result = applied(chain, Spec(rank=3, **PLAIN)), applied(chain, Spec(rank=3))
    assert [note.split()[:2] for note in result.notes] == [["bias", "correction"], ["normalization", "correction"]]
    held = data.split(images(), 0.125, 0)[1].batches[0]
    want = run(chain, held)
    assert rel(want, run(result.model, held)) < rel(want, run(plain.model, held))
    assert result.layers == plain.layers
    assert set(low_ranks(result.model)) == set(low_ranks(plain.model))


def test_finished_layers_are_kept(chain: Model) -> None:
    class Kept(dict[str, Weight]):
        def put(self, key: str, weight: Weight) -> None:
            self[key] = weight

    kept, spec = Kept(), Spec(rank=4, **PLAIN)
    decisions = factorize.plan(chain, spec, (), ground(chain))
    first = factorize.apply(chain, spec, decisions, images(), Hooks(cache=kept))
    assert set(kept) == set(low_ranks(first.model)) == {"conv.weight", "wide.weight", "head.weight"}
    again = factorize.apply(chain, spec, decisions, images(), Hooks(cache=kept))
    assert all(again.model.weights[name] is kept[name] for name in kept)
    assert again.layers == first.layers


def test_layers_that_see_nothing_stay_dense() -> None:
    module = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    with torch.no_grad():
        module[0].bias.fill_(-1e3)  # type: ignore[union-attr]
    model = from_module(module, [InputSpec(name="x", shape=("batch", 12))], Source(entry="n:n"))
    x = data.batches(torch.randn(9, 12, generator=torch.Generator().manual_seed(0)), model.inputs, 9)
    spec = Spec(rank=2, **PLAIN)
    decisions = factorize.plan(model, spec, (), Ground(graph=capture(model.module(), x.batches[0])))
    result = factorize.apply(model, spec, decisions, x, Hooks())
    assert set(low_ranks(result.model)) == {"0.weight"}
    assert result.notes == ("2 stays dense: its outputs are zero on the calibration data",)


# --- recipes


def step(text: str) -> Any:
    return recipes.parse(f"steps:\n  - factorize: {text}", "r.yaml").steps[0]


def test_a_recipe_says_what_a_step_holds() -> None:
    assert step("{}").spec == Spec()
    found = step("{ratio: 0.4, override: {'a*': {rank: 3}}}")
    assert found.spec == Spec(ratio=0.4, override={"a*": {"rank": 3}})
    override = "{a: {residual: {rank: 2, bits: 4}}, b: {residual: null}}"
    residual = recipes.parse(f"steps:\n  - quantize: {{bits: 2, residual: {{rank: 8}}, override: {override}}}")
    assert residual.steps[0].extras[0].format.residual == Residual(rank=8)
    assert recipes.parse(recipes.dump(residual)) == residual


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{energy: 1.5}", "r.yaml:2: energy=1.5 is out of range; use a part such as 0.98"),
        ("{ratio: 1.0}", "r.yaml:2: ratio=1.0 is out of range; use the part to remove, such as 0.3"),
        ("{rank: 0}", "r.yaml:2: rank=0 is out of range; use 1 or more"),
        ("{ranks: 3}", 'r.yaml:2: there is no key "ranks"; did you mean "rank"?'),
    ],
)
def test_a_wrong_recipe_names_its_line(text: str, error: str) -> None:
    with pytest.raises(RecipeError) as caught:
        step(text)
    assert str(caught.value) == error


def test_a_wrong_plan_says_what_to_change(chain: Model) -> None:
    cases: list[tuple[Spec, str]] = [
        (Spec(rank=3, energy=0.9), "energy and rank are given together; write one of energy, ratio and rank"),
        (Spec(override={"conv": {"skip": ()}}), 'skip cannot differ by layer (override "conv"); write it in the step'),
        (Spec(layers=("cnov",)), '"cnov" matches no layer; did you mean "conv"?'),
    ]
    for spec, text in cases:
        with pytest.raises(RecipeError) as caught:
            factorize.plan(chain, spec, (), ground(chain))
        assert str(caught.value) == text
    low = applied(chain, Spec(rank=2)).model
    with pytest.raises(RecipeError, match='layer "conv" is compressed already; factorize before other steps'):
        factorize.plan(low, Spec(rank=2), (), ground(low))


# --- quantize after it, and quantize with a residual


def test_quantize_takes_the_factors_of_a_low_rank(chain: Model) -> None:
    low = applied(chain, Spec(rank=4, layers=("wide", "conv"))).model
    spec = quantize.Spec(quantizer="lnq")
    options = lnq.Spec(format=Format(bits=4, feedback=True))
    decisions = quantize.plan(low, spec, (options,), ground(low))
    result = quantize.apply(low, spec, decisions, images(), Hooks())
    for name in ("wide.weight", "conv.weight"):
        weight = result.model.weights[name]
        assert isinstance(weight, LowRank)
        assert isinstance(weight.left, Codebook)
        assert isinstance(weight.right, Codebook)
    assert isinstance(result.model.weights["head.weight"], Codebook)
    assert rel(run(low, images().batches[0]), run(result.model, images().batches[0])) < 0.15
    with pytest.raises(RecipeError, match="is compressed already"):
        quantize.plan(result.model, spec, (options,), ground(result.model))


@functools.cache
def summed(name: str) -> Result:
    options = lnq.Spec(format=Format(bits=2, feedback=True, residual=Residual(rank=1, rounds=1)), rounds=1, cycles=1)
    return quantized(case(name).model, case(name).net, options, correct_bias=False, reestimate=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_takes_residuals(name: str, tmp_path: Path) -> None:
    """Every layer has a residual or a note that says why not; the file verifies."""
    result = summed(name)
    plain = {layer for layer, weight in result.model.weights.items() if not isinstance(weight, Sum | Dense)}
    told = {note.partition(" has no residual: ")[0] for note in result.notes}
    assert told == {layer.removesuffix(".weight") for layer in plain}
    assert exported(result.model, tmp_path / "net.onnx") == 2


def test_a_residual_is_planned_layer_by_layer(chain: Model) -> None:
    options = lnq.Spec(format=Format(bits=2, feedback=True, residual=Residual(rank=2)))
    spec = quantize.Spec(quantizer="lnq", override={"head": {"residual": None}, "conv": {"residual": {"rank": 1}}})
    decisions = quantize.plan(chain, spec, (options,), ground(chain))
    found = {d.layer: d for d in decisions}
    assert found["wide.weight"].spec.format.residual == Residual(rank=2)
    assert found["conv.weight"].spec.format.residual == Residual(rank=1)
    assert found["head.weight"].spec.format.residual is None
    assert quantize.shown(found["wide.weight"]) == "lnq, 2 bits + rank 2"
    assert "residual" not in quantize.describe(found["head.weight"])
    for decision in decisions:
        plain = json.loads(json.dumps(quantize.describe(decision)))
        assert quantize.restore(decision.layer, plain) == decision
    result = quantize.apply(chain, spec, decisions, images(), Hooks())
    assert isinstance(result.model.weights["wide.weight"], Sum)
    assert isinstance(result.model.weights["head.weight"], Codebook)


def test_the_report_knows_rank_bits_and_format(chain: Model) -> None:
    low = applied(chain, Spec(rank=4, layers=("wide",)))
    options = lnq.Spec(format=Format(bits=2, feedback=True, residual=Residual(rank=2)))
    decisions = quantize.plan(low.model, quantize.Spec(), (options,), ground(low.model))
    result = quantize.apply(low.model, quantize.Spec(), decisions, images(), Hooks())
    before = {row["name"]: row for row in summary.layer_rows(low.model, low.layers)}
    after = {row["name"]: row for row in summary.layer_rows(result.model, result.layers)}
    assert (before["wide.weight"]["rank"], before["wide.weight"]["bits"]) == (4, round(32 * 4 * 40 / 384, 1))
    assert (before["wide.weight"]["format"], before["wide.weight"]["mode"]) == ("rank 4", "dense")
    assert (before["head.weight"]["rank"], before["head.weight"]["bits"]) == (None, 32)
    # 2-bit factors: codes, a table of 4 bytes each, float16 scales
    wide = 2 * 4 * 40 + 2 * 32 + 16 * (24 + 4)
    assert after["wide.weight"]["bits"] == round(wide / 384, 1)
    assert after["wide.weight"]["mode"] is None  # no file says yet how it is computed
    head = 2 * 480 + 32 + 16 * 20 + 8 * 2 * 44 + 16 * 22
    assert (after["head.weight"]["rank"], after["head.weight"]["bits"]) == (2, round(head / 480, 1))
    assert after["head.weight"]["format"] == "codebook 2 + rank 2"
    assert after["head.weight"]["size_bytes"] == head // 8


# --- the command

STEPS = "  - quantize: {quantizer: kmeans, bits: 4}\n"


@pytest.mark.slow
def test_the_command_factorizes_then_quantizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project(tmp_path)
    low = "  - factorize: {rank: 3, layers: [conv2, linear]}\n"
    edit(folder / "recipe.yaml", STEPS, low + STEPS)
    outcome = optimize(monkeypatch, "run", folder / "recipe.yaml", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    layers = {row["name"]: row for row in report["layers"]}
    assert [layers[f"{name}.weight"]["rank"] for name in ("conv1", "conv2", "linear")] == [None, 3, 3]
    # conv2 36 positions of 8 x 9 columns, 16 rows; conv1 dense at 144
    assert report["final"]["macs"] == 144 * 8 * 27 + 36 * 3 * (72 + 16) + 3 * (16 + 10)
    assert report["final"]["macs"] < report["baseline"]["macs"]
    assert report["verify"]
    again = optimize(
        monkeypatch, "run", folder / "recipe.yaml", "--out", tmp_path / "again", "--plan", tmp_path / "out/plan.yaml"
    )
    assert again.code == 0, again.err
    for file in ("model.safetensors", "model.onnx", "plan.yaml"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert optimize(monkeypatch, "show", tmp_path / "out").code == 0
    assert optimize(monkeypatch, "verify", tmp_path / "out").code == 0


def test_the_other_order_is_an_error_that_names_layer_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project(tmp_path)
    edit(folder / "recipe.yaml", STEPS, STEPS + "  - factorize: {rank: 3, layers: [conv2]}\n")
    outcome = optimize(monkeypatch, "run", folder / "recipe.yaml", "--out", tmp_path / "out")
    assert outcome.code == 2
    (line,) = outcome.error
    assert 'recipe.yaml:6: layer "conv2" is compressed already by the step at ' in line
    assert line.endswith("recipe.yaml:5; put factorize before quantize")


@pytest.mark.slow
def test_the_command_adds_a_residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = project(tmp_path)
    edit(folder / "recipe.yaml", "bits: 4}", "bits: 2, residual: {rank: 2}, override: {linear: {residual: null}}}")
    outcome = optimize(monkeypatch, "run", folder / "recipe.yaml", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    layers = {row["name"]: row for row in json.loads((tmp_path / "out/report.json").read_text())["layers"]}
    assert layers["conv2.weight"]["format"] == "codebook 2 + rank 2"
    assert layers["linear.weight"]["format"] == "codebook 2"
    assert (layers["conv2.weight"]["rank"], layers["linear.weight"]["rank"]) == (2, None)
