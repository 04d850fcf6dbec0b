"""Find the scale of each row or group that fits a fixed set of levels, and build weights from levels and scales."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from .codes import (
    Grid,
    Job,
    as_codebook,
    count_below,
    half_mantissa,
    midpoints,
    round_scale,
    round_table,
    row_blocks,
    table_levels,
)
from .feedback import assign
from .weight import Codebook, Uniform

CLIPS = tuple(0.88**i for i in range(24))
"""Fractions of the covering scale that are tried: down to 0.05, below what a Laplace row of 4096 wants at 2 bits."""
NUDGES = (0.97, 1.03, 0.985, 1.015)
"""Factors tried around the best clip, whose steps are 12 % apart."""
CHUNK = 2**18
"""Weights searched at a time, so that temporaries (2 MiB each in float64) stay in cache."""


def uniform(job: Job) -> Uniform:
    """Quantize to even levels -2**(bits-1) .. 2**(bits-1)-1 times a scale of either sign, clipped for least error.

    The sign lets the longer tail have the extra level. A row within {-a, 0, a} is exact if a is an fp16 number.
    """
    bits, zero = job.format.bits, 2 ** (job.format.bits - 1)
    levels = (torch.arange(2**bits, dtype=torch.float64) - zero)[None]
    scale = round_scale(search_scale(job, levels))
    codes = assign(job, Grid(levels=levels, scale=scale.double(), group=job.format.group))
    return Uniform(codes=codes, scale=scale, zero=zero, code_bits=bits, group=job.format.group, dtype=job.dtype)


def codebook(job: Job, levels: Float64[Tensor, "blocks levels"], scale: Float64[Tensor, "out groups"]) -> Codebook:
    """Quantize to given levels and scales: round both to what is stored, then choose codes."""
    table, factor = round_table(levels, job.format.table)
    stored = round_scale(scale * factor[row_blocks(len(scale), job.format.table_rows)][:, None])
    grid = Grid(
        levels=table_levels(table),
        scale=stored.double(),
        group=job.format.group,
        table_rows=job.format.table_rows,
    )
    return as_codebook(assign(job, grid), table, stored, job)


def absmax_scale(job: Job) -> Float64[Tensor, "out groups"]:
    """Return the largest magnitude of each row or group."""
    return _runs(job.weight, job.format.group).abs().amax(1).reshape(len(job.weight), -1)


def rms_scale(job: Job) -> Float64[Tensor, "out groups"]:
    """Return the root of the importance-weighted mean square of each row or group."""
    weight, importance = (_runs(part, job.format.group) for part in (job.weight, job.importance))
    mean = (weight.square() * importance).sum(1) / importance.sum(1)
    return mean.sqrt().reshape(len(job.weight), -1)


def search_scale(job: Job, levels: Float64[Tensor, "blocks levels"]) -> Float64[Tensor, "out groups"]:
    """Return the scales of least importance-weighted squared error among many clips of both signs (nearest codes)."""
    return _by_chunk(job, levels, None)


def refine_scale(
    job: Job, levels: Float64[Tensor, "blocks levels"], scale: Float64[Tensor, "out groups"]
) -> Float64[Tensor, "out groups"]:
    """Return scales near the given ones with no more importance-weighted squared error."""
    return _by_chunk(job, levels, scale)


def scale_losses(
    job: Job, levels: Float64[Tensor, "blocks levels"], scale: Float64[Tensor, "out groups"]
) -> Float64[Tensor, " out"]:
    """Return the importance-weighted squared error of every row, with nearest codes."""
    grid = Grid(levels=levels, scale=scale, group=job.format.group, table_rows=job.format.table_rows)
    delta = grid.values(grid.nearest(job.weight)) - job.weight
    return (delta.square() * job.importance).sum(1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Runs:
    """The weights that share a scale, one line per scale, and the levels that a scale multiplies."""

    weight: Float64[Tensor, "runs n"]
    importance: Float64[Tensor, "runs n"]
    levels: Float64[Tensor, "runs_or_1 levels"]

    def snap(self, scale: Float64[Tensor, " runs"]) -> Float64[Tensor, "runs n"]:
        """Return the level nearest to each weight over its scale."""
        normal = self.weight / torch.where(scale == 0, 1.0, scale)[:, None]
        if _is_even(self.levels):
            low, step = float(self.levels[0, 0]), float(self.levels[0, 1] - self.levels[0, 0])
            return normal.sub_(low).div_(step).round_().clamp_(0, self.levels.shape[1] - 1).mul_(step).add_(low)
        codes = count_below(normal, midpoints(self.levels))
        if len(self.levels) == 1:
            return self.levels[0].index_select(0, codes.flatten().int()).reshape(codes.shape)
        return self.levels.gather(1, codes.long())

    def loss(self, scale: Float64[Tensor, " runs"]) -> Float64[Tensor, " runs"]:
        delta = self.snap(scale).mul_(scale[:, None]).sub_(self.weight)
        return delta.square_().mul_(self.importance).sum(1)

    def least_squares(self, scale: Float64[Tensor, " runs"]) -> Float64[Tensor, " runs"]:
        """Return argmin_s sum h (w - s l)^2 = sum h w l / sum h l^2 for the levels l that a scale picks."""
        levels = self.snap(scale)
        weighted = levels * self.importance
        norm = weighted.mul(levels).sum(1)
        return torch.where(norm > 0, weighted.mul_(self.weight).sum(1) / norm, scale)

    def best(self, candidates: Iterable[Float64[Tensor, " runs"]]) -> Float64[Tensor, " runs"]:
        """Return the rounded candidate of least loss for every run, the first of equals; 0 if none beats zeros."""
        best = torch.zeros(len(self.weight), dtype=torch.float64)
        least = (self.weight.square() * self.importance).sum(1)
        for scale in map(half_mantissa, candidates):
            loss = self.loss(scale)
            best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
        return best


def _by_chunk(
    job: Job, levels: Float64[Tensor, "blocks levels"], start: Float64[Tensor, "out groups"] | None
) -> Float64[Tensor, "out groups"]:
    """Search from every clip, or from `start` alone, a chunk of rows at a time."""
    rows, columns = job.weight.shape
    blocks = row_blocks(rows, job.format.table_rows)
    parts = []
    step = max(1, CHUNK // columns)
    for here in (slice(low, min(low + step, rows)) for low in range(0, rows, step)):
        weight, importance = (_runs(part[here], job.format.group) for part in (job.weight, job.importance))
        count = here.stop - here.start
        own = levels if len(levels) == 1 else levels[blocks[here]].repeat_interleave(len(weight) // count, dim=0)
        runs = _Runs(weight=weight, importance=importance, levels=own)
        best = runs.best(_clips(weight, own)) if start is None else start[here].flatten()
        best = runs.best([best, *(best * factor for factor in NUDGES)])
        for _ in range(2):
            best = runs.best([best, runs.least_squares(best)])
        parts.append(best.reshape(count, -1))
    return torch.cat(parts)


def _clips(weight: Float64[Tensor, "runs n"], levels: Float64[Tensor, "r l"]) -> list[Float64[Tensor, " runs"]]:
    """Return candidate scales: those that cover a run, of either sign, times `CLIPS`; for even levels absmax over 2**j.

    The powers of two make {-a, 0, a} exact on even levels, where a must not fall on the unpaired outer level. Searching
    clips of one sign only would halve the time and costs 1 % of error at 4 bits.
    """
    low, high = -levels[:, 0], levels[:, -1]
    top, bottom = weight.amax(1).clamp(min=0), -weight.amin(1).clamp(max=0)
    plus, minus = torch.maximum(bottom / low, top / high), torch.maximum(top / low, bottom / high)
    doublings = range(levels.shape[1].bit_length() - 1 if _is_even(levels) else 0)
    sizes = [torch.maximum(top, bottom) / low * 2.0**j for j in doublings]
    sizes += [plus * clip for clip in CLIPS]
    return [*sizes, *(-size for size in sizes[: len(doublings)]), *(-minus * clip for clip in CLIPS)]


def _is_even(levels: Float64[Tensor, "r l"]) -> bool:
    step = levels.diff(dim=1)
    return len(levels) == 1 and bool((step == step[0, 0]).all()) and float(step[0, 0]) > 0


def _runs(matrix: Float64[Tensor, "out in"], group: int) -> Float64[Tensor, "runs n"]:
    """Return one line per row and group, the last group filled up with zeros."""
    if not group:
        return matrix
    columns = matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, -columns % group)).reshape(-1, group)
