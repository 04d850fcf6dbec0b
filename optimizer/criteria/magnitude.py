"""Magnitude: the squares of all weights that go with a unit, what writes it and what reads it alike.

The group L2 importance of Torch-Pruning (Fang et al. 2023, "DepGraph"), divided by the group's mean, so that 1 is the
average unit of every group. Matrices and the gains of normalizations count, biases and statistics do not.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from ..groups import Group
from ..importance import ChannelStats, bury, consumers, dead, energies, over_mean
from ..model import Model

needs: frozenset[str] = frozenset()


def score(model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]:
    """Return sum of w^2 over each unit's weights, as a multiple of the group's mean."""
    return over_mean(bury(energies(model, group), dead(consumers(model, group))))
