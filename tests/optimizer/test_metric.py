"""Metric statistics against known distributions and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.optimizer.errors import InputError
from paredown.optimizer.metric import LARGE, drop, evaluate, interval, paired_drop, wilson


def test_a_number_is_a_value_without_scores() -> None:
    metric = evaluate(0.81, "top1")
    assert metric.report() == {"name": "top1", "value": 0.81, "n": None}
    assert metric.interval(0) is None


@pytest.mark.parametrize("result", [[1, 0, 1, 1], np.array([1, 0, 1, 1]), torch.tensor([1, 0, 1, 1]) == 1])
def test_scores_are_kept(result: object) -> None:
    metric = evaluate(result, "top1")  # type: ignore[arg-type]
    assert metric.report() == {"name": "top1", "value": 0.75, "n": 4}
    assert metric.scores is not None
    assert metric.scores.dtype == np.float64


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.ones((4, 2)), r"top1: the metric returned an array of shape \(4, 2\); return one number, or one score"),
        ([], "top1: the metric returned no scores; give it at least one sample"),
        ([1.0, float("nan")], "top1: 1 of 2 scores are not finite; look at the model's outputs"),
        (float("inf"), "top1: 1 of 1 scores are not finite"),
        ("good", "top1: the metric returned str, which is not numbers; return one number, or one score per sample"),
    ],
)
def test_what_is_not_a_metric_is_refused(result: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(result, "top1")  # type: ignore[arg-type]


def test_wilson_against_published_values() -> None:
    """Newcombe (1998, table I): 81/263 -> 0.2553..0.3662, 0/20 -> 0..0.1611, 1/29 -> 0.0061..0.1718."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_binary_scores_use_wilson() -> None:
    scores = np.array([1.0] * 90 + [0.0] * 10)
    assert interval(scores, 0) == wilson(0.9, 100)


@pytest.mark.parametrize("n", [400, LARGE + 1])
def test_interval_of_normal_scores_has_the_width_of_theory(n: int) -> None:
    scores = 5 + 2 * np.random.default_rng(0).standard_normal(n)
    low, high = interval(scores, 0)
    assert low < scores.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2 / np.sqrt(n), rel=0.12)


def test_fractions_drop_in_points_and_others_in_their_own_unit() -> None:
    before, after = np.array([0.9, 0.8, 1.0]), np.array([0.8, 0.7, 0.9])
    assert paired_drop(before, after, 0) == pytest.approx((10.0, 10.0, 10.0))
    assert paired_drop(10 * before, 10 * after, 0) == pytest.approx((1.0, 1.0, 1.0))
    assert drop(evaluate(0.81), evaluate(0.80), 0).value == pytest.approx(1.0)
    assert drop(evaluate(0.81), evaluate(0.80), 0).ci95 is None
    assert drop(evaluate(81.0), evaluate(80.0), 0).value == pytest.approx(1.0)
    assert drop(evaluate(-0.5), evaluate(-0.7), 0).value == pytest.approx(0.2)
    assert drop(evaluate(before), evaluate(after), 0).unit == "points"
    assert drop(evaluate(81.0), evaluate(80.0), 0).unit == ""


def test_pairing_cancels_what_is_hard_for_both() -> None:
    rng = np.random.default_rng(1)
    difficulty = 0.2 * rng.standard_normal(500)
    before, after = 5 + difficulty, 4.9 + difficulty + 0.01 * rng.standard_normal(500)
    value, low, high = paired_drop(before, after, 0)
    assert low < value < high
    assert high - low < 0.003  # unpaired it would be 0.05
    assert value == pytest.approx(0.1, abs=0.002)


def test_binary_drop_agrees_with_the_paired_normal_interval() -> None:
    """Reference: (b - c) / n with variance (b + c - (b - c)^2 / n) / n^2, b lost and c won."""
    n, lost, won = 2000, 120, 60
    before = np.array([1] * lost + [0] * won + [1] * (n - lost - won))
    after = np.array([0] * lost + [1] * won + [1] * (n - lost - won))
    half = 1.96 * np.sqrt(lost + won - (lost - won) ** 2 / n) / n
    value, low, high = paired_drop(before, after, 3)
    assert value == pytest.approx(3.0)
    assert (low, high) == pytest.approx((100 * (0.03 - half), 100 * (0.03 + half)), abs=0.12)


def test_binary_drop_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        kind = rng.choice(3, 400, p=[0.05, 0.03, 0.92])  # lost, won, same: a true drop of 2 points
        before, after = (kind != 1).astype(float), (kind != 0).astype(float)
        _, low, high = paired_drop(before, after, seed)
        hits += low <= 2.0 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_agreeing_everywhere_is_not_certainty() -> None:
    scores = np.array([1.0, 0.0] * 100)
    value, low, high = paired_drop(scores, scores, 0)
    assert value == 0.0
    assert low < 0 < high
    assert high - low < 3.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.integers(0, 5))
def test_swapping_sides_negates_and_seeds_repeat(values: list[float], seed: int) -> None:
    before = np.array(values)
    after = before[::-1].copy()
    value, low, high = paired_drop(before, after, seed)
    assert low - 1e-9 <= high
    assert paired_drop(before, after, seed) == (value, low, high)
    swapped = paired_drop(after, before, seed)
    assert swapped[0] == pytest.approx(-value, abs=1e-6)


def test_scores_must_pair_up() -> None:
    with pytest.raises(InputError, match="the metric scored 3 samples before and 2 after; score the same samples"):
        paired_drop([1, 2, 3], [1, 2], 0)
