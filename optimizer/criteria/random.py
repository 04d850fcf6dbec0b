"""Random: every unit draws a number in [0, 1); what any criterion has to beat.

Comparable as it is: a global ranking removes the same part of every group, but for chance.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float64
from torch import Tensor

from ..groups import Group
from ..importance import ChannelStats, bury, consumers, dead
from ..model import Model

needs: frozenset[str] = frozenset()


def score(model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]:
    """Return numbers drawn with the run's seed and the group's name; 0 for a dead unit."""
    digest = hashlib.sha256(f"{stats.seed}:{group.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    drawn = torch.rand(len(group.units), generator=generator, dtype=torch.float64)
    return bury(drawn, dead(consumers(model, group)))
