"""Intervals against simulation: they must cover the truth as often as they say, under slow noise too."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.bench.intervals import MIN_ROUNDS, block_length, median_interval, ratio, ratio_interval


def _noise(rng: np.random.Generator, rounds: int, rho: float) -> np.ndarray:
    """An AR(1) series of variance 1."""
    steps = rng.standard_normal(rounds) * np.sqrt(1 - rho * rho)
    series = np.empty(rounds)
    series[0] = rng.standard_normal()
    for index in range(1, rounds):
        series[index] = rho * series[index - 1] + steps[index]
    return series


@pytest.mark.parametrize(("rho", "least"), [(0.0, 0.88), (0.6, 0.84)])
def test_median_interval_covers_the_truth(rho: float, least: float) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(120):
        rounds = np.exp(0.1 * _noise(rng, 60, rho))[:, None]
        interval = median_interval(rounds, rng)
        assert interval is not None
        hits += interval[0] <= 1.0 <= interval[1]
    assert hits / 120 >= least


def test_drift_that_hits_both_cancels_in_the_ratio() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        drift = np.exp(0.5 * _noise(rng, 60, 0.9))[:, None]
        baseline = 0.010 * drift * np.exp(0.02 * rng.standard_normal((60, 4)))
        candidate = 0.005 * drift * np.exp(0.02 * rng.standard_normal((60, 8)))
        interval = ratio_interval(candidate, baseline, rng)
        assert interval is not None
        assert interval[1] - interval[0] < 0.02
        assert ratio(candidate, baseline) == pytest.approx(0.5, abs=0.01)
        hits += interval[0] <= 0.5 <= interval[1]
    assert hits / 60 >= 0.85


def test_ratio_interval_of_independent_noise_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(120):
        baseline, candidate = np.exp(0.1 * rng.standard_normal((2, 40, 1)))
        interval = ratio_interval(2 * candidate, baseline, rng)
        assert interval is not None
        hits += interval[0] <= 2.0 <= interval[1]
    assert hits / 120 >= 0.88


def test_slow_noise_widens_the_interval() -> None:
    rng = np.random.default_rng(3)
    slow = np.exp(0.1 * _noise(rng, 64, 0.9))
    shuffled = rng.permutation(slow)
    wide, narrow = (median_interval(series[:, None], np.random.default_rng(0)) for series in (slow, shuffled))
    assert wide is not None
    assert narrow is not None
    assert wide[1] - wide[0] > 1.3 * (narrow[1] - narrow[0])


def test_block_length_follows_the_autocorrelation() -> None:
    rng = np.random.default_rng(4)
    lengths = [block_length(_noise(rng, 1000, rho)) for rho in (0.0, 0.5, 0.9)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 10  # n^(1/3)
    assert block_length(np.ones(8)) == 2
    assert block_length(np.ones(5)) == 1


def test_same_seed_same_interval() -> None:
    seconds = np.random.default_rng(5).random((20, 3)) + 1
    first, second = (median_interval(seconds, np.random.default_rng(7)) for _ in range(2))
    assert first == second


def test_too_few_rounds_give_no_interval() -> None:
    seconds = np.ones((MIN_ROUNDS - 1, 3))
    assert median_interval(seconds, np.random.default_rng(0)) is None
    assert ratio_interval(seconds, seconds, np.random.default_rng(0)) is None
