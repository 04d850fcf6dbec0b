"""Levels at the quantiles of a normal distribution (NF4: Dettmers et al. 2023, appendix E), for any number of bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..codes import Format, on_int8_grid, prepare, stored_levels
from ..scales import absmax_scale, codebook, search_scale, uniform
from ..stats import LayerStats
from ..weight import Weight

needs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """clip: search the scale of least error (of either sign) instead of the largest magnitude."""

    format: Format
    clip: bool = False


def quantize(w: Float[Tensor, "out in"], stats: LayerStats | None, spec: Spec) -> Weight:
    """Return the weight on normal quantiles; at 8 bits with an int8 table the int8 grid itself (`Uniform`)."""
    job = prepare(w, stats, spec.format)
    if on_int8_grid(spec.format):
        return uniform(job)
    blocks = -(-len(w) // spec.format.table_rows) if spec.format.table_rows else 1
    levels = stored_levels(normal_levels(spec.format.bits).expand(blocks, -1), spec.format.table)
    return codebook(job, levels, search_scale(job, levels) if spec.clip else absmax_scale(job) / levels[0, -1])


def normal_levels(bits: int) -> Float64[Tensor, "1 levels"]:
    """Return 2**bits levels from -1 to 1 with an exact 0: half of them above 0, one less below.

    Both sides are normal quantiles at even steps of probability up to 1 - (1/(4h) + 1/(4h - 2))/2, h = 2**(bits-1):
    at 4 bits bitsandbytes' offset 0.9677083.
    """
    half = 2 ** (bits - 1)
    top = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    sides = [torch.linspace(top, 0.5, n + 1, dtype=torch.float64)[:-1] for n in (half, half - 1)]
    above, below = (torch.special.ndtri(side) for side in sides)
    levels = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels[-1])[None]
