"""Exact removal of columns against brute force: every cost is a measured one, every fit a least-squares one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paredown.optimizer import obs
from paredown.optimizer.errors import InputError
from paredown.optimizer.obs import Problem, eliminate, eliminate_jointly, energy, removal_costs, resolve

from ..strategies import SEEDS, random_stats, random_weight


def case(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    gram = random_stats(columns, seed).gram
    assert gram is not None
    return random_weight(rows, columns, seed).double(), gram[0]


def runs(columns: int, size: int) -> list[Tensor]:
    """Return units of `size` columns that lie apart: unit u has the columns u, u + step, ..."""
    step = columns // size
    return [torch.arange(u, step * size, step) for u in range(step)]


def cost(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """Return tr(D G D^T) by numpy."""
    delta = (new - weight).numpy()
    return float(np.einsum("oi,ij,oj->", delta, gram.numpy(), delta))


def best_fit(weight: Tensor, gram: Tensor, keep: Sequence[int]) -> Tensor:
    """Return the least-squares weights on the kept columns, zero elsewhere: a solve of another root of the gram."""
    values, vectors = np.linalg.eigh(gram.numpy())
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T  # root^T root = gram
    full = np.zeros(weight.shape)
    full[:, list(keep)] = np.linalg.lstsq(root[:, list(keep)], root @ weight.numpy().T, rcond=None)[0].T
    return torch.from_numpy(full)


def left(columns: int, units: Sequence[Tensor], gone: Sequence[int]) -> list[int]:
    dropped = {int(column) for unit in gone for column in units[unit]}
    return [column for column in range(columns) if column not in dropped]


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 3), rows=st.integers(1, 6), count=st.integers(0, 5))
def test_costs_are_measured_increases_and_weights_the_exact_fit(seed: int, size: int, rows: int, count: int) -> None:
    """OS-1: after every removal, the costs so far add up to the error of a fit that knows nothing of the sweep."""
    weight, gram = case(rows, 14, seed)
    units = runs(14, size)
    count = min(count, len(units))
    found = eliminate(weight, gram, units, count, damping=0.0)
    assert found.order.tolist() == list(dict.fromkeys(found.order.tolist()))
    for i in range(count):
        fit = best_fit(weight, gram, left(14, units, found.order[: i + 1].tolist()))
        measured = cost(weight, fit, gram)
        assert float(found.costs[: i + 1].sum()) == pytest.approx(
            measured, rel=1e-8, abs=1e-8 * energy_of(weight, gram)
        )
    fit = best_fit(weight, gram, left(14, units, found.order.tolist()))
    assert torch.allclose(found.weight, fit, rtol=1e-6, atol=1e-8 * float(weight.abs().max()))
    assert cost(weight, found.weight, gram) == pytest.approx(cost(weight, fit, gram), rel=1e-8, abs=1e-9)


def energy_of(weight: Tensor, gram: Tensor) -> float:
    return cost(weight, torch.zeros_like(weight), gram)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 2))
def test_each_removal_is_the_cheapest_there_is(seed: int, size: int) -> None:
    weight, gram = case(3, 8, seed)
    units = runs(8, size)
    found = eliminate(weight, gram, units, len(units) - 1, damping=0.0)
    gone: list[int] = []
    for unit, step in zip(found.order.tolist(), found.costs.tolist(), strict=True):
        before = cost(weight, best_fit(weight, gram, left(8, units, gone)), gram)
        trials = {
            u: cost(weight, best_fit(weight, gram, left(8, units, [*gone, u])), gram) - before
            for u in range(len(units))
            if u not in gone
        }
        slack = 1e-8 * energy_of(weight, gram)
        assert trials[unit] <= min(trials.values()) + slack
        assert step == pytest.approx(trials[unit], rel=1e-6, abs=slack)
        gone.append(unit)


def test_one_removal_is_the_best_of_all_sets_and_two_are_at_least_greedy() -> None:
    """On uncorrelated inputs greedy is optimal: the chosen set beats every other one."""
    weight, _ = case(4, 9, 3)
    gram = torch.diag(torch.linspace(0.2, 3.0, 9, dtype=torch.float64))
    units = runs(9, 1)
    found = eliminate(weight, gram, units, 4, damping=0.0)
    totals = {gone: cost(weight, best_fit(weight, gram, left(9, units, gone)), gram) for gone in choices(9, 4)}
    assert min(totals, key=lambda gone: totals[gone]) == tuple(sorted(found.order.tolist()))
    assert float(found.costs.sum()) == pytest.approx(min(totals.values()), rel=1e-10)
    assert found.costs.tolist() == sorted(found.costs.tolist())


def choices(columns: int, count: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(columns), count))


def test_units_alone_cost_what_their_removal_adds() -> None:
    weight, gram = case(5, 12, 1)
    units = runs(12, 3)
    alone = removal_costs(Problem(weight=weight, gram=gram, units=units), damping=0.0)
    for unit, value in enumerate(alone.tolist()):
        fit = best_fit(weight, gram, left(12, units, [unit]))
        assert value == pytest.approx(cost(weight, fit, gram), rel=1e-8)


def test_leaving_columns_out_without_making_up_for_them_is_worse() -> None:
    weight, gram = case(6, 20, 2)
    units = runs(20, 2)
    found = eliminate(weight, gram, units, 4, damping=0.0)
    zeroed = weight.clone()
    zeroed[:, [c for c in range(20) if c not in left(20, units, found.order.tolist())]] = 0.0
    assert cost(weight, zeroed, gram) > 1.15 * cost(weight, found.weight, gram)


def test_damping_is_a_ridge_that_holds_to_the_weights() -> None:
    """The damped problem is the plain one of a gram with the ridge added: stationary, and exact in cost."""
    weight, gram = case(4, 10, 5)
    units = runs(10, 2)
    ridged = gram + 0.1 * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    found, plain = eliminate(weight, gram, units, 3, 0.1), eliminate(weight, ridged, units, 3, 0.0)
    assert found.order.tolist() == plain.order.tolist()
    assert torch.allclose(found.costs, plain.costs, rtol=1e-10)
    assert torch.allclose(found.weight, best_fit(weight, ridged, left(10, units, found.order.tolist())))
    assert torch.allclose(resolve(weight, gram, torch.arange(10), damping=0.1), weight)


def test_everything_may_go_and_nothing() -> None:
    weight, gram = case(4, 10, 6)
    units = runs(10, 2)
    everything = eliminate(weight, gram, units, 5, damping=0.0)
    assert torch.equal(everything.weight, torch.zeros(4, 10, dtype=torch.float64))
    assert float(everything.costs.sum()) == pytest.approx(energy_of(weight, gram), rel=1e-9)
    assert float(everything.costs.sum()) == pytest.approx(float(energy(weight, gram, 0.0)), rel=1e-9)
    nothing = eliminate(weight, gram, units, 0)
    assert torch.allclose(nothing.weight, weight, rtol=1e-9)
    assert len(nothing.order) == len(nothing.costs) == 0


def test_columns_of_no_unit_stay() -> None:
    weight, gram = case(4, 10, 7)
    units = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([5])]
    found = eliminate(weight, gram, units, 3, damping=0.0)
    assert int(found.order[0]) == 1
    assert float(found.costs[0]) == 0.0
    assert (found.weight == 0).all(0).tolist() == [column in (1, 2, 5) for column in range(10)]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_singular_grams(damping: float) -> None:
    """Fewer rows than columns, dead channels, twins: a twin goes first, for nothing; its brother takes its weight."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=rng, dtype=torch.float64)
    x[:, 3] = 0.0
    x[:, 8] = x[:, 2]
    weight = torch.randn(5, 16, generator=rng, dtype=torch.float64)
    gram = x.T @ x
    found = eliminate(weight, gram, runs(16, 1), 12, damping)
    assert torch.isfinite(found.weight).all()
    assert (found.costs >= 0).all()
    assert int(found.order[0]) == 3
    measured = cost(weight, found.weight, gram)
    assert measured <= float(found.costs.sum()) * (1 + 1e-9)
    fit = cost(weight, best_fit(weight, gram, left(16, runs(16, 1), found.order.tolist())), gram)
    assert measured <= fit * (1 + 20 * damping) + 1e-6 * energy_of(weight, gram)
    twin = eliminate(weight[:, [2, 8]], gram[[2, 8]][:, [2, 8]], runs(2, 1), 1, 0.0)
    kept = 1 - int(twin.order[0])
    assert torch.allclose(twin.weight[:, kept], weight[:, [2, 8]].sum(1), rtol=1e-4)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("twins", [True, False])
def test_columns_that_follow_from_others_up_to_rounding(size: int, twins: bool) -> None:
    """A gram that factorizes by luck, with pivots of rounding errors, is damped like one that does not."""
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        x, some = torch.randn(30, 12, generator=rng, dtype=torch.float64), 1 + seed % 5
        mix = torch.randn(12 - some, some, generator=rng, dtype=torch.float64)
        x[:, 12 - some :] = x[:, :some] * (1 + seed % 3 * 1e-9) if twins else x[:, : 12 - some] @ mix
        weight, gram = torch.randn(4, 12, generator=rng, dtype=torch.float64), x.T @ x
        found = eliminate(weight, gram, runs(12, size), 12 // size - 1, damping=0.0)
        fit = best_fit(weight, gram, left(12, runs(12, size), found.order.tolist()))
        measured, slack = cost(weight, found.weight, gram), 1e-6 * energy_of(weight, gram)
        assert measured == pytest.approx(cost(weight, fit, gram), abs=slack)
        assert float(found.costs.sum()) == pytest.approx(measured, abs=slack)


def test_an_empty_gram_keeps_the_weights() -> None:
    weight, gram = random_weight(3, 6, 0).double(), torch.zeros(6, 6, dtype=torch.float64)
    found = eliminate(weight, gram, runs(6, 1), 2)
    assert torch.equal(found.weight[:, found.weight.any(0)], weight[:, found.weight.any(0)])
    assert torch.allclose(found.costs, weight.square().sum(0).sort().values[:2])


def test_several_readers_share_one_choice() -> None:
    """Costs add up, each by its scale; every reader is fitted on its own inputs."""
    (first, one), (second, two) = case(4, 12, 8), case(7, 9, 9)
    wide, narrow = runs(12, 4), [torch.tensor([4 + u]) for u in range(3)]
    readers = [Problem(weight=first, gram=one, units=wide), Problem(weight=second, gram=two, units=narrow, scale=30.0)]
    found = eliminate_jointly(readers, 2, damping=0.0)
    gone: list[int] = []
    total = 0.0
    for unit, step in zip(found.order.tolist(), found.costs.tolist(), strict=True):
        gone.append(unit)
        fits = [best_fit(first, one, left(12, wide, gone)), best_fit(second, two, left(9, narrow, gone))]
        measured = cost(first, fits[0], one) + 30.0 * cost(second, fits[1], two)
        assert step == pytest.approx(measured - total, rel=1e-8)
        total = measured
    alone = sum(removal_costs(reader, 0.0) for reader in readers)
    assert int(found.order[0]) == int(torch.as_tensor(alone).argmin())
    for weight, fit in zip(found.weights, fits, strict=True):
        assert torch.allclose(weight, fit, rtol=1e-6, atol=1e-9)


def test_sweeps_of_several_keep_costs_exact_and_see_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty pairs of twins: one of each pair goes for nothing, and no pair loses both."""
    monkeypatch.setattr(obs, "SWEEPS", 16)
    rng = torch.Generator().manual_seed(1)
    half = torch.randn(300, 40, generator=rng, dtype=torch.float64)
    x = torch.cat([half, half + 1e-3 * torch.randn(300, 40, generator=rng, dtype=torch.float64)], dim=1)
    weight, gram = torch.randn(6, 80, generator=rng, dtype=torch.float64), x.T @ x
    found = eliminate(weight, gram, runs(80, 1), 40, damping=0.0)
    assert len({unit % 40 for unit in found.order.tolist()}) == 40
    fit = best_fit(weight, gram, left(80, runs(80, 1), found.order.tolist()))
    assert float(found.costs.sum()) == pytest.approx(cost(weight, fit, gram), rel=1e-6)
    monkeypatch.setattr(obs, "SWEEPS", 512)
    greedy = eliminate(weight, gram, runs(80, 1), 40, damping=0.0)
    assert float(found.costs.sum()) <= 1.2 * float(greedy.costs.sum())


def test_costs_stay_exact_on_an_ill_conditioned_gram() -> None:
    """Inputs over eight orders of magnitude: the sum of the costs is still the error of the final fit."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(400, 60, generator=rng, dtype=torch.float64) @ torch.randn(60, 60, generator=rng).double()
    x = x * torch.logspace(-4, 4, 60, dtype=torch.float64)
    weight, gram = torch.randn(3, 60, generator=rng, dtype=torch.float64), x.T @ x
    found = eliminate(weight, gram, runs(60, 2), 24, damping=0.0)
    assert float(found.costs.sum()) == pytest.approx(cost(weight, found.weight, gram), rel=1e-6)


def test_cross_moments_fit_the_outputs_of_the_network_before() -> None:
    """Outputs come from x, inputs are now z: the fit to rows of both, with a ridge that holds to W."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(200, 10, generator=rng, dtype=torch.float64)
    z = x + 0.3 * torch.randn(200, 10, generator=rng, dtype=torch.float64)
    weight, keep = torch.randn(4, 10, generator=rng, dtype=torch.float64), torch.tensor([0, 2, 3, 7])
    found = resolve(weight, z.T @ z, keep, cross=weight @ x.T @ z, damping=0.0)
    wanted = np.linalg.lstsq(z[:, keep].numpy(), (x @ weight.T).numpy(), rcond=None)[0].T
    assert np.allclose(found.numpy(), wanted, rtol=1e-9)
    strong = resolve(weight, z.T @ z, keep, cross=weight @ x.T @ z, damping=1e9)
    assert torch.allclose(strong, weight[:, keep], rtol=1e-6, atol=1e-7)
    plain = resolve(weight, z.T @ z, keep, damping=0.0)
    assert torch.allclose(plain, resolve(weight, z.T @ z, keep, cross=weight @ z.T @ z, damping=0.0))


def test_wrong_counts_and_statistics_are_refused() -> None:
    weight, gram = case(3, 6, 0)
    with pytest.raises(InputError) as caught:
        eliminate(weight, gram, runs(6, 1), 7)
    assert str(caught.value) == "7 of 6 units cannot be removed"
    with pytest.raises(InputError) as caught:
        eliminate(weight, gram * torch.nan, runs(6, 1), 1)
    assert str(caught.value) == "the statistics of its inputs are not finite; look for overflow in the network"


def test_twice_the_same_bytes() -> None:
    weight, gram = case(8, 36, 4)
    one, two = (eliminate(weight, gram, runs(36, 9), 2) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.costs, two.costs)
