"""Quantize with low ranks: the factors of a product, or a matrix plus a low rank of what quantization lost (Q + LR)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float, Float64
from torch import Tensor

from .codes import Format, Residual, prepare
from .lowrank import refit_left, spectrum
from .scales import uniform
from .stats import LayerStats
from .steps import output_error
from .weight import Dense, LowRank, Sum, Weight

Quantize: TypeAlias = Callable[[Tensor, LayerStats], Weight]
"""A quantizer with its Spec: a matrix and what it saw -> a weight."""
SCALE_BITS = 16
"""What each row's scale takes: they are stored in float16."""


def solve(old: Dense | LowRank, stats: LayerStats, spec: Residual | None, quantize: Quantize) -> Weight:
    """Quantize a layer: both factors of a low rank, else the matrix, with a residual where one is asked for."""
    if isinstance(old, LowRank):
        return factors(old, stats, quantize)
    plain = quantize(old.values, stats)
    if spec is None or _refused(plain, old, stats, spec):
        return plain
    return with_residual(old.values, stats, spec, quantize, plain)


def lacking(weight: Weight, old: Dense | LowRank, stats: LayerStats, spec: Residual | None) -> str:
    """Return why a layer that `solve` made has no residual, "" if it has one or none was asked for."""
    if spec is None or isinstance(weight, Sum):
        return ""
    return _refused(weight, old, stats, spec) or "the output error is no smaller with it"


def factors(weight: LowRank, stats: LayerStats, quantize: Quantize) -> LowRank:
    """Quantize both factors: the right one on the layer's inputs, then the left one, fitted anew, on what it gives it.

    The product with the refitted left factor is nearest to the weight for the quantized right one, so what rounding the
    left one adds is exactly its error on the gram R G R^T.
    """
    gram = None if stats.gram is None else stats.gram.sum(0)  # of all runs of rows: the right factor serves them all
    right = quantize(weight.right.dense(), LayerStats(rows=stats.rows, gram=None if gram is None else gram[None]))
    return LowRank(left=_left(weight.dense(), right, gram, quantize), right=right)


def with_residual(
    matrix: Float[Tensor, "out in"], stats: LayerStats, spec: Residual, quantize: Quantize, plain: Weight
) -> Weight:
    """Return Q + LR, or `plain`, which is Q alone, where that has no larger output error.

    Alternates Q = quantize(W - LR) with LR, the whitened SVD of W - Q with quantized factors, and keeps the best pair
    (Saha et al. 2024, "CALDERA", algorithm 1, which starts from the low rank of W; starting from Q, which is needed
    anyway, was as often better: four shapes at 2 bits, six rounds, errors within 7 % of each other both ways).
    """
    best, least, base = plain, output_error(matrix, plain.dense(), stats), plain
    for _ in range(spec.rounds):
        low = _low_rank(matrix - base.dense(), stats, spec)
        error = output_error(matrix, Sum(terms=(base, low)).dense(), stats)
        if error < least:
            best, least = Sum(terms=(base, low)), error
        base = quantize(matrix - low.dense(), stats)
    return best


def _refused(plain: Weight, old: Dense | LowRank, stats: LayerStats, spec: Residual) -> str:
    """Return why a layer cannot have a residual or gains nothing by one, whatever its values are."""
    if isinstance(old, LowRank):
        return "it is a low rank already"
    if stats.gram is not None and len(stats.gram) > 1:
        return "its rows have inputs of their own, which no one low rank serves"
    rank = min(spec.rank, *old.shape)
    added = spec.bits * rank * sum(old.shape) + SCALE_BITS * (old.shape[0] + rank)
    return "with it the layer takes as much as its floats" if plain.bits() + added >= old.bits() else ""


def _low_rank(matrix: Float[Tensor, "out in"], stats: LayerStats, spec: Residual) -> LowRank:
    """Return the whitened SVD of a matrix with quantized factors, one scale per row."""

    def quantize(factor: Tensor, seen: LayerStats) -> Weight:
        return uniform(prepare(factor, seen, Format(bits=spec.bits, feedback=seen.gram is not None)))

    gram = None if stats.gram is None else stats.gram[0]
    _, right = spectrum(matrix, gram).factors(min(spec.rank, *matrix.shape))
    rounded = quantize(right.to(matrix.dtype), LayerStats(rows=stats.rows, gram=stats.gram))
    return LowRank(left=_left(matrix, rounded, gram, quantize), right=rounded)


def _left(
    matrix: Float[Tensor, "out in"], right: Weight, gram: Float64[Tensor, "in in"] | None, quantize: Quantize
) -> Weight:
    """Fit the left factor to a finished right one and quantize it on what that gives it."""
    values = right.dense().double()
    inner = values @ values.T if gram is None else values @ gram @ values.T
    target = refit_left(matrix, values, gram).to(matrix.dtype)
    return quantize(target, LayerStats(rows=0, gram=inner[None]))
