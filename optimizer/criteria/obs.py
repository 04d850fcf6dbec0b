"""OBS: what it costs the layers that read a unit to do without it, after their other columns have made up for it.

Structured optimal brain surgeon (Hassibi and Stork 1993; groups as in ZipLM, Kurtic et al. 2023), of each unit alone.
The part of the readers' output energy that is lost, summed over readers: comparable across groups as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from .. import obs
from ..groups import Group
from ..importance import ChannelStats, Reading, bury, dead, readers, readings
from ..model import Model

needs = frozenset({"gram"})


def score(model: Model, group: Group, stats: ChannelStats) -> Float64[Tensor, "units"]:
    """Return the sum over readers of the exact cost of a unit's removal over tr(W H W^T)."""
    found = readers(model, group)
    parts = torch.stack([_losses(reading) for reading in readings(found, stats)])
    return bury(parts.sum(0), dead(found, stats))


def removal(model: Model, group: Group, places: Sequence[int], stats: ChannelStats) -> obs.Elimination:
    """Remove all but one of the units `places`, each time the one whose readers lose least of their energy."""
    problems = []
    for reading in readings(readers(model, group), stats):
        whole = float(obs.energy(reading.weight, reading.gram))
        units = [reading.columns[place] for place in places]
        scale = 1.0 / whole if whole > 0 else 0.0
        problems.append(obs.Problem(weight=reading.weight, gram=reading.gram, units=units, scale=scale))
    return obs.eliminate_jointly(problems, len(places) - 1)


def _losses(reading: Reading) -> Float64[Tensor, "units"]:
    problem = obs.Problem(weight=reading.weight, gram=reading.gram, units=reading.columns)
    whole = obs.energy(reading.weight, reading.gram)
    return obs.removal_costs(problem) / whole if float(whole) > 0 else torch.zeros(len(reading.columns)).double()
