"""What a metric function returned, its 95 % interval, and the drop between two measurements of it.

Unit: a metric is reported as it comes. Where all scores of the original (or its value) lie in 0..1 it is a fraction,
and a drop is given in percentage points, 100 * (before - after); otherwise a drop is before - after in the metric's own
unit. The gate `max_drop` is compared with that number. Higher is better, so a positive drop is a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

Scores: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

RESAMPLES = 4000
ROUNDING = 1e-4
"""How far a fraction may leave 0..1: a cosine similarity of 1.0000001 is one."""
LARGE = 20_000
"""Above this many samples the mean is normal enough, and resampling (n x RESAMPLES draws) would cost seconds."""
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Metric:
    """A measured metric: the mean of `scores`, or one number without scores (`n` None)."""

    name: str
    value: float
    n: int | None
    scores: Scores | None

    def report(self) -> dict[str, object]:
        """Return the `metric` of report.json."""
        return {"name": self.name, "value": self.value, "n": self.n}

    def interval(self, seed: int) -> Interval | None:
        """Return the 95 % interval of the value; None without per-sample scores."""
        return None if self.scores is None else interval(self.scores, seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """How much a metric lost, and the paired 95 % interval of that; `unit` is "points" or "" (the metric's own)."""

    value: float
    ci95: Interval | None
    unit: str


def evaluate(result: ArrayLike, name: str = "metric") -> Metric:
    """Return what a metric function returned as a Metric: a number, or one score per sample (array, tensor, list)."""
    values = _as_float64(result, name)
    if values.ndim > 1:
        raise InputError(
            f"the metric returned an array of shape {tuple(values.shape)}",
            where=name,
            fix="return one number, or one score per sample",
        )
    if values.size == 0:
        raise InputError("the metric returned no scores", where=name, fix="give it at least one sample")
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise InputError(f"{bad} of {values.size} scores are not finite", where=name, fix="look at the model's outputs")
    if values.ndim == 0:
        return Metric(name=name, value=float(values), n=None, scores=None)
    return Metric(name=name, value=float(values.mean()), n=values.size, scores=values)


def interval(scores: ArrayLike, seed: int) -> Interval:
    """Return the 95 % interval of the mean score.

    Scores of 0 and 1: Wilson (1927), as in Brown, Cai and DasGupta (2001). Otherwise the bootstrap percentile
    interval (Efron and Tibshirani 1993), or the normal one above LARGE samples.
    """
    values = np.asarray(scores, dtype=np.float64)
    if _is_binary(values):
        return wilson(float(values.mean()), values.size)
    return _mean_interval(values, seed)


def wilson(share: float, n: int) -> Interval:
    """Return Wilson's interval of a share measured on n samples."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def paired_drop(before: ArrayLike, after: ArrayLike, seed: int) -> tuple[float, float, float]:
    """Return (drop, low, high) from scores of the same samples, in the unit of this file's docstring.

    The bootstrap resamples samples and keeps each one's pair, so what is hard for both models cancels. Between 0/1
    scores only the differences -1, 0, 1 occur, and resampling them is a multinomial draw; half a sample is added to
    each of the four outcomes (Agresti and Min 2005), without which two models that agree everywhere would get width 0.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise InputError(
            f"the metric scored {first.size} samples before and {second.size} after",
            fix="score the same samples in the same order",
        )
    scale = _scale(first)
    differences = first - second
    binary = _is_binary(first) and _is_binary(second)
    low, high = _binary_interval(differences, seed) if binary else _mean_interval(differences, seed)
    return scale * float(differences.mean()), scale * low, scale * high


def drop(before: Metric, after: Metric, seed: int) -> Drop:
    """Return what the metric lost; without per-sample scores there is no interval."""
    if before.scores is not None and after.scores is not None:
        value, low, high = paired_drop(before.scores, after.scores, seed)
        return Drop(value=value, ci95=(low, high), unit=_unit(before.scores))
    first = np.array([before.value])
    return Drop(value=_scale(first) * (before.value - after.value), ci95=None, unit=_unit(first))


def _as_float64(result: ArrayLike, name: str) -> Scores:
    detached = result.detach().cpu() if hasattr(result, "detach") else result
    try:
        return np.asarray(detached, dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise InputError(
            f"the metric returned {type(result).__name__}, which is not numbers",
            where=name,
            fix="return one number, or one score per sample",
        ) from problem


def _is_binary(values: Scores) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _scale(before: Scores) -> float:
    """Return 100 for a fraction. The original alone decides: what compression does to scores must not change a unit."""
    return 100.0 if before.min() >= -ROUNDING and before.max() <= 1 + ROUNDING else 1.0


def _unit(before: Scores) -> str:
    return "points" if _scale(before) == 100.0 else ""


def _mean_interval(values: Scores, seed: int) -> Interval:
    if values.size > LARGE:
        half = _Z * float(values.std(ddof=1)) / np.sqrt(values.size)
        return float(values.mean() - half), float(values.mean() + half)
    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // values.size)
    counts = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    means = [values[rng.integers(0, values.size, (count, values.size))].mean(axis=1) for count in counts]
    return _percentiles(np.concatenate(means))


def _binary_interval(differences: Scores, seed: int) -> Interval:
    n = differences.size
    lost, won = int(np.count_nonzero(differences > 0)), int(np.count_nonzero(differences < 0))
    shares = np.array([lost + 0.5, won + 0.5, n - lost - won + 1.0]) / (n + 2)
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    return _percentiles((draws[:, 0] - draws[:, 1]) / n)


def _percentiles(means: Scores) -> Interval:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
