"""Rounding, nearest codes, error feedback and one-dimensional k-means against slow references."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paredown.optimizer.clusters import histogram, lloyd, merge, optimal
from paredown.optimizer.codes import Format, Grid, count_below, damp, prepare, round_scale, round_table, table_levels
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.feedback import assign, feedback, row_losses
from paredown.optimizer.stats import LayerStats

from ..strategies import SEEDS, formats, layers, output_error, random_stats, random_weight

FAST = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bits": 5}, "bits=5 is not supported; use 2, 3, 4 or 8"),
        ({"bits": 4, "group": -1}, "group=-1 is negative; use 0 (one scale per row) or inputs per scale"),
        ({"bits": 4, "table": "fp8"}, 'table="fp8" is not supported; use "int8" or "fp16"'),
        (
            {"bits": 4, "table_rows": 8},
            "table_rows=8 is not supported; use 0 (one table per tensor) or 16 (one per 16 rows)",
        ),
        ({"bits": 4, "damping": -0.1}, "damping=-0.1 is out of range; use a fraction such as 0.01"),
    ],
)
def test_format_says_what_is_wrong(fields: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError) as error:
        Format(**fields)  # type: ignore[arg-type]
    assert str(error.value) == text


def test_prepare_says_what_is_wrong() -> None:
    weight = torch.ones(4, 6)
    with pytest.raises(RecipeError, match="feedback needs calibration data, and this layer has none; give data:"):
        prepare(weight, LayerStats(rows=0), Format(bits=4, feedback=True))
    with pytest.raises(InputError, match=r"gram \(1, 5, 5\) does not belong to a weight of shape \(4, 6\)"):
        prepare(weight, random_stats(5, 0), Format(bits=4))
    with pytest.raises(InputError, match="weight has 1 values that are not finite"):
        prepare(weight.index_fill(1, torch.tensor([0]), torch.nan)[:1], None, Format(bits=4))
    with pytest.raises(InputError, match=r"weight of shape \(0, 6\) cannot be quantized; keep it dense"):
        prepare(weight[:0], None, Format(bits=4))


def test_scales_are_fp16_unless_one_leaves_its_normal_range() -> None:
    scale = torch.tensor([[1.0], [2.0**-14], [-65504.0], [0.0]], dtype=torch.float64)
    assert round_scale(scale).dtype == torch.float16
    assert torch.equal(round_scale(scale * 1.1).double()[0], torch.tensor([1.1]).half().double())
    for factor in (0.9, 1.1):
        stored = round_scale(scale * factor)
        assert stored.dtype == torch.float32
        assert torch.equal(stored[:2].double(), (scale * factor)[:2].mul(4).half().double() / 4)


def test_int8_table_hits_even_steps_exactly() -> None:
    levels = (torch.arange(16, dtype=torch.float64) - 8)[None] / 8
    table, factor = round_table(levels, "int8")
    assert torch.equal(table, ((torch.arange(16) - 8) * 15).to(torch.int8)[None])
    torch.testing.assert_close(table_levels(table) * factor, levels, rtol=1e-7, atol=0)


@FAST
@given(SEEDS, st.sampled_from(["int8", "fp16"]))
def test_table_rounding_error_is_bounded(seed: int, kind: str) -> None:
    levels = random_weight(3, 16, seed).double().sort(1).values
    table, factor = round_table(levels, kind)  # type: ignore[arg-type]
    height = levels.abs().amax(1, keepdim=True)
    bound = height * (0.5 / 96 if kind == "int8" else 2.0**-11)
    assert bool(((table_levels(table) * factor[:, None] - levels).abs() <= bound * 1.001).all())
    assert bool((table.diff(dim=1) >= 0).all())


@FAST
@given(SEEDS, st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 5]))
def test_count_below_is_a_binary_search(seed: int, bits: int, tables: int) -> None:
    values = random_weight(5, 30, seed).double()
    edges = random_weight(tables, 2**bits - 1, seed + 1).double().sort(1).values
    values[:, 0] = edges[:, 1]  # a value on an edge takes the lower code
    expected = [np.searchsorted(edges[r % tables].numpy(), values[r].numpy()) for r in range(5)]
    assert np.array_equal(count_below(values, edges).numpy(), np.stack(expected))


@FAST
@given(layers(), formats(feedback=False))
def test_nearest_is_nearest(layer: tuple[Tensor, LayerStats], spec: Format) -> None:
    weight, grid = layer[0].double(), _random_grid(layer[0], spec)
    codes = grid.nearest(weight)
    least = torch.stack([(grid.values(torch.full_like(codes, c)) - weight).abs() for c in range(spec.levels)]).amin(0)
    torch.testing.assert_close((grid.values(codes) - weight).abs(), least, rtol=0, atol=1e-12)


@FAST
@given(layers(), formats(feedback=True))
def test_feedback_without_correlation_is_nearest_bit_for_bit(layer: tuple[Tensor, LayerStats], spec: Format) -> None:
    weight, _ = layer
    stats = LayerStats(rows=8, gram=3.0 * torch.eye(weight.shape[1], dtype=torch.float64)[None])
    job, grid = prepare(weight, stats, spec), _random_grid(weight, spec)
    assert torch.equal(feedback(job, grid), grid.nearest(job.weight))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("columns", "groups", "group", "table_rows"), [(150, 1, 0, 0), (40, 2, 16, 0), (30, 4, 0, 16)])
def test_feedback_equals_obq_row_by_row(
    columns: int, groups: int, group: int, table_rows: int, act_order: bool
) -> None:
    spec = Format(bits=3, group=group, table_rows=table_rows, feedback=True, act_order=act_order)
    rows = 4 if columns > 128 else 20
    weight, stats = random_weight(rows, columns, 1), random_stats(columns, 2, groups=groups)
    job, grid = prepare(weight, stats, spec), _random_grid(weight, spec)
    codes = feedback(job, grid)
    for row in range(rows):
        assert stats.gram is not None
        gram = stats.gram[row // (rows // groups)]
        levels = grid.levels[int(grid.blocks()[row])]
        values = levels[None] * grid.expanded_scale(columns)[row][:, None]
        expected = _obq(job.weight[row].numpy(), gram.numpy(), values.numpy(), spec)
        assert np.array_equal(codes[row].numpy(), expected)


@FAST
@given(layers(low=2), formats(bits=(2, 3, 4), feedback=True))
def test_feedback_never_loses_to_nearest_on_the_calibration_set(layer: tuple[Tensor, LayerStats], spec: Format) -> None:
    weight, stats = layer
    job, grid = prepare(weight, stats, spec), _random_grid(weight, spec)
    assert job.gram is not None
    fed, near = (grid.values(codes) - job.weight for codes in (assign(job, grid), grid.nearest(job.weight)))
    assert bool((row_losses(fed, job.gram) <= row_losses(near, job.gram) + 1e-12).all())


def test_feedback_survives_a_singular_gram_and_dead_inputs() -> None:
    weight = random_weight(6, 24, 3)
    stats = random_stats(24, 3, samples=5)
    assert stats.gram is not None
    gram = stats.gram.clone()
    gram[:, 7], gram[:, :, 7] = 0, 0
    for spec in (Format(bits=3, feedback=True, damping=0.0), Format(bits=3, feedback=True)):
        for part in (gram, gram * 0):
            job, grid = prepare(weight, LayerStats(rows=5, gram=part), spec), _random_grid(weight, spec)
            codes = assign(job, grid)
            assert torch.equal(codes[:, 7], grid.nearest(job.weight)[:, 7])
            assert output_error(grid.values(codes), weight, LayerStats(rows=5, gram=part)) <= output_error(
                grid.values(grid.nearest(job.weight)), weight, LayerStats(rows=5, gram=part)
            )


def test_damping_is_a_fraction_of_the_mean_diagonal() -> None:
    gram = random_stats(5, 0, groups=2).gram
    assert gram is not None
    for group in range(2):
        expected = gram[group] + 0.1 * gram[group].trace() / 5 * torch.eye(5)
        torch.testing.assert_close(damp(gram, 0.1)[group], expected)
    assert torch.equal(damp(gram * 0, 0.1)[1], torch.eye(5, dtype=torch.float64))


@FAST
@given(st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 9)), min_size=1, max_size=9), st.integers(1, 5))
def test_optimal_is_the_best_of_all_partitions(pairs: list[tuple[int, int]], count: int) -> None:
    values, weights = merge(*(np.array(part, dtype=float) for part in zip(*pairs, strict=True)))
    centres = optimal((values, weights), count)
    assert centres.shape == (count,)
    assert _loss(values, weights, centres) == pytest.approx(_brute_force(values, weights, count), abs=1e-9)


@FAST
@given(SEEDS, st.sampled_from([4, 8, 16]))
def test_optimal_equals_the_quadratic_dynamic_program(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = merge(rng.laplace(size=70), rng.random(70))
    assert _loss(*points, optimal(points, count)) == pytest.approx(_quadratic_dp(*points, count), rel=1e-9)


@FAST
@given(SEEDS, st.sampled_from([4, 16]))
def test_lloyd_is_a_fixed_point_close_to_the_optimum(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = merge(rng.laplace(size=3000), rng.random(3000))
    centres = lloyd(points, count)
    best = _loss(*points, optimal(points, count))
    assert best <= _loss(*points, centres) <= 1.02 * best
    nearest = np.abs(points[0][:, None] - centres).argmin(1)
    means = [np.average(points[0][nearest == c], weights=points[1][nearest == c]) for c in range(count)]
    np.testing.assert_allclose(means, centres, rtol=1e-9)


def test_histogram_keeps_mass_and_mean() -> None:
    rng = np.random.default_rng(0)
    points = merge(rng.normal(size=500), rng.random(500))
    values, weights = histogram(points, 32)
    assert len(values) <= 32
    assert weights.sum() == pytest.approx(points[1].sum())
    assert values @ weights == pytest.approx(points[0] @ points[1])


def _random_grid(weight: Tensor, spec: Format) -> Grid:
    """Return a grid of the spec's shape that roughly covers a weight, one row's scale negative."""
    rows, columns = weight.shape
    blocks = -(-rows // 16) if spec.table_rows else 1
    levels = torch.linspace(-1, 1, spec.levels, dtype=torch.float64).repeat(blocks, 1)
    levels = levels.sign() * levels.abs() ** torch.linspace(1.0, 1.5, blocks, dtype=torch.float64)[:, None]
    scale = weight.double().abs().amax(1, keepdim=True).expand(-1, -(-columns // spec.group) if spec.group else 1)
    scale = scale * torch.linspace(0.6, 1.0, scale.shape[1], dtype=torch.float64)
    scale[0] *= -1
    return Grid(levels=levels, scale=scale, group=spec.group, table_rows=spec.table_rows)


def _obq(weight: np.ndarray, gram: np.ndarray, values: np.ndarray, spec: Format) -> np.ndarray:
    """Quantize one row with the whole inverse Hessian, downdated after every column (OBQ, equation 3)."""
    columns = len(weight)
    order = np.argsort(-np.diag(gram), kind="stable") if spec.act_order else np.arange(columns)
    inverse = np.linalg.inv(gram + spec.damping * np.trace(gram) / columns * np.eye(columns))
    weight, codes = weight.copy(), np.zeros(columns, dtype=np.uint8)
    for i in order:
        codes[i] = np.abs(values[i] - weight[i]).argmin()
        error = (weight[i] - values[i, codes[i]]) / inverse[i, i]
        weight -= error * inverse[:, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def _loss(values: np.ndarray, weights: np.ndarray, centres: np.ndarray) -> float:
    return float((weights * ((values[:, None] - centres) ** 2).min(1)).sum())


def _cell(values: np.ndarray, weights: np.ndarray) -> float:
    return _loss(values, weights, np.array([np.average(values, weights=weights)]))


def _brute_force(values: np.ndarray, weights: np.ndarray, count: int) -> float:
    size, best = len(values), np.inf
    for inner in combinations(range(1, size), min(count, size) - 1):
        edges = [0, *inner, size]
        parts = [slice(a, b) for a, b in pairwise(edges)]
        best = min(best, sum(_cell(values[part], weights[part]) for part in parts))
    return best


def _quadratic_dp(values: np.ndarray, weights: np.ndarray, count: int) -> float:
    size = len(values)
    best = [0.0] + [_cell(values[:j], weights[:j]) for j in range(1, size + 1)]
    cells = {(i, j): _cell(values[i:j], weights[i:j]) for j in range(1, size + 1) for i in range(j)}
    for _ in range(count - 1):
        best = [0.0] + [min(best[i] + cells[i, j] for i in range(j)) for j in range(1, size + 1)]
    return best[-1]


def test_replacing_a_format_checks_again() -> None:
    with pytest.raises(RecipeError):
        replace(Format(bits=4), bits=1)
