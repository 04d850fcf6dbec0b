"""Intervals against simulation: they must cover the truth as often as they say, under slow noise too."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.bench.intervals import (
    MIN_ROUNDS,
    block_length,
    half_width,
    log_ratios,
    median_interval,
    process_interval,
    ratio,
    ratio_interval,
)


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


# --- over processes


def _benchmark(rng: np.random.Generator, spread: float) -> np.ndarray:
    """Return the log ratios of one benchmark's processes: as many as the rule of `sessions.gather` starts."""
    logs = list(np.log(0.4) + spread * rng.standard_normal(6))
    while half_width(np.array(logs)) > 0.02 and len(logs) < 24:
        logs.append(np.log(0.4) + spread * rng.standard_normal())
    return np.array(logs)


@pytest.mark.parametrize("spread", [0.003, 0.01, 0.02, 0.04])
def test_intervals_over_processes_cover_the_truth_and_a_repetition(spread: float) -> None:
    """Also with the rule that stops once the interval is narrow, which favours intervals that are too narrow."""
    rng = np.random.default_rng(0)
    truth = repetition = 0
    for _ in range(1000):
        first, second = _benchmark(rng, spread), _benchmark(rng, spread)
        interval = process_interval(float(np.exp(first.mean())), first)
        assert interval is not None
        truth += interval[0] <= 0.4 <= interval[1]
        repetition += interval[0] <= np.exp(second.mean()) <= interval[1]
    assert truth >= 950
    assert repetition >= 920


def test_rounds_of_one_process_are_not_taken_for_many_observations() -> None:
    """Between-process luck of 2 %: the interval within a process misses the truth, the one over processes does not."""
    rng = np.random.default_rng(1)
    within = over = 0
    for _ in range(100):
        luck = np.exp(0.02 * rng.standard_normal(8))
        noise = np.exp(0.005 * rng.standard_normal((8, 30, 2)))
        baseline = np.exp(0.005 * rng.standard_normal((8, 30, 2)))
        pairs = [(0.4 * luck[i] * noise[i], baseline[i]) for i in range(8)]
        one = ratio_interval(*pairs[0], rng)
        logs = log_ratios(pairs)
        all_of_them = process_interval(float(np.exp(logs.mean())), logs)
        assert one is not None
        assert all_of_them is not None
        within += one[0] <= 0.4 <= one[1]
        over += all_of_them[0] <= 0.4 <= all_of_them[1]
    assert within < 50
    assert over >= 95


def test_half_width_is_the_prediction_interval_of_a_mean() -> None:
    logs = np.array([0.0, 0.01, 0.02, 0.03])
    t = 3.182446305284263  # t(0.975, 3)
    by_hand = np.exp(t * np.sqrt(sum((x - 0.015) ** 2 for x in logs) / 3) * np.sqrt(2 / 4)) - 1
    assert half_width(logs) == pytest.approx(by_hand)
    assert half_width(np.array([0.1, 0.2])) == np.inf
    assert process_interval(1.0, np.array([0.1, 0.2])) is None
    low, high = process_interval(0.5, logs) or (0, 0)
    assert low * high == pytest.approx(0.25)
