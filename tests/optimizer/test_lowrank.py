"""Whitened SVD against numpy, and quantization with low ranks against least squares written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paredown.optimizer import lowrank, residual
from paredown.optimizer.codes import Format, Residual
from paredown.optimizer.errors import RecipeError
from paredown.optimizer.quantizers import lnq, nf
from paredown.optimizer.stats import LayerStats
from paredown.optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

from ..strategies import SEEDS, layers, output_error, random_stats, random_weight

TALL_AND_WIDE = pytest.mark.parametrize(("rows", "columns"), [(12, 30), (30, 12), (16, 16), (1, 9), (9, 1)])


def inputs(columns: int, seed: int, samples: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, columns)) @ rng.normal(size=(columns, columns)) * (0.1 + rng.random(columns))


@TALL_AND_WIDE
def test_the_error_of_each_rank_is_its_discarded_singular_values(rows: int, columns: int) -> None:
    """The reference: numpy's SVD of W R^T with the R of a QR of X, and outputs multiplied out."""
    x, weight = inputs(columns, seed=1), random_weight(rows, columns, seed=2)
    w = weight.double().numpy()
    values = np.linalg.svd(w @ np.linalg.qr(x)[1].T, compute_uv=False)
    found = lowrank.spectrum(weight, torch.from_numpy(x.T @ x))
    total = float((values**2).sum())
    np.testing.assert_allclose(found.energies.numpy(), values**2, rtol=1e-9, atol=1e-12 * total)
    for rank in range(1, len(values) + 1):
        left, right = (factor.numpy() for factor in found.factors(rank))
        measured = float(((x @ (left @ right - w).T) ** 2).sum())
        discarded = float((values[rank:] ** 2).sum())
        assert measured == pytest.approx(discarded, rel=1e-9, abs=1e-12 * total)
        assert found.loss(rank) == pytest.approx(discarded, rel=1e-9, abs=1e-12 * total)


@TALL_AND_WIDE
def test_it_equals_the_formula_with_the_inverse(rows: int, columns: int) -> None:
    x, weight = inputs(columns, seed=3), random_weight(rows, columns, seed=4)
    whitening = np.linalg.cholesky(x.T @ x)
    u, s, vt = np.linalg.svd(weight.double().numpy() @ whitening, full_matrices=False)
    for rank in range(1, len(s) + 1):
        want = np.linalg.solve(whitening.T, (u[:, :rank] * s[:rank] @ vt[:rank]).T).T
        left, right = lowrank.spectrum(weight, torch.from_numpy(x.T @ x)).factors(rank)
        np.testing.assert_allclose((left @ right).numpy(), want, rtol=0, atol=1e-8 * np.abs(want).max())


@TALL_AND_WIDE
@pytest.mark.parametrize("seen", [0, 3, 400])
def test_full_rank_reproduces_the_weight(rows: int, columns: int, seen: int) -> None:
    """Also where few inputs or none were seen, or a feature is always zero: no direction is lost."""
    x, weight = inputs(columns, seed=5, samples=seen), random_weight(rows, columns, seed=6)
    x[:, columns // 2] = 0
    left, right = lowrank.spectrum(weight, torch.from_numpy(x.T @ x)).factors(min(rows, columns))
    torch.testing.assert_close(left @ right, weight.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(left.T @ left, torch.eye(min(rows, columns), dtype=torch.float64), rtol=0, atol=1e-10)


@given(layers(low=2), st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6))
@settings(deadline=None, max_examples=40)
def test_the_energy_rule_is_the_least_rank_and_monotone(layer: tuple[Tensor, LayerStats], parts: list[float]) -> None:
    weight, stats = layer
    assert stats.gram is not None
    found = lowrank.spectrum(weight, stats.gram[0])
    ranks = [found.rank_of_energy(part) for part in sorted(parts)]
    assert ranks == sorted(ranks)
    for part, rank in zip(sorted(parts), ranks, strict=True):
        assert 1 <= rank <= min(weight.shape)
        assert found.loss(rank) <= (1 - part + 1e-9) * found.total
        assert rank == 1 or found.loss(rank - 1) > (1 - part - 1e-9) * found.total


def test_the_energy_rule_on_a_spectrum_by_hand() -> None:
    found = lowrank.spectrum(torch.diag(torch.tensor([2.0, 1.0, 3.0])), torch.eye(3, dtype=torch.float64))
    assert found.energies.tolist() == [9, 4, 1]
    assert [found.rank_of_energy(part) for part in (0.5, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)] == [1, 1, 2, 2, 3, 3]


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 0.99))
def test_break_even_and_ratio_count_weights(rows: int, columns: int, removed: float) -> None:
    most, rank = lowrank.break_even(rows, columns), lowrank.rank_of_ratio(rows, columns, removed)
    assert most * (rows + columns) < rows * columns <= (most + 1) * (rows + columns)
    assert rank * (rows + columns) <= (1 - removed) * rows * columns * (1 + 1e-9)
    assert (rank + 1) * (rows + columns) > (1 - removed) * rows * columns * (1 - 1e-9)


@given(layers(low=3, high=16), st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_the_refitted_left_factor_is_least_squares(layer: tuple[Tensor, LayerStats], rank: int) -> None:
    weight, stats = layer
    assert stats.gram is not None
    x = np.linalg.cholesky(stats.gram[0].numpy()).T
    right = weight.double()[:rank] + 0.1
    want = np.linalg.lstsq(x @ right.numpy().T, x @ weight.double().numpy().T, rcond=None)[0].T
    have = lowrank.refit_left(weight, right, stats.gram[0]).numpy()
    error, least = (float(((x @ (left @ right.numpy() - weight.numpy()).T) ** 2).sum()) for left in (have, want))
    assert error == pytest.approx(least, rel=1e-6, abs=1e-9 * float(((x @ weight.double().numpy().T) ** 2).sum()))


# --- quantized low ranks


def quantizer(bits: int) -> residual.Quantize:
    def quantize(matrix: Tensor, stats: LayerStats) -> Weight:
        spec = lnq.Spec(format=Format(bits=bits, feedback=stats.gram is not None), rounds=1, cycles=1)
        return lnq.quantize(matrix, stats, spec)

    return quantize


def low_rank(rows: int, columns: int, rank: int, seed: int) -> LowRank:
    left, right = lowrank.spectrum(random_weight(rows, columns, seed)).factors(rank)
    return LowRank(left=Dense(values=left.float()), right=Dense(values=right.float()))


@pytest.mark.parametrize("bits", [2, 4])
def test_factors_are_quantized_each_on_what_it_sees(bits: int) -> None:
    """The error of the product is that of the best left factor plus that of rounding it: Pythagoras, written out."""
    weight, stats = low_rank(24, 40, 9, seed=1), random_stats(40, seed=2)
    assert stats.gram is not None
    found = residual.factors(weight, stats, quantizer(bits))
    assert isinstance(found.left, Codebook)
    assert isinstance(found.right, Codebook)
    right, gram, w = found.right.dense().double().numpy(), stats.gram[0].numpy(), weight.dense().double().numpy()
    best = w @ gram @ right.T @ np.linalg.pinv(right @ gram @ right.T)
    rounding = found.left.dense().double().numpy() - best
    parts = np.trace((best @ right - w) @ gram @ (best @ right - w).T)
    parts += np.trace(rounding @ right @ gram @ right.T @ rounding.T)
    exact = output_error(found.left.dense().double() @ found.right.dense().double(), weight.dense(), stats)
    assert exact == pytest.approx(float(parts), rel=1e-6)
    kept = quantizer(bits)(weight.left.dense(), LayerStats(rows=1, gram=torch.from_numpy(right @ gram @ right.T)[None]))
    assert exact <= 1.02 * output_error(kept.dense().double() @ found.right.dense().double(), weight.dense(), stats)


def test_eight_bit_factors_keep_the_product() -> None:
    weight, stats = low_rank(30, 20, 5, seed=3), random_stats(20, seed=4)
    found = residual.factors(weight, stats, quantizer(8))
    assert (
        output_error(found.dense(), weight.dense(), stats) / output_error(0 * weight.dense(), weight.dense(), stats)
    ) < 1e-4


@given(SEEDS, st.integers(1, 6), st.sampled_from([(20, 30), (30, 20)]))
@settings(deadline=None, max_examples=10)
def test_a_residual_never_raises_the_error(seed: int, rank: int, shape: tuple[int, int]) -> None:
    matrix, stats = random_weight(*shape, seed), random_stats(shape[1], seed)
    plain = quantizer(2)(matrix, stats)
    found = residual.with_residual(matrix, stats, Residual(rank=rank), quantizer(2), plain)
    assert output_error(found.dense(), matrix, stats) <= output_error(plain.dense(), matrix, stats) * (1 + 1e-6)


def test_a_residual_is_the_whitened_svd_of_what_quantization_lost() -> None:
    """One round, against numpy: the part of the error that 8 bits in the factors add is small."""
    matrix, stats = random_weight(24, 36, seed=5), random_stats(36, seed=6)
    assert stats.gram is not None
    plain = quantizer(2)(matrix, stats)
    found = residual.with_residual(matrix, stats, Residual(rank=5, rounds=1), quantizer(2), plain)
    assert isinstance(found, Sum)
    base, low = found.terms
    assert torch.equal(base.dense(), plain.dense())
    assert isinstance(low, LowRank)
    assert isinstance(low.left, Uniform)
    assert isinstance(low.right, Uniform)
    assert (low.left.code_bits, low.right.code_bits, low.left.shape, low.right.shape) == (8, 8, (24, 5), (5, 36))
    lost = (matrix - plain.dense()).double().numpy()
    values = np.linalg.svd(lost @ np.linalg.cholesky(stats.gram[0].numpy()), compute_uv=False) ** 2
    error = output_error(found.dense(), matrix, stats)
    assert values[5:].sum() * (1 - 1e-6) <= error <= values[5:].sum() + 2e-4 * values.sum()


def test_more_rounds_and_more_rank_lower_the_error() -> None:
    matrix, stats = random_weight(40, 48, seed=7, heavy=True), random_stats(48, seed=8)
    plain = quantizer(2)(matrix, stats)

    def error(rank: int, rounds: int) -> float:
        spec = Residual(rank=rank, rounds=rounds)
        return output_error(residual.with_residual(matrix, stats, spec, quantizer(2), plain).dense(), matrix, stats)

    by_rounds = [error(4, rounds) for rounds in (1, 2, 4, 6)]
    assert by_rounds == sorted(by_rounds, reverse=True)
    assert by_rounds[-1] < by_rounds[0]
    by_rank = [error(rank, 1) for rank in (1, 4, 8, 16)]
    assert by_rank == sorted(by_rank, reverse=True)


def test_where_no_residual_can_be() -> None:
    spec, plenty = Residual(rank=2), Residual(rank=30)
    matrix, stats = Dense(values=random_weight(20, 30, seed=9)), random_stats(30, seed=10)
    for old, seen, asked, reason in [
        (low_rank(20, 30, 4, seed=1), stats, spec, "it is a low rank already"),
        (
            matrix,
            random_stats(30, seed=1, groups=2),
            spec,
            "its rows have inputs of their own, which no one low rank serves",
        ),
        (Dense(values=matrix.values.half()), stats, plenty, "with it the layer takes as much as its floats"),
    ]:
        found = residual.solve(old, seen, asked, quantizer(4))
        assert not isinstance(found, Sum)
        assert residual.lacking(found, old, seen, asked) == reason
    exact = Dense(values=torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]).repeat(4, 4))
    found = residual.solve(exact, random_stats(12, seed=2), Residual(rank=1), quantizer(4))
    assert isinstance(found, Codebook)
    assert residual.lacking(found, exact, stats, Residual(rank=1)) == "the output error is no smaller with it"
    assert residual.lacking(found, exact, stats, None) == ""


def test_without_inputs_every_weight_counts_alike() -> None:
    """An embedding has no gram; plain SVD, and a quantizer that needs none."""
    matrix, stats = random_weight(40, 16, seed=11), LayerStats(rows=9, row_counts=torch.ones(40, dtype=torch.float64))

    def quantize(values: Tensor, seen: LayerStats) -> Weight:
        return nf.quantize(values, seen, nf.Spec(format=Format(bits=2)))

    found = residual.solve(Dense(values=matrix), stats, Residual(rank=4, rounds=1), quantize)
    assert isinstance(found, Sum)
    lost = (matrix - quantize(matrix, stats).dense()).double().numpy()
    values = np.linalg.svd(lost, compute_uv=False) ** 2
    error = float((found.dense() - matrix).double().square().sum())
    assert values[4:].sum() * (1 - 1e-6) <= error <= values[4:].sum() + 2e-4 * values.sum()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rank": 0}, "rank=0, rounds=6 is out of range; use 1 or more of each"),
        ({"rank": 4, "rounds": 0}, "rank=4, rounds=0 is out of range; use 1 or more of each"),
        ({"rank": 4, "bits": 7}, "bits=7 is not supported; use 2, 3, 4 or 8"),
    ],
)
def test_a_wrong_residual_is_refused(fields: dict[str, int], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Residual(**fields)
    assert str(caught.value) == text
