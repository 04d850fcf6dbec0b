"""Formats of quantized weights, and the rounding that every quantizer shares.

Order of work in every quantizer: levels and scales are found in float64, rounded to what is stored (`round_table`,
`round_scale`), and only then are codes chosen, so that codes fit the levels that `dense()` ships.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Float16, Float64, Int8, Int64, UInt8
from torch import Tensor

from .errors import InputError, RecipeError
from .stats import LayerStats
from .weight import TABLE_UNIT, Codebook, Uniform

BLOCK_ROWS = 16
"""Rows that share a table when not the whole tensor does: the height of a kernel's tile."""
INT8_STEPS = tuple(range(127, 95, -1))
"""Heights that an int8 table may be stretched to; a lower one can hit all levels better (15 * 8 for 8 even steps)."""
MIN_DAMPING = 1e-8
COMPARED_EDGES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A low rank added to the quantized matrix: rank, bits of its factors, and how often both are fitted in turn."""

    rank: int
    bits: int = 8
    rounds: int = 6

    def __post_init__(self) -> None:
        if self.rank < 1 or self.rounds < 1:
            raise RecipeError(f"rank={self.rank}, rounds={self.rounds} is out of range", fix="use 1 or more of each")
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"bits={self.bits} is not supported", fix="use 2, 3, 4 or 8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How codes, tables and scales are stored, and whether codes are chosen with error feedback.

    group: inputs per scale, 0 = one scale per row. table_rows: 16 = one table per block of 16 rows, 0 = one for all.
    feedback: choose codes column by column, compensating errors (needs the gram of the inputs); act_order: the columns
    with the largest inputs first; damping: fraction of the gram's mean diagonal that is added to its diagonal.
    residual: a low rank beside the codes, which the quantize step adds whatever the quantizer.
    """

    bits: int = 4
    group: int = field(default=0, metadata={"aliases": {"row": 0}})
    table: Literal["int8", "fp16"] = "int8"
    table_rows: int = 0
    feedback: bool = False
    act_order: bool = True
    damping: float = 0.01
    residual: Residual | None = None

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise RecipeError(f"bits={self.bits} is not supported", fix="use 2, 3, 4 or 8")
        if self.group < 0:
            raise RecipeError(f"group={self.group} is negative", fix="use 0 (one scale per row) or inputs per scale")
        if self.table not in ("int8", "fp16"):
            raise RecipeError(f'table="{self.table}" is not supported', fix='use "int8" or "fp16"')
        if self.table_rows not in (0, BLOCK_ROWS):
            raise RecipeError(
                f"table_rows={self.table_rows} is not supported",
                fix=f"use 0 (one table per tensor) or {BLOCK_ROWS} (one per {BLOCK_ROWS} rows)",
            )
        if not 0.0 <= self.damping < math.inf:
            raise RecipeError(f"damping={self.damping} is out of range", fix="use a fraction such as 0.01")

    @property
    def levels(self) -> int:
        return int(2**self.bits)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A checked weight with what its calibration says, in float64.

    gram: sum of x x^T per conv group, rows of the weight being split into as many equal runs; None without calibration.
    importance: diagonal of the damped gram for each weight (ones without calibration), the weight of its squared error.
    """

    weight: Float64[Tensor, "out in"]
    gram: Float64[Tensor, "groups in in"] | None
    importance: Float64[Tensor, "out in"]
    format: Format
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """The values that codes can take: levels[block of row, code] * scale[row, group], exactly as shipped.

    Levels ascend within a block; one block, or one per `table_rows` rows. Scales may be negative or zero.
    """

    levels: Float64[Tensor, "blocks levels"]
    scale: Float64[Tensor, "out groups"]
    group: int = 0
    table_rows: int = 0

    def nearest(self, weight: Float64[Tensor, "out in"]) -> UInt8[Tensor, "out in"]:
        """Return the code of the level nearest to each weight; of two equally near, the lower."""
        normal = weight / _nonzero(self.expanded_scale(weight.shape[1]))
        shared = len(self.levels) == 1
        return count_below(normal, midpoints(self.levels if shared else self.levels[self.blocks()]))

    def values(self, codes: UInt8[Tensor, "out in"]) -> Float64[Tensor, "out in"]:
        """Return what codes mean; differs from `dense()` only by the rounding of the product to float32."""
        levels = self.levels[self.blocks()].gather(1, codes.long())
        return levels * self.expanded_scale(codes.shape[1])

    def blocks(self) -> Int64[Tensor, " out"]:
        """Return the block of each row."""
        return row_blocks(len(self.scale), self.table_rows)

    def expanded_scale(self, columns: int) -> Float64[Tensor, "out in"]:
        """Return one scale per weight."""
        if not self.group:
            return self.scale.expand(-1, columns)
        return self.scale.repeat_interleave(self.group, dim=1)[:, :columns]


def prepare(weight: Float[Tensor, "out in"], stats: LayerStats | None, spec: Format) -> Job:
    """Check a weight and its statistics against a format; raise InputError or RecipeError."""
    if weight.ndim != 2 or not weight.numel():
        raise InputError(f"weight of shape {tuple(weight.shape)} cannot be quantized", fix="keep it dense")
    values = weight.detach().double()
    if not bool(values.isfinite().all()):
        raise InputError(f"weight has {int((~values.isfinite()).sum())} values that are not finite")
    gram = None if stats is None else stats.gram
    if spec.feedback and gram is None:
        raise RecipeError(
            "feedback needs calibration data, and this layer has none", fix="give data: or set feedback: false"
        )
    _check_gram(gram, values)
    importance = _importance(values, gram, spec.damping)
    return Job(weight=values, gram=gram, importance=importance, format=spec, dtype=weight.dtype)


def damp(gram: Float64[Tensor, "groups in in"], damping: float) -> Float64[Tensor, "groups in in"]:
    """Add `damping` times the mean diagonal to the diagonal; an all-zero gram becomes a multiple of the identity."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    mean = torch.where(mean > 0, mean, mean.mean())
    ridge = torch.where(mean > 0, mean * damping, 1.0)
    return gram + ridge[:, None, None] * torch.eye(gram.shape[1], dtype=torch.float64)


def round_scale(scale: Float64[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """Round scales to the 11 bits of fp16's mantissa; store as fp16, or all as fp32 if one leaves its normal range.

    So the values do not depend on the storage, and a weight times a power of two has its scales times the same.
    """
    rounded = half_mantissa(scale)
    size = rounded[rounded != 0].abs()
    half = torch.finfo(torch.float16)
    fits = not size.numel() or (float(size.min()) >= half.smallest_normal and float(size.max()) <= half.max)
    return rounded.to(torch.float16 if fits else torch.float32)


def half_mantissa(values: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Round to 11 significant bits, half to even: fp16 without its range."""
    mantissa, exponent = values.frexp()
    return torch.ldexp(mantissa.mul(2048.0).round_(), exponent - 11)


def round_table(
    levels: Float64[Tensor, "blocks levels"], kind: Literal["int8", "fp16"]
) -> tuple[Int8[Tensor, "blocks levels"] | Float16[Tensor, "blocks levels"], Float64[Tensor, " blocks"]]:
    """Round ascending levels of any magnitude to table entries; return them and the factor that scales must take.

    The largest entry of an fp16 table is 1; that of an int8 table is the one of `INT8_STEPS` with the least error.
    """
    height = levels.abs().amax(1)
    height = torch.where(height > 0, height, 1.0)
    unit = levels / height[:, None]
    if kind == "fp16":
        return unit.to(torch.float16), height
    steps = torch.tensor(INT8_STEPS, dtype=torch.float64)
    rounded = (unit[:, None] * steps[:, None]).round()
    error = (rounded / steps[:, None] - unit[:, None]).square().sum(2)
    best = error.argmin(1)
    table = rounded[torch.arange(len(levels)), best]
    return table.to(torch.int8), height * 127.0 / steps[best]


def table_levels(table: Int8[Tensor, "blocks levels"] | Float16[Tensor, "blocks levels"]) -> Float64[Tensor, "b l"]:
    """Return the values of table entries as `Codebook.dense` computes them."""
    unit = TABLE_UNIT if table.dtype == torch.int8 else 1.0
    return (table.float() * torch.tensor(unit)).double()


def stored_levels(
    levels: Float64[Tensor, "blocks levels"], kind: Literal["int8", "fp16"]
) -> Float64[Tensor, "blocks levels"]:
    """Return what levels become in a table; tables made of the result hold exactly these."""
    return table_levels(round_table(levels, kind)[0])


def as_codebook(
    codes: UInt8[Tensor, "out in"], table: Tensor, scale: Float[Tensor, "out groups"], job: Job
) -> Codebook:
    """Assemble a Codebook in the job's format."""
    spec = job.format
    return Codebook(
        codes=codes,
        table=table,
        scale=scale,
        code_bits=spec.bits,
        group=spec.group,
        table_rows=spec.table_rows,
        dtype=job.dtype,
    )


def grid_of(weight: Codebook | Uniform) -> Grid:
    """Return the grid that a weight's codes index."""
    scale = weight.scale.double()
    if isinstance(weight, Codebook):
        levels = table_levels(weight.table)
        return Grid(levels=levels, scale=scale, group=weight.group, table_rows=weight.table_rows)
    levels = torch.arange(2**weight.code_bits, dtype=torch.float64) - weight.zero
    return Grid(levels=levels[None], scale=scale, group=weight.group)


def on_int8_grid(spec: Format) -> bool:
    """Return whether a table is the int8 grid itself: 256 entries of int8 leave nothing to choose but the scales."""
    return spec.bits == 8 and spec.table == "int8"


def midpoints(levels: Float64[Tensor, "blocks levels"]) -> Float64[Tensor, "blocks edges"]:
    """Return the decision edges between neighbouring levels."""
    return (levels[:, 1:] + levels[:, :-1]) / 2


def count_below(
    values: Float64[Tensor, "rows columns"], edges: Float64[Tensor, "rows_or_1 edges"]
) -> UInt8[Tensor, "rows columns"]:
    """Return how many of its row's rising edges lie below each value: the code of the level between them.

    Comparing with 15 edges one by one takes 10 ns a value, a binary search (for the 255 edges of 8 bits) 50.
    """
    if edges.shape[1] > COMPARED_EDGES:
        edges = edges[0] if len(edges) == 1 else edges
        return torch.searchsorted(edges.contiguous(), values.contiguous()).to(torch.uint8)
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    for column in edges.T:
        codes += values > column[:, None]
    return codes


def row_blocks(rows: int, table_rows: int) -> Int64[Tensor, " out"]:
    """Return the index of each row's table."""
    index = torch.arange(rows)
    return index // table_rows if table_rows else index * 0


def _nonzero(scale: Float64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    return torch.where(scale == 0, 1.0, scale)


def _check_gram(gram: Float64[Tensor, "groups in in"] | None, weight: Float64[Tensor, "out in"]) -> None:
    if gram is None:
        return
    rows, columns = weight.shape
    if gram.ndim != 3 or gram.shape[1:] != (columns, columns) or rows % gram.shape[0]:
        raise InputError(f"gram {tuple(gram.shape)} does not belong to a weight of shape {(rows, columns)}")
    if not bool(gram.isfinite().all()):
        raise InputError("gram has values that are not finite", fix="look for overflow in the calibration data")


def _importance(
    weight: Float64[Tensor, "out in"], gram: Float64[Tensor, "groups in in"] | None, damping: float
) -> Float64[Tensor, "out in"]:
    """Return the damped gram's diagonal for every weight, scaled to a mean of 1."""
    if gram is None:
        return torch.ones_like(weight)
    diagonal = damp(gram, max(damping, MIN_DAMPING)).diagonal(dim1=1, dim2=2)
    return (diagonal / diagonal.mean()).repeat_interleave(len(weight) // len(gram), dim=0)
