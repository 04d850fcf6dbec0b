"""Levels by weighted k-means (SqueezeLLM, Kim et al. 2024, with the gram's diagonal in place of the Fisher's)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..clusters import fit_table, lloyd
from ..codes import Format, on_int8_grid, prepare
from ..scales import codebook, uniform
from ..stats import LayerStats
from ..weight import Weight

needs: frozenset[str] = frozenset({"gram"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One table per tensor or per 16 rows, where SqueezeLLM has one per row (16 fp16 entries are 1.8 bits of 144)."""

    format: Format


def quantize(w: Float[Tensor, "out in"], stats: LayerStats | None, spec: Spec) -> Weight:
    """Return the weight on a table of centroids; at 8 bits with an int8 table the int8 grid itself (`Uniform`)."""
    job = prepare(w, stats, spec.format)
    if on_int8_grid(spec.format):
        return uniform(job)
    return codebook(job, *fit_table(job, lloyd))
