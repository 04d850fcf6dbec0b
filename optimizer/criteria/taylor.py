"""Taylor: how much the loss of a sample changes, to first order, when a unit is taken out.

Molchanov et al. 2017 (arXiv 1611.06440), section 2.2, at the inputs of the layers that read the unit: the mean over
samples of |sum over positions of x * dL/dx|; the channel form of SNIP's connection sensitivity (Lee et al. 2019). The
absolute value is taken for each sample: the loss is drawn from the network's own outputs, and the mean gradient over
draws is zero. In nats per sample: comparable across groups as it is (the paper divides by each layer's norm).
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from ..groups import Group
from ..importance import ChannelStats, gate_products, readers
from ..model import Model

needs = frozenset({"gates"})


def score(model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]:
    """Return the mean over samples of |dL/dg|, g a gate on the unit."""
    return gate_products(readers(model, group), stats).abs().mean(0)
