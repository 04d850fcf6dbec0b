"""Levels by optimal one-dimensional k-means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float, Float64
from numpy import ndarray
from torch import Tensor

from ..clusters import Points, fit_table, histogram, optimal
from ..codes import Format, on_int8_grid, prepare
from ..scales import codebook, uniform
from ..stats import LayerStats
from ..weight import Weight

needs: frozenset[str] = frozenset({"gram"})

MAX_POINTS = 2**16
"""Distinct values of a table that are solved exactly; beyond, weighted means of as many even bins."""
WORK = 2**21
"""Points times levels over all tables; bounds the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    format: Format


def quantize(w: Float[Tensor, "out in"], stats: LayerStats | None, spec: Spec) -> Weight:
    """Return the weight on the table of least weighted squared error of its normalized rows.

    At 8 bits with an int8 table the result is the int8 grid itself (`Uniform`).
    """
    job = prepare(w, stats, spec.format)
    if on_int8_grid(spec.format):
        return uniform(job)
    tables = math.ceil(len(w) / spec.format.table_rows) if spec.format.table_rows else 1
    limit = max(1024, min(MAX_POINTS, WORK // (tables * spec.format.levels)))
    return codebook(job, *fit_table(job, partial(_solve, limit)))


def _solve(limit: int, points: Points, count: int) -> Float64[ndarray, " k"]:
    return optimal(histogram(points, limit), count)
