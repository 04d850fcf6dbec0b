"""What intervals allow to conclude: layers and networks that fall back, the reasons, and a plan that needs no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paredown.optimizer import fallback, never_slower
from paredown.optimizer.errors import InfeasibleError
from paredown.optimizer.fallback import Settled
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.never_slower import Machine, Measured, Objective, Timing, Whole
from paredown.optimizer.planning import Planned
from paredown.optimizer.recipe import Step
from paredown.optimizer.steps import Decision
from paredown.optimizer.verdict import EQUAL_WITHIN
from paredown.optimizer.weight import Codebook

WEIGHTS = ("0.weight", "2.weight", "4.weight")


def timing(ratio: float, half: float = 0.01, condition: str = "batch 1, 1 thread") -> Timing:
    ci95 = None if half < 0 else (ratio - half, ratio + half)
    return Timing(condition=condition, before_us=100.0, after_us=100.0 * ratio, ratio=ratio, ci95=ci95)


def measured(ratio: float, *layers: str, half: float = 0.01, **more: Any) -> Measured:
    return Measured(layers=layers, timings=(timing(ratio, half),), **more)


OUTCOMES = [
    ([0.5], "size", "kept"),
    ([0.5], "latency", "kept"),
    ([1.0], "size", "kept"),
    ([1.0], "latency", "fallback"),
    ([1.2], "size", "fallback"),
    ([0.5, 1.2], "latency", "fallback"),
    ([0.5, 1.0], "latency", "kept"),
    ([0.985], "latency", "undecided"),
    ([1.025], "size", "undecided"),
]


@pytest.mark.parametrize(("ratios", "objective", "wanted"), OUTCOMES)
def test_an_outcome_follows_from_intervals(ratios: list[float], objective: Objective, wanted: str) -> None:
    assert never_slower.outcome([timing(ratio) for ratio in ratios], objective) == wanted


@given(st.lists(st.tuples(st.floats(0.1, 3), st.floats(-0.1, 0.5)), max_size=4), st.sampled_from(("latency", "size")))
def test_nothing_falls_back_within_an_interval(found: list[tuple[float, float]], objective: Objective) -> None:
    """What may be equal or faster under some condition, and is surely slower under none, stays for `size`."""
    timings = [timing(ratio, half) for ratio, half in found]
    known = [item.ci95 for item in timings if item.ci95 is not None]
    outcome = never_slower.outcome(timings, objective)
    if any(low > 1 + EQUAL_WITHIN for low, _ in known):
        assert outcome == "fallback"
    elif objective == "size" or len(known) < len(timings) or not timings:
        assert outcome != "fallback"
    else:
        assert (outcome == "fallback") == all(low > 1 - EQUAL_WITHIN for low, _ in known)
    if any(low <= 1 - EQUAL_WITHIN for low, _ in known) and outcome == "fallback":
        assert any(low > 1 + EQUAL_WITHIN for low, _ in known)


def test_the_reason_names_every_cause_with_its_numbers() -> None:
    layer = measured(
        1.3,
        "a.weight",
        decoded="its inputs are not rounded",
        shape=(10, 27),
        filled=(16, 32),
        operators=(1, 3),
        weight_bytes=1080,
        machine=Machine(node_us=80.0, read_gb_per_s=50.0),
    )
    reason = never_slower.why(layer, "size")
    for part in (
        "slower at batch 1, 1 thread: 1.30 times as long (1.29 to 1.31)",
        "decoded to floats when loaded: its inputs are not rounded",
        "fusion broken: 3 operators run instead of 1",
        "width not aligned: 10 x 27 is filled up to 16 x 32",
        "launch bound: the original takes 100.0 us, an operator that does nothing takes 80.0 us",
    ):
        assert part in reason
    slow = replace(layer, machine=Machine(node_us=1.0, read_gb_per_s=50.0))
    assert "not memory bound: the original reads its weights at 0.0 GB/s, this machine reads 50" in "; ".join(
        never_slower.causes(slow)
    )
    bare = measured(1.0, "a.weight", machine=Machine(node_us=1.0))
    assert never_slower.why(bare, "latency") == (
        "not faster at batch 1, 1 thread: 1.00 times as long (0.99 to 1.01); " + never_slower.UNEXPLAINED
    )


def test_what_is_kept_says_what_was_measured() -> None:
    assert (
        never_slower.kept_note(Measured(layers=("a",), alone="it is fused"), "size")
        == "not measured alone: it is fused"
    )
    assert never_slower.kept_note(measured(0.5, "a"), "size") == (
        "measured alone, 0.50 times as long (0.49 to 0.51) at batch 1, 1 thread"
    )
    assert never_slower.kept_note(measured(1.02, "a", half=-1), "size").startswith(
        "undecided, kept: measured alone, 1.02"
    )


@dataclass
class Clock:
    """Gives ratios by layer, and those of each candidate by the layers that it compresses."""

    ratios: dict[str, float]
    networks: Any
    asked: int = 0

    def layers(self, model: Model, names: Sequence[str]) -> list[Measured]:
        self.asked += 1
        return [measured(self.ratios[name], name) for name in names]

    def whole(self, candidates: Sequence[Model]) -> Whole:
        found = [float(self.networks(compressed_of(model))) for model in candidates]
        return Whole(
            candidates=tuple((timing(ratio),) for ratio in found), last_to_first=(timing(found[-1] / found[0]),)
        )


def compressed_of(model: Model) -> set[str]:
    return {name for name, weight in model.weights.items() if isinstance(weight, Codebook)}


def network() -> Model:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return from_module(module, (InputSpec(name="x", shape=("batch", 4)),), Source(entry="net.py:net"))


def planned_for(*layers: str) -> list[Planned]:
    decisions = tuple(Decision(layer=name, method="kmeans" if name in layers else "") for name in WEIGHTS)
    return [(Step(name="quantize", spec=None, where=""), decisions)]


def apply(planned: Sequence[Planned]) -> Model:
    book = Codebook(
        codes=torch.zeros(4, 4, dtype=torch.uint8),
        table=torch.zeros(1, 16, dtype=torch.int8),
        scale=torch.ones(4, 1),
        code_bits=4,
    )
    names = [decision.layer for decision in planned[0][1] if decision.method]
    return network().with_weights(dict.fromkeys(names, book))


def settle(clock: Clock, objective: Objective = "size") -> tuple[Settled, set[str]]:
    planned = planned_for(*WEIGHTS)
    settled = fallback.settle(planned, apply, clock, objective)
    return settled, compressed_of(apply(settled.plan(planned)))


def test_layers_that_do_not_pay_fall_back() -> None:
    clock = Clock(dict(zip(WEIGHTS, (0.5, 1.4, 0.9), strict=True)), lambda names: 0.5 + 0.3 * ("2.weight" in names))
    settled, left = settle(clock)
    assert left == {"0.weight", "4.weight"}
    assert settled.layers["2.weight"].startswith("slower at batch 1, 1 thread: 1.40 times")
    assert settled.notes["0.weight"].startswith("measured alone, 0.50 times")
    assert (settled.whole, settled.remark) == ("", "")


def test_fallbacks_that_make_the_network_slower_are_taken_back() -> None:
    clock = Clock(dict(zip(WEIGHTS, (0.5, 1.4, 0.9), strict=True)), lambda names: 1.0 - 0.2 * ("2.weight" in names))
    settled, left = settle(clock)
    assert left == set(WEIGHTS)
    assert "1 layers that do not pay alone stay" in settled.remark


def test_the_whole_network_falls_back() -> None:
    clock = Clock(dict.fromkeys(WEIGHTS, 0.9), lambda names: 1.3 if names else 1.0)
    settled, left = settle(clock)
    assert left == set()
    assert settled.whole.startswith("the whole network is slower at batch 1, 1 thread: 1.30 times as long")
    rows = settled.rows([{"layer": "0.weight", "kept": "dense", "reason": "planned"}])
    assert rows[-1] == {"layer": "*", "fallback": "the original", "reason": settled.whole}


def test_latency_wants_a_gain() -> None:
    clock = Clock(dict.fromkeys(WEIGHTS, 1.0), lambda names: 1.0)
    assert settle(clock, "size")[1] == set(WEIGHTS)
    assert settle(clock, "latency")[1] == set()


def test_layers_on_integer_grids_are_not_measured_alone() -> None:
    clock = Clock(dict.fromkeys(WEIGHTS, 2.0), lambda names: 0.4)
    model = replace(apply(planned_for(*WEIGHTS)), acts={"x": SimpleNamespace()})  # type: ignore[dict-item]
    settled = fallback.settle(planned_for(*WEIGHTS), lambda planned: model, clock, "latency")
    assert clock.asked == 0
    assert (settled.layers, settled.whole, settled.remark) == ({}, "", fallback.GRIDS)


def test_strict_refuses_what_would_fall_back() -> None:
    with pytest.raises(InfeasibleError, match=r'r\.yaml:9: layer "2" would stay dense: too slow'):
        fallback.check_strict(Settled(layers={"2.weight": "too slow"}, notes={}), "r.yaml:9")
    with pytest.raises(InfeasibleError, match="the whole network would fall back to the original; slower"):
        fallback.check_strict(Settled(layers={}, notes={}, whole="slower"), "r.yaml:9")
    fallback.check_strict(Settled(layers={}, notes={"2.weight": "fine"}), "r.yaml:9")
