"""Batch normalization's gains: |gamma| of a channel, small where training with an L1 penalty gave it up.

Network slimming (Liu et al. 2017, section 3). Where a unit has several gains their mean counts. Divided by the group's
mean (as Torch-Pruning does; the paper compares gains as they are, which needs its training to be fair between layers).
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from ..errors import InfeasibleError
from ..groups import Group, Unit
from ..importance import ChannelStats, bury, consumers, dead, over_mean
from ..model import Model

needs: frozenset[str] = frozenset()


def score(model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]:
    """Return mean |gamma| of each unit, as a multiple of the group's mean; an InfeasibleError where it has none."""
    gains = _gains(model)
    means = [_mean(unit, gains) for unit in group.units]
    if any(mean is None for mean in means):
        raise InfeasibleError(
            "it has no batch normalization with gains",
            where=f'group "{group.name}"',
            fix="use another criterion, or skip its layers",
        )
    found = torch.tensor(means, dtype=torch.float64)
    return over_mean(bury(found, dead(consumers(model, group))))


def _gains(model: Model) -> dict[str, Tensor]:
    modules = model.skeleton.named_modules()
    names = [f"{path}.weight".lstrip(".") for path, m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return {name: model.tensors[name].double().abs() for name in names if name in model.tensors}


def _mean(unit: Unit, gains: dict[str, Tensor]) -> float | None:
    found = [gains[part.param][part.index] for part in unit.parts if part.axis == "elements" and part.param in gains]
    return float(torch.cat(found).mean()) if found else None
