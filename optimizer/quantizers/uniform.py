"""Even levels with a clip searched for every row or group."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..codes import Format, prepare
from ..scales import uniform
from ..stats import LayerStats
from ..weight import Weight

needs: frozenset[str] = frozenset({"gram"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """`format.table` and `format.table_rows` have no meaning here: the levels are integers."""

    format: Format


def quantize(w: Float[Tensor, "out in"], stats: LayerStats | None, spec: Spec) -> Weight:
    """Return the weight on even levels; with a gram, squared errors count by its diagonal."""
    return uniform(prepare(w, stats, spec.format))
