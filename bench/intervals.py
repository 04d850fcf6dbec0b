"""95 % intervals for timings, honest about noise that lasts longer than one round, and as long as a process.

Over several processes an interval says where a repetition lands: with 95 % probability the ratio of another benchmark
of the same pair, of as many processes, lies in it. Within one process it covers that process alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from .measure import Seconds

Interval = tuple[float, float]

RESAMPLES = 2000
MIN_ROUNDS = 5
"""Below this many rounds no interval is given: resampling four numbers says nothing about a 95 % range."""

MIN_PROCESSES = 3
"""Below this many processes no interval is given over them: of two observations hardly anything follows."""


def log_ratios(pairs: Sequence[tuple[Seconds, Seconds]]) -> NDArray[np.float64]:
    """Return log `ratio` of each process, given its seconds and those of the baseline."""
    return np.log([ratio(seconds, baseline) for seconds, baseline in pairs])


def half_width(logs: NDArray[np.float64]) -> float:
    """Return the half-width, relative, of the interval for the mean of another sample of as many processes.

    t(0.975, n - 1) s sqrt(2 / n): one share of the variance is that of this mean, the other that of the repetition's
    (prediction interval for a future sample mean, Hahn and Meeker 1991, 4.7). Infinite below MIN_PROCESSES.
    """
    count = len(logs)
    if count < MIN_PROCESSES:
        return math.inf
    reach = float(stdtrit(count - 1, 0.975)) * float(np.std(logs, ddof=1)) * math.sqrt(2 / count)
    return math.expm1(reach)


def process_interval(centre: float, logs: NDArray[np.float64]) -> Interval | None:
    """Return the interval around `centre`, a value whose logarithm in each process is `logs`; None for too few."""
    reach = half_width(logs)
    return None if math.isinf(reach) else (centre / (1 + reach), centre * (1 + reach))


def median_interval(seconds: Seconds, rng: np.random.Generator) -> Interval | None:
    """Return the interval of the median run of one artifact (rounds, burst); None with fewer than MIN_ROUNDS rounds."""
    if len(seconds) < MIN_ROUNDS:
        return None
    medians = np.median(seconds, axis=1)
    rows = _resampled_rounds(medians, rng)
    chunk = max(1, 4_000_000 // seconds.size)
    parts = [rows[start : start + chunk] for start in range(0, RESAMPLES, chunk)]
    estimates = np.concatenate([np.median(seconds[part], axis=(1, 2)) for part in parts])
    return _percentile_interval(estimates, len(medians) / block_length(medians))


def ratio(seconds: Seconds, baseline: Seconds) -> float:
    """Return how many times the baseline's latency this takes: the median over rounds of the ratio of the two medians.

    Both sides of a ratio come from the same round, so drift of the machine cancels; hence it may differ slightly from
    the quotient of the two p50.
    """
    return float(np.median(_round_ratios(seconds, baseline)))


def ratio_interval(seconds: Seconds, baseline: Seconds, rng: np.random.Generator) -> Interval | None:
    """Return the interval of `ratio`; None with fewer than MIN_ROUNDS rounds."""
    if len(seconds) < MIN_ROUNDS:
        return None
    ratios = _round_ratios(seconds, baseline)
    estimates = np.median(ratios[_resampled_rounds(ratios, rng)], axis=1)
    return _percentile_interval(estimates, len(ratios) / block_length(ratios))


def block_length(series: NDArray[np.float64]) -> int:
    """Return how many consecutive rounds to resample as one, so that slow noise is not mistaken for many samples.

    (sqrt(6) rho / (1 - rho^2))^(2/3) n^(1/3): Carlstein (1986) for an AR(1) series, equal to the circular block rule of
    Politis and White (2004) for that case. rho is the lag-1 autocorrelation of the series, plus (1 + 3 rho) / n, which
    is how much it is biased low (Kendall 1954). We keep at least n^(1/3) rounds a block, and at least four blocks.
    """
    count = len(series)
    centred = series - series.mean()
    power = float(centred @ centred)
    rho = float(centred[1:] @ centred[:-1]) / power if power > 0 else 0.0
    rho = min(max(rho + (1 + 3 * rho) / count, 0.0), 0.95)
    wanted = max((math.sqrt(6) * rho / (1 - rho * rho)) ** (2 / 3), 1.0) * count ** (1 / 3)
    return int(max(1, min(math.ceil(wanted), count // 4)))


def _round_ratios(seconds: Seconds, baseline: Seconds) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = np.median(seconds, axis=1) / np.median(baseline, axis=1)
    return ratios


def _resampled_rounds(series: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.intp]:
    """Return (RESAMPLES, n) round numbers: circular blocks of consecutive rounds, started at random."""
    count, block = len(series), block_length(series)
    starts = rng.integers(0, count, (RESAMPLES, math.ceil(count / block), 1))
    rows = (starts + np.arange(block)) % count
    return rows.reshape(RESAMPLES, -1)[:, :count]


def _percentile_interval(estimates: NDArray[np.float64], blocks: float) -> Interval:
    """Return the expanded percentile interval: wider the fewer blocks there were (Hesterberg 2015).

    The tails are those of Student's t instead of the normal: Phi(-sqrt(b / (b - 1)) t(0.975, b - 1)) for b blocks.
    """
    tail = 100 * float(ndtr(math.sqrt(blocks / (blocks - 1)) * stdtrit(blocks - 1, 0.025)))
    low, high = np.percentile(estimates, [tail, 100 - tail])
    return float(low), float(high)
