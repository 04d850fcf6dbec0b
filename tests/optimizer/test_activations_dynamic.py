"""Dynamic int8 activations: the rounding, the layers that get it, and where a plan, a folder and errors tell of it."""

from __future__ import annotations

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

from paredown.optimizer import activations, activations_dynamic, entry, quantize, store
from paredown.optimizer.activations_dynamic import operators, round_inputs
from paredown.optimizer.codes import Format, Residual
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.graph import capture
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.steps import Decision, Ground, Hooks, Result
from paredown.optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

F32 = np.float32
TEXT = InputSpec(name="tokens", shape=("batch", "time"), dtype="int64")


class Mixed(nn.Module):
    """An embedding tied with the head, a convolution, a recurrent layer, linear layers, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.line = nn.Conv1d(16, 16, 3, padding=1)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.wide, self.back = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.line(x.mT).mT + self.gru(x)[0]
        x = x + self.back(torch.relu(self.wide(x)))
        y: Tensor = self.head(x + self.back(torch.sigmoid(self.wide(x))))
        return y


def numpy_round(x: npt.NDArray[np.float32], group: int) -> npt.NDArray[np.float32]:
    """Round one row as paredown.h words it, run after run in float32."""
    found, width = np.zeros_like(x), group or len(x)
    for first in range(0, len(x), width):
        last = min(first + width, len(x))
        for start in range(first, last, 128):
            run = x[start : min(start + 128, last)]
            largest = np.abs(run).max()
            if largest > 0:
                codes = np.rint(run * F32(F32(127) / largest))
                found[start : start + len(run)] = codes * F32(largest / F32(127))
    return found


@given(st.integers(1, 700), st.sampled_from((0, 1, 5, 32, 64, 128, 200, 256, 300)), st.integers(0, 2**31 - 1))
def test_rounding_is_that_of_the_kernels(k: int, group: int, seed: int) -> None:
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(seed))
    x[0, 0, : k // 2] = 0
    have = round_inputs(x, group).numpy()
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(have[place], numpy_round(x.numpy()[place], group))


@given(st.integers(1, 300), st.sampled_from((0, 7, 128)), st.integers(0, 2**31 - 1))
def test_rounding_is_idempotent_odd_and_scales(k: int, group: int, seed: int) -> None:
    x = torch.randn(4, k, generator=torch.Generator().manual_seed(seed))
    once = round_inputs(x, group)
    assert torch.allclose(round_inputs(once, group), once, rtol=1e-6, atol=0)
    assert torch.equal(round_inputs(-x, group), -once)
    assert torch.equal(round_inputs(4 * x, group), 4 * once)
    assert ((once - x).abs() <= x.abs().amax() / 254 * (1 + 1e-5)).all()


def test_the_operators_are_sound() -> None:
    x, y = torch.randn(2, 3, 40), torch.randn(2, 3, 8)
    torch.library.opcheck(operators()[0], (x, 32))
    torch.library.opcheck(operators()[1], (torch.randn(2, 3, 4, 5),))
    torch.library.opcheck(operators()[2], (y, x, x.round(), torch.randn(2, 40), torch.randn(8, 2)))
    assert round_inputs(x.half(), 0).dtype == torch.float16


def coded(matrix: Tensor, bits: int, group: int = 0) -> Codebook:
    """Return random codes of about the size of a matrix."""
    generator, (n, k) = torch.Generator().manual_seed(bits), matrix.shape
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    table = torch.randint(-127, 128, (1, 2**bits), generator=generator).to(torch.int8)
    scale = torch.full((n, math.ceil(k / group) if group else 1), float(matrix.std()))
    return Codebook(codes=codes, table=table, scale=scale, code_bits=bits, group=group)


def mixed(forms: dict[str, Weight] | None = None) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = from_module(Mixed(), (TEXT,), Source(entry="nets.py:net"))
    return model.with_weights(forms or {})


def linear_model(weight: Weight, bias: Tensor) -> Model:
    model = from_module(nn.Linear(weight.shape[1], weight.shape[0]), (rows(weight.shape[1]),), Source(entry="n:n"))
    return replace(model.with_weights({"weight": weight}).with_tensors({"bias": bias}), dynamic=frozenset({"weight"}))


def rows(k: int) -> InputSpec:
    return InputSpec(name="x", shape=("batch", k))


@pytest.mark.parametrize("group", [0, 50, 200])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_layer_multiplies_rounded_inputs_and_its_low_rank_sees_them_whole(group: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    base, bias = coded(torch.randn(30, 300, generator=generator), 4, group), torch.randn(30, generator=generator)
    left, right = torch.randn(30, 3, generator=generator), coded(torch.randn(3, 300, generator=generator), 2)
    low = LowRank(left=Dense(values=left), right=right)
    model = linear_model(Sum(terms=(base, low)) if rank else base, bias)
    x = torch.randn(5, 300, generator=generator)
    rounded = np.stack([numpy_round(row, group) for row in x.numpy()]).astype(np.float64)
    want = rounded @ base.dense().double().numpy().T + bias.double().numpy()
    if rank:
        want += x.double().numpy() @ right.dense().double().numpy().T @ left.double().numpy().T
    with torch.no_grad():
        have = model.module()(x).double().numpy()
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()
    with torch.no_grad():
        exact = replace(model, dynamic=frozenset()).module()(x).double().numpy()
    assert 1e-4 < np.abs(exact - want).max() / np.abs(want).max() < 2e-2


def test_the_module_keeps_names_and_free_sizes() -> None:
    model = mixed()
    wide = coded(model.weights["wide.weight"].dense(), 3)
    model = replace(model.with_weights({"wide.weight": wide}), dynamic=frozenset({"wide.weight"}))
    module, plain = model.module(), replace(model, dynamic=frozenset()).module()
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in plain.named_parameters()}
    for size in (1, 5):
        tokens = torch.arange(7 * size).reshape(size, 7) % 20
        have, want = module(tokens), plain(tokens)
        assert have.shape == want.shape
        assert 0 < (have - want).abs().max() < 0.05 * want.abs().max()
    graph = capture(module, (torch.zeros(2, 4, dtype=torch.long),))
    assert {site.param for sites in graph.sites.values() for site in sites} >= {"wide.weight", "table.weight"}


def planned(spec: quantize.Spec, made: Format, quantizer: str = "uniform") -> tuple[Model, tuple[Decision, ...]]:
    model = mixed()
    options = quantize.quantizer_module(quantizer).Spec(format=made)
    ground = Ground(graph=capture(model.module(), model.examples(2)))
    return model, quantize.plan(model, replace(spec, quantizer=quantizer), (options,), ground)


def applied(model: Model, spec: quantize.Spec, decisions: tuple[Decision, ...]) -> Result:
    generator = torch.Generator().manual_seed(0)
    batches = tuple((torch.randint(0, 20, (8, 6), generator=generator),) for _ in range(4))
    return quantize.apply(model, spec, decisions, Calibration(batches=batches, samples=32), Hooks())


DYNAMIC = quantize.Spec(quantizer="uniform", activations="dynamic")


def applied_float(model: Model, decisions: tuple[Decision, ...]) -> Result:
    return applied(model, replace(DYNAMIC, activations="float"), decisions)


def test_a_step_rounds_the_inputs_of_linear_layers_and_says_why_not_of_others() -> None:
    made = Format(bits=4, group=8, residual=Residual(rank=2))
    model, decisions = planned(DYNAMIC, made)
    asked = {decision.layer for decision in decisions if decision.activations == "dynamic"}
    assert asked == {"wide.weight", "back.weight", "table.weight"}
    result = applied(model, DYNAMIC, decisions)
    assert result.model.dynamic == asked
    assert [note for note in result.notes if "inputs" in note] == [
        "dynamic int8 activations: the inputs of 3 layers are rounded at run time",
        "inputs are not rounded: line (a convolution in 1 dimensions has no int8 kernel)",
        "inputs are not rounded: gru.weight_ih_l0, gru.weight_hh_l0 (recurrent operators have no int8 kernel)",
    ]
    exact = replace(result.model, dynamic=frozenset())
    model, decisions = planned(
        replace(DYNAMIC, activations="float"), Format(bits=4, group=8, residual=Residual(rank=2))
    )
    again = applied_float(model, decisions)
    for name, weight in again.model.weights.items():
        assert torch.equal(weight.dense(), exact.weights[name].dense()), name


def test_a_plan_names_the_layers_and_is_read_back() -> None:
    _, decisions = planned(DYNAMIC, Format(bits=4))
    for decision in decisions:
        data = quantize.describe(decision)
        assert (data.get("activations") == "dynamic") == (decision.activations == "dynamic")
        assert quantize.restore(decision.layer, data) == decision
    (wide,) = [decision for decision in decisions if decision.layer == "wide.weight"]
    assert quantize.shown(wide) == "uniform, 4 bits, inputs int8"
    with pytest.raises(RecipeError, match=r'^wide.weight: activations="int9" is not supported; use float or dynamic'):
        quantize.restore("wide.weight", {**quantize.describe(wide), "activations": "int9"})


def test_a_layer_that_the_plan_takes_out_stays_exact() -> None:
    model, decisions = planned(DYNAMIC, Format(bits=8))
    changed = tuple(replace(x, activations="float") if x.layer == "back.weight" else x for x in decisions)
    result = applied(model, DYNAMIC, changed)
    assert result.model.dynamic == {"wide.weight", "table.weight"}
    assert "inputs are not rounded: back (the plan says so)" in result.notes


def test_tables_of_floats_stay_exact() -> None:
    with pytest.raises(RecipeError, match=r"^activations: dynamic needs a layer of evenly spaced levels or int8"):
        planned(DYNAMIC, Format(bits=4, table="fp16"), "kmeans")
    model = mixed({"wide.weight": replace(coded(torch.randn(40, 16), 4), table=torch.randn(1, 16).half())})
    graph = capture(model.module(), model.examples(2))
    decision = Decision(layer="wide.weight", method="kmeans", activations="dynamic")
    changed, notes = activations_dynamic.apply(model, [decision], graph)
    assert changed.dynamic == frozenset()
    assert notes[1:] == ("inputs are not rounded: wide (int8 products need a table of bytes, this one is float16)",)


def test_static_and_dynamic_activations_do_not_mix() -> None:
    model = replace(mixed({"wide.weight": coded(torch.randn(40, 16), 4)}), dynamic=frozenset({"wide.weight"}))
    with pytest.raises(
        RecipeError, match=r"^activations: int8 does not go with activations: dynamic of an earlier step"
    ):
        activations.check_none(model, "int8")
    activations.check_none(model, "float")
    assert model.dynamic


def test_a_later_step_keeps_what_an_earlier_one_decided() -> None:
    model, decisions = planned(DYNAMIC, Format(bits=8))
    head = tuple(x if x.layer in ("wide.weight",) else Decision(layer=x.layer, reason="later") for x in decisions)
    first = applied(model, DYNAMIC, head).model
    rest = tuple(Decision(layer=x.layer, reason="done") if x.layer == "wide.weight" else x for x in decisions)
    second = applied_float(first, tuple(replace(x, activations="float") for x in rest)).model
    assert first.dynamic == second.dynamic == {"wide.weight"}
    assert isinstance(second.weights["back.weight"], Uniform)


def test_a_folder_keeps_the_layers_and_refuses_others(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(40, 30)\n")
    resolved = entry.resolve("nets.py:net", tmp_path)
    source = Source(entry="nets.py:net", files=resolved.files)
    weight = coded(torch.randn(30, 40), 3)
    dense = from_module(entry.build_module(resolved, {}), (rows(40),), source)
    model = replace(dense.with_weights({"weight": weight}), dynamic=frozenset({"weight"}))
    (tmp_path / "out").mkdir()
    store.save(model, tmp_path / "out")
    again = store.load(tmp_path / "out")
    assert again.dynamic == model.dynamic
    x = torch.randn(3, 40)
    assert torch.equal(again.module()(x), model.module()(x))
    file = tmp_path / "out" / "model.json"
    file.write_text(file.read_text().replace('"dynamic": [\n  "weight"\n ]', '"dynamic": [\n  "bias"\n ]'))
    with pytest.raises(InputError, match=r'"bias" cannot take inputs of int8'):
        store.load(tmp_path / "out")
    file.write_text(file.read_text().replace(' "dynamic": [\n  "bias"\n ],\n', ""))
    assert store.load(tmp_path / "out").dynamic == frozenset()
