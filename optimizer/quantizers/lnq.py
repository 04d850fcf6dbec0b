"""Layer-wise non-uniform quantization (LNQ; Kim et al. 2025, "GuidedQuant", section 4): table, scale and codes in turn.

Minimizes tr((Q - W) H (Q - W)^T), H the damped gram, by three steps that never raise it: the table in closed form, each
scale in closed form, and one code after the other by cyclic coordinate descent. Differs from the paper: one table for
all rows (or per 16 rows), each row with its scale, where the paper has a table per row and no scales; and the start
may be GPTQ on the k-means table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from torch import Tensor

from ..clusters import fit_table, lloyd
from ..codes import (
    MIN_DAMPING,
    Format,
    Grid,
    Job,
    as_codebook,
    damp,
    grid_of,
    on_int8_grid,
    prepare,
    round_scale,
    round_table,
    table_levels,
)
from ..errors import RecipeError
from ..feedback import BLOCK, ColumnGrid, Columns, from_columns, product, to_columns
from ..scales import codebook, uniform
from ..stats import LayerStats
from ..weight import Codebook, Weight

needs: frozenset[str] = frozenset({"gram"})

RIDGE = 1e-7
"""Of the mean diagonal of a table's normal equations (the paper's lambda); it pulls towards the table before."""
ENOUGH = 1e-3
"""On Gaussian and Laplace 64x576 at 2 to 4 bits, 16 rounds gain less than this over 4 (2 with this stop)."""
FINAL_CYCLES = 4
"""Descents on the rounded grid at most; each stops the rest when it changes no code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """rounds: alternations of table, scale and codes; cycles: descents over all columns in each."""

    format: Format
    rounds: int = 4
    cycles: int = 2

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.cycles < 1:
            raise RecipeError(f"rounds={self.rounds}, cycles={self.cycles} is out of range", fix="use 4 and 2")


def quantize(w: Float[Tensor, "out in"], stats: LayerStats | None, spec: Spec) -> Weight:
    """Return the weight on a table fitted to its layer's outputs; never worse there than k-means with the same format.

    Without a gram, H is the identity and this is k-means. At 8 bits only codes are improved (a table of 256 costs 256
    products and gains nothing), and with an int8 table the result is the int8 grid itself (`Uniform`).
    """
    job = prepare(w, stats, spec.format)
    if on_int8_grid(spec.format):
        return uniform(job)
    start = codebook(job, *fit_table(job, lloyd))
    if job.gram is None:
        return start
    layer = Layer.of(job)
    rounds = 0 if spec.format.bits == 8 else spec.rounds
    state, _ = descend(layer, State.of(grid_of(start), start.codes, layer), rounds, spec.cycles)
    final = _rounded(layer, state, job)
    losses = [layer.loss(State.of(grid_of(weight), weight.codes, layer)) for weight in (start, final)]
    return final if losses[1] < losses[0] else start


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """What does not change: the weight, transposed, its damped gram H, and H times the weight."""

    weight: Columns
    gram: Float64[ndarray, "groups in in"]
    image: Columns
    format: Format

    @classmethod
    def of(cls, job: Job) -> Layer:
        assert job.gram is not None
        gram = damp(job.gram, max(job.format.damping, MIN_DAMPING)).numpy()
        weight = to_columns(job.weight, len(gram))
        return cls(weight=weight, gram=gram, image=product(gram, weight), format=job.format)

    def loss(self, state: State) -> float:
        """Return tr((Q - W) H (Q - W)^T)."""
        delta = state.values(self) - self.weight
        return float((product(self.gram, delta) * delta).sum())

    def runs(self) -> list[slice]:
        """Return the columns that share scales."""
        columns = self.weight.shape[1]
        step = self.format.group or columns
        return [slice(low, min(low + step, columns)) for low in range(0, columns, step)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """What the steps improve: codes, levels (rising within a block) and scales. `flat` indexes levels.ravel()."""

    flat: Int64[ndarray, "groups in rows"]
    levels: Float64[ndarray, "blocks levels"]
    scale: Float64[ndarray, "out runs"]

    @classmethod
    def of(cls, grid: Grid, codes: Tensor, layer: Layer) -> State:
        flat = codes.long() + grid.blocks()[:, None] * grid.levels.shape[1]
        return cls(flat=to_columns(flat, len(layer.gram)), levels=grid.levels.numpy(), scale=grid.scale.numpy())

    def grid(self, layer: Layer) -> Grid:
        return Grid(
            levels=torch.from_numpy(self.levels),
            scale=torch.from_numpy(self.scale),
            group=layer.format.group,
            table_rows=layer.format.table_rows,
        )

    def full_scale(self, layer: Layer) -> Columns:
        """Return one scale per weight."""
        groups, columns, _ = self.flat.shape
        scale = self.scale.reshape(groups, -1, self.scale.shape[1]).transpose(0, 2, 1)
        full: Columns = scale.repeat(layer.format.group or columns, axis=1)[:, :columns]
        return full

    def values(self, layer: Layer) -> Columns:
        values: Columns = self.levels.ravel()[self.flat] * self.full_scale(layer)
        return values


def descend(layer: Layer, state: State, rounds: int, cycles: int) -> tuple[State, list[float]]:
    """Alternate the three steps; return the last state and the loss at the start and after every half-step.

    Stops at `rounds`, or when one lowered the loss by less than `ENOUGH` of it.
    """
    trace = [layer.loss(state)]
    for _ in range(rounds):
        before = trace[-1]
        for step in (fit_levels, fit_scales):
            state = step(layer, state)
            trace.append(layer.loss(state))
        for _ in range(cycles):
            state = fit_codes(layer, state)
            trace.append(layer.loss(state))
        if trace[-1] > before * (1 - ENOUGH):
            break
    return state, trace


def fit_levels(layer: Layer, state: State) -> State:
    """Return the levels of least loss, by the normal equations of every table: A c = b with s the scales, P one-hot.

    A = sum over rows of s P^T H P s and b = sum of s P^T H w; one product H M per level, M = s where the code is it.
    The solve is for the change of c, with a ridge, so a level without codes stays.
    """
    blocks, count = state.levels.shape
    scale, flat = state.full_scale(layer), state.flat.ravel()
    code = state.flat % count
    normal = np.empty((blocks, count, count))
    for level in range(count):
        spread = scale * product(layer.gram, np.where(code == level, scale, 0.0))
        normal[:, :, level] = np.bincount(flat, spread.ravel(), blocks * count).reshape(blocks, count)
    moment = np.bincount(flat, (scale * layer.image).ravel(), blocks * count).reshape(blocks, count)
    slack = moment - (normal @ state.levels[:, :, None])[:, :, 0]
    ridge = RIDGE * np.trace(normal, axis1=1, axis2=2) / count
    ridge = np.where(ridge > 0, ridge, 1.0)[:, None, None] * np.eye(count)
    levels = state.levels + np.linalg.solve(normal + ridge, slack[:, :, None])[:, :, 0]
    return _sorted(replace(state, levels=levels))


def fit_scales(layer: Layer, state: State) -> State:
    """Return the scales of least loss: exact for one per row, one group after the other where there are several.

    With v the levels of a row in its group and d = Q - W, the scale moves by -(v H d) / (v H v).
    """
    picked = state.levels.ravel()[state.flat]
    delta, scale = state.values(layer) - layer.weight, state.scale.copy()
    for index, run in enumerate(layer.runs()):
        own = picked[:, run]
        slope = (own * product(layer.gram[:, run], delta)).sum(1)
        curve = (own * product(layer.gram[:, run, run], own)).sum(1)
        move = np.where(curve > 0, -slope / np.where(curve > 0, curve, 1.0), 0.0)
        delta[:, run] += own * move[:, None]
        scale[:, index] += move.ravel()
    return replace(state, scale=scale)


def fit_codes(layer: Layer, state: State) -> State:
    """Move every code, column after column, to the level of least loss given all others (one cycle).

    The loss is a parabola in one value q of curvature H_ii, with its bottom at q - (H d)_i / H_ii, so the best level is
    the nearest. H d is kept up to date within a block of columns and taken anew at its start.
    """
    reader = ColumnGrid.of(state.grid(layer), layer.weight.shape[1])
    values, flat = state.values(layer), state.flat.copy()
    delta = values - layer.weight
    for start in range(0, flat.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, flat.shape[1]))
        _descend_block(
            layer.gram[:, block, block],
            product(layer.gram[:, block], delta),
            values[:, block],
            flat[:, block],
            (reader, start),
        )
        delta[:, block] = values[:, block] - layer.weight[:, block]
    return replace(state, flat=flat)


def _descend_block(
    gram: Float64[ndarray, "groups b b"],
    slope: Columns,
    values: Columns,
    flat: Int64[ndarray, "groups b rows"],
    reader: tuple[ColumnGrid, int],
) -> None:
    """Update values and codes of a block in place; `slope` is H d for its columns."""
    grid, start = reader
    for i in range(values.shape[1]):
        target = values[:, i] - slope[:, i] / gram[:, i, i, None]
        code, value = grid.snap(target.ravel(), start + i)
        value = value.reshape(target.shape)
        slope[:, i + 1 :] += gram[:, i, i + 1 :, None] * (value - values[:, i])[:, None]
        values[:, i] = value
        flat[:, i] = (code + grid.offset).reshape(target.shape)


def _rounded(layer: Layer, state: State, job: Job) -> Codebook:
    """Round the table, fit scales to it, round them, and fit codes to both."""
    table, factor = round_table(torch.from_numpy(state.levels), job.format.table)
    rows = state.grid(layer).blocks()
    scale = state.scale * factor[rows].numpy()[:, None]
    state = fit_scales(layer, replace(state, levels=table_levels(table).numpy(), scale=scale))
    stored = round_scale(torch.from_numpy(state.scale))
    state = replace(state, scale=stored.double().numpy())
    for _ in range(FINAL_CYCLES):
        before, state = state, fit_codes(layer, state)
        if np.array_equal(before.flat, state.flat):
            break
    codes = from_columns((state.flat % job.format.levels).astype(np.uint8))
    return as_codebook(codes, table, stored, job)


def _sorted(state: State) -> State:
    """Put levels in rising order and codes with them."""
    blocks, count = state.levels.shape
    order = state.levels.argsort(axis=1, kind="stable")
    rank = order.argsort(axis=1) + np.arange(blocks)[:, None] * count
    return replace(state, flat=rank.ravel()[state.flat], levels=np.take_along_axis(state.levels, order, axis=1))
