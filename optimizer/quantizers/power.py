"""Levels of a power function: even steps of sgn(w)|w|^a (PowerQuant, Yvinec et al. 2023), with a clip per row.

Differs from the paper: exponent and clip are searched together (a power of unclipped rows loses to clipped even
levels), one exponent per tensor or per 16 rows, and the levels have the unpaired one of two's complement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..codes import Format, Job, on_int8_grid, prepare, row_blocks, stored_levels
from ..errors import RecipeError
from ..scales import codebook, refine_scale, scale_losses, search_scale, uniform
from ..stats import LayerStats
from ..weight import Weight

needs: frozenset[str] = frozenset({"gram"})

EXPONENTS = torch.arange(30, 121, 5, dtype=torch.float64) / 100
"""Coarse grid: the error has several local minima in the exponent (Laplace rows at 3 bits, all at 8)."""
GOLDEN = (math.sqrt(5) - 1) / 2
GOLDEN_ROUNDS = 8
"""From the bracket of two grid steps, 0.1, to 0.002."""
SAMPLE = 2**16
"""Weights that the exponent is searched on; evenly spaced columns where there are more. Scales then use all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """exponent: fixed, or None to search 0.3 .. 1.2 (1 is even levels, less puts more levels near zero)."""

    format: Format
    exponent: float | None = None

    def __post_init__(self) -> None:
        if self.exponent is not None and not 0 < self.exponent <= 8:
            raise RecipeError(f"exponent={self.exponent} is out of range", fix="use 0.3 to 1.2, or leave it out")


def quantize(w: Float[Tensor, "out in"], stats: LayerStats | None, spec: Spec) -> Weight:
    """Return the weight on the best power table; at 8 bits with an int8 table the int8 grid itself (`Uniform`)."""
    job = prepare(w, stats, spec.format)
    if on_int8_grid(spec.format):
        return uniform(job)
    blocks = int(row_blocks(len(w), spec.format.table_rows)[-1]) + 1
    if spec.exponent is None:
        exponents = best_exponents(_sample(job), blocks)
    else:
        exponents = torch.full((blocks,), spec.exponent, dtype=torch.float64)
    levels = stored_levels(power_levels(exponents, spec.format.bits), spec.format.table)
    return codebook(job, levels, search_scale(job, levels))


def power_levels(exponents: Float64[Tensor, " blocks"], bits: int) -> Float64[Tensor, "blocks levels"]:
    """Return sgn(q) (|q| / Q)^(1/a) for q = -Q .. Q-1, Q = 2**(bits-1): even levels at a = 1."""
    half = 2 ** (bits - 1)
    steps = (torch.arange(2**bits, dtype=torch.float64) - half) / half
    levels: Tensor = steps.sign() * steps.abs() ** exponents.reciprocal()[:, None]
    return levels


def best_exponents(job: Job, blocks: int) -> Float64[Tensor, " blocks"]:
    """Return the exponent of least error for each table: the best of a grid, then golden section around it.

    Scales are searched at the first exponent, and then follow from one to the next: the best clip moves by 3 to 5 % per
    grid step.
    """
    trial = _Trial.of(job, EXPONENTS[:1].expand(blocks), None)
    trials = [trial]
    for value in EXPONENTS[1:]:
        trial = _Trial.of(job, value.expand(blocks), trial.scale)
        trials.append(trial)
    best = torch.stack([trial.loss for trial in trials]).argmin(0)
    step = float(EXPONENTS[1] - EXPONENTS[0])
    low, high, scale = EXPONENTS[best] - step, EXPONENTS[best] + step, _Trial.of(job, EXPONENTS[best], None).scale
    for _ in range(GOLDEN_ROUNDS):
        inner, outer = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        left, right = _Trial.of(job, inner, scale), _Trial.of(job, outer, scale)
        trials += [left, right]
        low = torch.where(left.loss <= right.loss, low, inner)
        high = torch.where(left.loss <= right.loss, outer, high)
    winner = torch.stack([trial.loss for trial in trials]).argmin(0)
    return torch.stack([trial.exponents for trial in trials]).gather(0, winner[None])[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trial:
    """Exponents with their fitted scales and the weighted squared error of every table's rows."""

    exponents: Float64[Tensor, " blocks"]
    scale: Float64[Tensor, "out 1"]
    loss: Float64[Tensor, " blocks"]

    @classmethod
    def of(cls, job: Job, exponents: Float64[Tensor, " blocks"], start: Float64[Tensor, "out 1"] | None) -> _Trial:
        """Fit scales to the rounded tables of some exponents, near `start` or from scratch."""
        levels = stored_levels(power_levels(exponents, job.format.bits), job.format.table)
        index = row_blocks(len(job.weight), job.format.table_rows)
        scale = search_scale(job, levels) if start is None else refine_scale(job, levels, start)
        rows = scale_losses(job, levels, scale)
        loss = torch.zeros(len(exponents), dtype=torch.float64).index_add(0, index, rows)
        return cls(exponents=exponents, scale=scale, loss=loss)


def _sample(job: Job) -> Job:
    """Return a job with one scale per row and at most about `SAMPLE` weights, evenly spaced columns of all rows."""
    rows, columns = job.weight.shape
    step = max(1, rows * columns // SAMPLE)
    weight, importance = (part[:, ::step] for part in (job.weight, job.importance))
    return replace(job, weight=weight, importance=importance, format=replace(job.format, group=0))
