"""Tables of levels by weighted one-dimensional k-means: locally optimal (Lloyd) and optimal (dynamic programming)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy import ndarray
from torch import Tensor

from .codes import Job, row_blocks
from .scales import absmax_scale, refine_scale, rms_scale, scale_losses

Points: TypeAlias = tuple[Float64[ndarray, " _"], Float64[ndarray, " _"]]
"""Distinct values in rising order, and the positive weight of each."""
Solver: TypeAlias = Callable[[Points, int], Float64[ndarray, " k"]]
"""Points and a number of clusters -> centroids in rising order."""

START_BINS = 512
"""Bins of the histogram whose optimum Lloyd starts from: 10 ms at 16 clusters."""
LLOYD_ROUNDS = 100
LIGHT = 1e-14
"""Fraction of the total weight below which a point is left out."""


def fit_table(job: Job, solve: Solver) -> tuple[Float64[Tensor, "blocks levels"], Float64[Tensor, "out groups"]]:
    """Return a table per tensor or block of rows and the scales it belongs to, of least weighted squared error.

    Rows are divided by their largest magnitude, or by their root mean square (which makes rows of one distribution
    alike, whatever their extremes); the better of the two is kept, and scales are refined on the table. The error of a
    weight counts with scale**2 * importance, so that a table serves the output and not the normalized row.
    """
    fits = [_fit_scaled(job, solve, scale) for scale in (absmax_scale(job), rms_scale(job))]
    losses = [float(scale_losses(job, levels, scale).sum()) for levels, scale in fits]
    return fits[losses.index(min(losses))]


def lloyd(points: Points, count: int) -> Float64[ndarray, " k"]:
    """Return centroids that are a fixed point of Lloyd's iteration, begun at the optimum of a histogram."""
    values, weights = points
    mass, moment = _prefix(weights), _prefix(weights * values)
    centres = optimal(histogram(points, START_BINS), count)
    for _ in range(LLOYD_ROUNDS):
        cuts = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2, side="right")
        cuts = np.concatenate([[0], cuts, [len(values)]])
        cell = np.diff(mass[cuts])
        moved = np.where(cell > 0, np.diff(moment[cuts]) / np.where(cell > 0, cell, 1.0), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    return centres


def optimal(points: Points, count: int) -> Float64[ndarray, " k"]:
    """Return the centroids of least weighted squared error (Wu 1991; Wang & Song 2011), cost O(k n log n).

    With few points every point is a centroid, the last repeated to `count`.
    """
    values, weights = points
    if len(values) <= count:
        return _filled(values, count)
    mass, moment = _prefix(weights), _prefix(weights * values)
    ends = _last_cell_starts(mass, moment, count)
    cuts = [len(values)]
    for layer in reversed(ends):
        cuts.append(int(layer[cuts[-1]]))
    edges = np.unique([*cuts, 0])
    return _filled(np.diff(moment[edges]) / np.diff(mass[edges]), count)


def merge(values: Float64[ndarray, " n"], weights: Float64[ndarray, " n"]) -> Points:
    """Sort values, add up the weights of equal ones, and leave out those too light for sums in float64 to see."""
    if not weights.any():
        weights = np.ones_like(weights)
    kept = weights > LIGHT * weights.sum()
    values, weights = values[kept], weights[kept]
    order = values.argsort()
    values = values[order]
    heads = np.flatnonzero(np.diff(values, prepend=-np.inf))
    return values[heads], np.add.reduceat(weights[order], heads)


def histogram(points: Points, bins: int) -> Points:
    """Return at most `bins` points: weighted means of even bins over the range, or the points where they are few."""
    values, weights = points
    if len(values) <= bins:
        return points
    place = (values - values[0]) * (bins / (values[-1] - values[0]))
    index = np.minimum(place.astype(np.int64), bins - 1)
    mass = np.bincount(index, weights=weights, minlength=bins)
    moment = np.bincount(index, weights=weights * values, minlength=bins)
    return moment[mass > 0] / mass[mass > 0], mass[mass > 0]


def _fit_scaled(
    job: Job, solve: Solver, scale: Float64[Tensor, "out groups"]
) -> tuple[Float64[Tensor, "blocks levels"], Float64[Tensor, "out groups"]]:
    full = scale if not job.format.group else scale.repeat_interleave(job.format.group, 1)[:, : job.weight.shape[1]]
    normal = job.weight / torch.where(full == 0, 1.0, full)
    weights = (job.importance * full.square()).expand_as(normal)
    blocks = row_blocks(len(normal), job.format.table_rows)
    tables = []
    for block in range(int(blocks[-1]) + 1):
        points = merge(*(part[blocks == block].numpy().ravel() for part in (normal, weights)))
        tables.append(torch.from_numpy(solve(points, job.format.levels)))
    levels = torch.stack(tables)
    return levels, refine_scale(job, levels, scale)


def _filled(centres: Float64[ndarray, " m"], count: int) -> Float64[ndarray, " k"]:
    return np.concatenate([centres, np.repeat(centres[-1:], count - len(centres))])


def _prefix(values: Float64[ndarray, " n"]) -> Float64[ndarray, " ends"]:
    return np.concatenate([[0.0], np.cumsum(values)])


def _last_cell_starts(
    mass: Float64[ndarray, " ends"], moment: Float64[ndarray, " ends"], count: int
) -> list[Int64[ndarray, " ends"]]:
    """Return for 2..count cells where the last cell of the best split of each prefix starts.

    A cell's squared error is its sum of squares, which no split changes, less moment^2 / mass: only that is minimized.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        best = -(moment**2) / mass
    best[0] = 0.0
    starts = []
    for _ in range(count - 1):
        best, start = _extend(best, mass, moment)
        starts.append(start)
    return starts


def _extend(
    best: Float64[ndarray, " ends"], mass: Float64[ndarray, " ends"], moment: Float64[ndarray, " ends"]
) -> tuple[Float64[ndarray, " ends"], Int64[ndarray, " ends"]]:
    """Add a cell: min over i < j of best[i] + cost(i, j) for every j, and the i.

    The best i does not fall as j rises (the cost is concave Monge), so ends are solved in the order 1/2, 1/4, 3/4, ...
    of the range, each among the starts that its solved neighbours leave; all ends of one depth in one array.
    """
    size = len(best)
    start = np.zeros(size, dtype=np.int64)
    result = np.zeros(size)
    depth = 1 << (size - 1).bit_length()
    while depth > 1:
        half = depth // 2
        ends = np.arange(half, size, depth)
        low = start[ends - half]
        above = ends + half
        high = np.where(above < size, start[np.minimum(above, size - 1)], size)
        high = np.maximum(np.minimum(high, ends - 1), low)
        start[ends], result[ends] = _argmin_ragged(best, mass, moment, ends, low, high)
        depth = half
    return result, start


def _argmin_ragged(
    best: Float64[ndarray, " ends"],
    mass: Float64[ndarray, " ends"],
    moment: Float64[ndarray, " ends"],
    ends: Int64[ndarray, " m"],
    low: Int64[ndarray, " m"],
    high: Int64[ndarray, " m"],
) -> tuple[Int64[ndarray, " m"], Float64[ndarray, " m"]]:
    """Return (first argmin, min) over low[e] <= i <= high[e] of best[i] - moment(i, e)^2 / mass(i, e)."""
    lengths = high - low + 1
    heads = np.cumsum(lengths) - lengths
    index = np.arange(lengths.sum()) + np.repeat(low - heads, lengths)
    cost = best[index] - (np.repeat(moment[ends], lengths) - moment[index]) ** 2 / (
        np.repeat(mass[ends], lengths) - mass[index]
    )
    least = np.minimum.reduceat(cost, heads)
    first = np.where(cost == np.repeat(least, lengths), index, len(best))
    return np.minimum.reduceat(first, heads), least
