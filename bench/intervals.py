"""95 % intervals for timings, honest about noise that lasts longer than one round, a process, or a whole benchmark.

Over several processes an interval says where a repetition lands: with 95 % probability the ratio of another benchmark
of the same pair, of as many processes, lies in it. Within one process it covers that process alone.

What a machine does for seconds or minutes (a neighbour who shares its caches or its memory) hits the two of a pair
unequally, however they alternate. Two things answer it. A ratio over processes is that of least latencies: disturbance
only adds time, so the least of many runs moves least (Chen and Revels 2016). And an interval has a component that is
not estimated from the benchmark, which cannot see it, but known beforehand, `between` (type B of the Guide to the
Expression of Uncertainty in Measurement, 4.3); `python -m paredown.bench.repeat` measures it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from .measure import Seconds

Interval = tuple[float, float]

RESAMPLES = 2000
MIN_ROUNDS = 5
"""Below this many rounds no interval is given: resampling four numbers says nothing about a 95 % range."""

BETWEEN = 0.005
"""Relative standard deviation of a ratio from one benchmark to another of the same pair, beside what processes show.

Two tens on a shared virtual machine had 0.26 and 0.37 %, a series beside a program that copied memory half of the time
0.42 %."""

HALVES = 0.98
"""With 0.95, and processes added until the interval is narrow, 93 to 96 % of simulated repetitions lay in it; with this
95 to 97 %."""

MIN_PROCESSES = 3
"""Below this many processes no interval is given over them: of two observations hardly anything follows."""


def compared(
    pairs: Sequence[tuple[Seconds, Seconds]], between: float, rng: np.random.Generator
) -> tuple[float, Interval | None]:
    """Return a ratio of latencies and its interval, given the seconds of each process and those of the baseline there.

    Over processes: the least latency of all over the baseline's least. Of fewer than MIN_PROCESSES the ratio is that of
    typical latencies, and the interval that within the first.
    """
    if len(pairs) < MIN_PROCESSES:
        return typical(pairs), ratio_interval(*pairs[0], rng)
    least = log_least(pairs)
    low, high = least.min(axis=0)
    centre, reach = math.exp(low - high), half_width(least, between)
    return centre, (centre / (1 + reach), centre * (1 + reach))


def typical(pairs: Sequence[tuple[Seconds, Seconds]]) -> float:
    """Return the geometric mean of the `ratio` of each process."""
    return float(np.exp(np.mean(np.log([ratio(*pair) for pair in pairs]))))


def log_least(pairs: Sequence[tuple[Seconds, Seconds]]) -> NDArray[np.float64]:
    """Return the logarithms of the least latencies of each process: one column for it, one for the baseline."""
    return np.log([[float(seconds.min()), float(baseline.min())] for seconds, baseline in pairs])


def half_width(least: NDArray[np.float64], between: float) -> float:
    """Return the half-width, relative, of the interval for the ratio that a repetition finds; infinite for too few.

    The processes are parted into halves again and again: HALVES of the differences between the ratios of two halves
    are smaller than the first component. Half as many processes come less close to an undisturbed latency, so it errs
    on the safe side. The other component is `unseen(between)`; the two are independent, and their squares add.
    """
    if len(least) < MIN_PROCESSES:
        return math.inf
    chosen = _halves(len(least))
    ratios = [np.subtract(*_least_of(least, part).T) for part in (chosen, ~chosen)]
    apart = float(np.quantile(np.abs(ratios[0] - ratios[1]), HALVES))
    return _with_unseen(apart, between)


@functools.cache
def _halves(count: int) -> NDArray[np.bool_]:
    """Return ways to choose half of `count`, one a row: all of them, or RESAMPLES that are drawn by a fixed seed."""
    half = count // 2
    if math.comb(count, half) <= RESAMPLES:
        chosen = np.array(list(itertools.combinations(range(count), half)))
    else:
        chosen = np.random.default_rng(0).random((RESAMPLES, count)).argsort(axis=1)[:, :half]
    found = np.zeros((len(chosen), count), np.bool_)
    np.put_along_axis(found, chosen, values=True, axis=1)
    found.flags.writeable = False  # kept for the next call
    return found


def _least_of(least: NDArray[np.float64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.asarray(np.where(chosen[:, :, None], least, np.inf).min(axis=1))


def unseen(between: float) -> float:
    """Return what two benchmarks differ by at most in 95 of 100 pairs, each moved by a relative deviation `between`."""
    return math.expm1(float(ndtri(0.975)) * math.sqrt(2) * between)


def _with_unseen(seen: float, between: float) -> float:
    """Return a relative half-width of what processes show, `seen` in logarithms, and of what they do not."""
    return math.expm1(math.hypot(seen, math.log1p(unseen(between))))


def process_interval(centre: float, logs: NDArray[np.float64], between: float) -> Interval | None:
    """Return the interval around `centre`, a value whose logarithm in each process is `logs`; None for too few.

    It holds the mean of as many processes of another benchmark: t(0.975, n - 1) s sqrt(2 / n), where one share of the
    variance is that of this mean and the other that of the repetition's (prediction interval for a future sample mean,
    Hahn and Meeker 1991, 4.7), beside `unseen(between)`.
    """
    count = len(logs)
    if count < MIN_PROCESSES:
        return None
    spread = float(stdtrit(count - 1, 0.975)) * float(np.std(logs, ddof=1)) * math.sqrt(2 / count)
    reach = _with_unseen(spread, between)
    return centre / (1 + reach), centre * (1 + reach)


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
