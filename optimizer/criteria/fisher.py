"""Fisher: how far the network's output distribution moves, to second order, when a unit is taken out.

Theis et al. 2018 (arXiv 1801.05787): half the mean over samples of (dL/dg)^2, g a gate on the unit. With losses drawn
from the network's own outputs this is its Fisher information, and the score the KL divergence from the output before,
in nats per sample: comparable across groups as it is. (The paper uses labels, the empirical Fisher.)
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from ..groups import Group
from ..importance import ChannelStats, gate_products, readers
from ..model import Model

needs = frozenset({"gates"})


def score(model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]:
    """Return half the mean over samples of (dL/dg)^2."""
    return 0.5 * gate_products(readers(model, group), stats).square().mean(0)
