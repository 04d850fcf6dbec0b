"""FLAP: how much a unit fluctuates, times the weights that read it; what does not fluctuate is a bias.

An et al. 2024 (arXiv 2312.11983): variance of x_j times ||W_:,j||^2, summed over a unit's columns and the layers that
read it, then standardized within the group (mean 0, deviation 1), which makes groups comparable.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ..errors import InfeasibleError
from ..groups import Group
from ..importance import ChannelStats, Reading, readers, readings
from ..model import Model

needs = frozenset({"gram", "mean"})


def score(model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]:
    """Return the standardized fluctuation of each unit; zeros where all fluctuate alike."""
    found = torch.zeros(len(group.units), dtype=torch.float64)
    for reading in readings(readers(model, group), stats):
        columns = _fluctuations(reading)
        found = found + torch.stack([columns[index].sum() for index in reading.columns])
    spread = found.std(correction=0)
    return (found - found.mean()) / spread if float(spread) > 0 else torch.zeros_like(found)


def _fluctuations(reading: Reading) -> Float64[Tensor, "in"]:
    if reading.mean is None:
        raise InfeasibleError("flap needs the means of inputs, and they were not gathered")
    variance = reading.gram.diagonal() / max(reading.rows, 1) - reading.mean.square()
    return variance.clamp(min=0) * reading.weight.square().sum(0)
