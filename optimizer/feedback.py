"""Choose codes: nearest, or column by column with each error compensated by the columns still to come.

GPTQ (Frantar et al. 2023, algorithm 1), which is OBQ (Frantar & Alistarh 2022) in one order for all rows. Differences:
rows of all conv groups run side by side, any grid, and a row keeps nearest codes where those do better on the gram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float64, Int64, Shaped, UInt8
from numpy import ndarray
from torch import Tensor

from .codes import MIN_DAMPING, Grid, Job, damp, midpoints

BLOCK = 128
"""Columns whose errors reach the later ones in one matrix product. 64 to 256 time alike on 64x576 and 1024x1024."""

Columns: TypeAlias = Float64[ndarray, "groups in rows"]
"""A weight with its conv groups apart and transposed: numpy works on one contiguous column of all rows at a time,
where a call costs 1 us against torch's 4."""


def assign(job: Job, grid: Grid) -> UInt8[Tensor, "out in"]:
    """Return codes on a grid as the job's format asks: nearest, or with feedback."""
    near = grid.nearest(job.weight)
    if not job.format.feedback or job.gram is None:
        return near
    fed = feedback(job, grid)
    loss_near, loss_fed = (row_losses(grid.values(codes) - job.weight, job.gram) for codes in (near, fed))
    return torch.where((loss_fed < loss_near)[:, None], fed, near)


def feedback(job: Job, grid: Grid) -> UInt8[Tensor, "out in"]:
    """Return the codes of GPTQ; raises nothing for singular grams, whose damping is raised until they factorize."""
    assert job.gram is not None
    order = _order(job.gram, act_order=job.format.act_order)
    root = _inverse_root(_permute(job.gram, order), job.format.damping).numpy()
    reader = ColumnGrid.of(grid, job.weight.shape[1], order.numpy())
    weight = np.take_along_axis(to_columns(job.weight, len(job.gram)), order.numpy()[:, :, None], axis=1)
    codes = np.empty(weight.shape, dtype=np.uint8)
    for start in range(0, weight.shape[1], BLOCK):
        _feed_block(weight, codes, root, reader, start)
    result = np.empty_like(codes)
    np.put_along_axis(result, order.numpy()[:, :, None], codes, axis=1)
    return from_columns(result)


def row_losses(delta: Float64[Tensor, "out in"], gram: Float64[Tensor, "groups in in"]) -> Float64[Tensor, " out"]:
    """Return d H d^T for every row d of a difference: its squared output error on the calibration set."""
    rows = delta.reshape(len(gram), -1, delta.shape[1])
    return ((rows @ gram) * rows).sum(2).flatten()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnGrid:
    """A grid read one column at a time, all rows at once, in any order of columns."""

    levels: Float64[ndarray, " flat"]
    edges: Float64[ndarray, "edges out_or_1"]
    offset: Int64[ndarray, " out"]
    scale: Float64[ndarray, "in out"]

    @classmethod
    def of(cls, grid: Grid, columns: int, order: Int64[ndarray, "groups in"] | None = None) -> ColumnGrid:
        """Prepare a grid for columns in their own order, or in an order per conv group."""
        edges, blocks = midpoints(grid.levels), grid.blocks()
        scale = grid.scale.numpy().T
        if grid.group:
            scale = grid.expanded_scale(columns).numpy().T
            scale = scale if order is None else _reorder(scale, order)
        return cls(
            levels=grid.levels.numpy().ravel(),
            edges=np.ascontiguousarray((edges if len(edges) == 1 else edges[blocks]).numpy().T),
            offset=(blocks * grid.levels.shape[1]).numpy(),
            scale=np.ascontiguousarray(scale),
        )

    def column_scale(self, column: int) -> Float64[ndarray, " out"]:
        scale: Float64[ndarray, " out"] = self.scale[column if len(self.scale) > 1 else 0]
        return scale

    def snap(
        self, values: Float64[ndarray, " out"], column: int
    ) -> tuple[UInt8[ndarray, " out"], Float64[ndarray, " out"]]:
        """Return (codes, values on the grid) nearest to one column."""
        scale = self.column_scale(column)
        normal = values / np.where(scale == 0, 1.0, scale)
        codes = np.add.reduce(np.greater(normal, self.edges).view(np.uint8), axis=0, dtype=np.uint8)
        return codes, self.levels[codes + self.offset] * scale


def to_columns(weight: Shaped[Tensor, "out in"], groups: int) -> Shaped[ndarray, "groups in rows"]:
    """Split rows into conv groups and put columns before rows; a copy."""
    return np.ascontiguousarray(weight.reshape(groups, -1, weight.shape[1]).numpy().transpose(0, 2, 1))


def from_columns(columns: UInt8[ndarray, "groups in rows"]) -> UInt8[Tensor, "out in"]:
    """Undo `to_columns`."""
    return torch.from_numpy(np.ascontiguousarray(columns.transpose(0, 2, 1)).reshape(-1, columns.shape[1]))


def product(left: Float64[ndarray, "groups a b"], right: Float64[ndarray, "groups b c"]) -> Float64[ndarray, "g a c"]:
    """Multiply by torch, whose threads the caller has set, and not by the BLAS of numpy, which takes all cores."""
    result: Float64[ndarray, "g a c"] = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    return result


def _feed_block(
    weight: Columns, codes: UInt8[ndarray, "groups in rows"], root: ndarray, reader: ColumnGrid, start: int
) -> None:
    """Quantize columns start..start+BLOCK of `weight`, writing codes, and add their errors to all later columns."""
    groups, columns, rows = weight.shape
    stop = min(start + BLOCK, columns)
    errors = np.empty((groups, stop - start, rows))
    for i in range(start, stop):
        code, value = reader.snap(weight[:, i].ravel(), i)
        codes[:, i] = code.reshape(groups, rows)
        error = (weight[:, i] - value.reshape(groups, rows)) / root[:, i, i, None]
        weight[:, i + 1 : stop] -= root[:, i, i + 1 : stop, None] * error[:, None]
        errors[:, i - start] = error
    weight[:, stop:] -= product(root[:, start:stop, stop:].transpose(0, 2, 1), errors)


def _order(gram: Float64[Tensor, "groups in in"], *, act_order: bool) -> Int64[Tensor, "groups in"]:
    """Return the columns of each group by falling diagonal, or as they are."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    if not act_order:
        return torch.arange(diagonal.shape[1]).expand_as(diagonal)
    return diagonal.argsort(dim=1, descending=True, stable=True)


def _permute(gram: Float64[Tensor, "groups in in"], order: Int64[Tensor, "groups in"]) -> Float64[Tensor, "g i i"]:
    return torch.stack([matrix[index][:, index] for matrix, index in zip(gram, order, strict=True)])


def _reorder(scale: Float64[ndarray, "in out"], order: Int64[ndarray, "groups in"]) -> Float64[ndarray, "in out"]:
    grouped = scale.reshape(scale.shape[0], len(order), -1)
    return np.take_along_axis(grouped, order.T[:, :, None], axis=0).reshape(scale.shape)


def _inverse_root(gram: Float64[Tensor, "groups in in"], damping: float) -> Float64[Tensor, "groups in in"]:
    """Return upper triangular U with U^T U = (gram + damping)^-1, damping ten times as much until it factorizes.

    With both axes flipped, gram = L L^T makes M = flip(L) upper triangular and gram = M M^T, so U = M^-1: one Cholesky
    and one triangular inverse instead of an inverse and a second Cholesky.
    """
    while True:
        lower, info = torch.linalg.cholesky_ex(damp(gram, damping).flip(1, 2))
        if not bool(info.any()):
            break
        damping = max(damping * 10, MIN_DAMPING)
    eye = torch.eye(gram.shape[1], dtype=torch.float64).expand_as(gram)
    root: Tensor = torch.linalg.solve_triangular(lower.flip(1, 2), eye, upper=True)
    return root
