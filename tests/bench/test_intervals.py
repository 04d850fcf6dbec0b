"""Intervals against simulation: they must cover the truth as often as they say, under slow noise too."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.bench.intervals import (
    HALVES,
    MIN_ROUNDS,
    block_length,
    compared,
    half_width,
    log_least,
    median_interval,
    process_interval,
    ratio,
    ratio_interval,
    typical,
    unseen,
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


def _process(rng: np.random.Generator, luck: float, moved: float) -> np.ndarray:
    """Return 60 runs of each of two files, true ratio 0.4: luck of the process, and disturbance that only adds."""
    times = np.array([0.4 * moved, 1.0])[:, None] * np.exp(luck * rng.random((2, 1)))
    return np.asarray(times * (1 + 0.3 * rng.random((2, 1)) * rng.random((2, 60)) ** 4))


def _benchmark(rng: np.random.Generator, luck: float, moved: float = 1.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the processes of one benchmark: as many as the rule of `sessions.gather` starts."""
    pairs = [tuple(_process(rng, luck, moved)) for _ in range(8)]
    while half_width(log_least(pairs), 0.0) > 0.02 and len(pairs) < 24:
        pairs.append(tuple(_process(rng, luck, moved)))
    return pairs


@pytest.mark.parametrize("luck", [0.003, 0.01, 0.04])
def test_an_interval_over_processes_covers_a_repetition(luck: float) -> None:
    """Also with the rule that stops once the interval is narrow, which favours intervals that are too narrow."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found, repeated = (compared(_benchmark(rng, luck), 0.0, rng) for _ in range(2))
        assert found[1] is not None
        assert found[1][0] <= found[0] <= found[1][1]
        hits += found[1][0] <= repeated[0] <= found[1][1]
    assert hits >= 0.93 * 200


@pytest.mark.parametrize("between", [0.0, 0.0075])
def test_what_lasts_for_minutes_is_covered_where_it_is_known(between: float) -> None:
    """Each benchmark is moved as a whole by 0.75 %, which none of its processes shows."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        moved = np.exp(0.0075 * rng.standard_normal(2))
        (_, interval), (repeated, _) = (compared(_benchmark(rng, 0.002, one), between, rng) for one in moved)
        assert interval is not None
        hits += interval[0] <= repeated <= interval[1]
    assert (hits >= 186) if between else (hits <= 120)


def test_rounds_of_one_process_are_not_taken_for_many_observations() -> None:
    """Luck of up to 8 % for each process: the interval within one misses a repetition, that over eight does not."""
    rng = np.random.default_rng(1)
    within = over = 0
    for _ in range(100):
        pairs, again = ([tuple(_process(rng, 0.08, 1.0)[:, :, None]) for _ in range(8)] for _ in range(2))
        one, several = compared(pairs[:1], 0.0, rng), compared(pairs, 0.0, rng)
        assert one[1] is not None
        assert several[1] is not None
        within += one[1][0] <= compared(again[:1], 0.0, rng)[0] <= one[1][1]
        over += several[1][0] <= compared(again, 0.0, rng)[0] <= several[1][1]
    assert within < 50
    assert over >= 95


def test_a_ratio_over_processes_is_that_of_undisturbed_runs() -> None:
    """A neighbour slows the baseline down in three of its processes: the ratio does not follow."""
    rng = np.random.default_rng(3)
    pairs = []
    for index in range(8):
        slow = 1.0 if index % 3 else 1.5
        pairs.append((0.4 * (1 + 0.01 * rng.random((10, 8))), slow * (1 + 0.01 * rng.random((10, 8)))))
    found, interval = compared(pairs, 0.0, rng)
    assert found == pytest.approx(0.4, rel=0.002)
    assert interval is not None
    assert interval[1] / interval[0] < 1.01
    assert typical(pairs) == pytest.approx(0.4 / 1.5 ** (3 / 8), rel=0.01)
    assert compared(pairs[:2], 0.0, rng)[0] == pytest.approx(typical(pairs[:2]))


def test_the_half_width_compares_halves() -> None:
    """Of four processes there are three ways to part them in two pairs, by hand."""
    least = np.log([[0.40, 1.00], [0.42, 1.00], [0.41, 1.05], [0.44, 1.10]])
    gaps = [
        abs(np.log(0.40 / 1.0) - np.log(0.41 / 1.05)),
        abs(np.log(0.40 / 1.0) - np.log(0.42 / 1.0)),
        abs(np.log(0.40 / 1.0) - np.log(0.41 / 1.0)),
    ]
    wanted = np.quantile(np.repeat(gaps, 2), HALVES)
    assert half_width(least, 0.0) == pytest.approx(np.expm1(wanted))
    both = np.log1p(half_width(least, 0.02))
    assert both == pytest.approx(np.hypot(wanted, 1.959963984540054 * np.sqrt(2) * 0.02))
    assert half_width(least[:2], 0.0) == np.inf
    assert half_width(np.tile(least, (10, 1)), 0.0) == half_width(np.tile(least, (10, 1)), 0.0)


def test_the_interval_of_a_median_is_the_prediction_interval_of_a_mean() -> None:
    logs = np.array([0.0, 0.01, 0.02, 0.03])
    t = 3.182446305284263  # t(0.975, 3)
    by_hand = np.exp(t * np.sqrt(sum((x - 0.015) ** 2 for x in logs) / 3) * np.sqrt(2 / 4))
    low, high = process_interval(0.5, logs, 0.0) or (0, 0)
    assert (low, high) == pytest.approx((0.5 / by_hand, 0.5 * by_hand))
    wider = process_interval(0.5, logs, 0.01) or (0, 0)
    assert np.log(wider[1] / 0.5) == pytest.approx(np.hypot(np.log(by_hand), np.log1p(unseen(0.01))))
    assert process_interval(1.0, np.array([0.1, 0.2]), 0.0) is None
