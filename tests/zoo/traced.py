"""Networks of the zoo with batches of several sizes and their graphs, captured once a session."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor, nn

from paredown.optimizer.model import Model
from paredown.optimizer.walk import Traced, trace

from .nets import ZOO, Net


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A network, a module of it that no test may change, and batches of sizes 3, 1 and 2 (the last one longer)."""

    net: Net
    model: Model
    module: nn.Module
    traced: Traced

    @property
    def batches(self) -> tuple[tuple[Tensor, ...], ...]:
        return self.traced.batches


@functools.cache
def case(name: str) -> Case:
    """Return a network of the zoo with its graphs."""
    net = ZOO[name]
    longer = {"queries": 3, "time": net.sizes["time"] + 2} if net.sizes else {}
    batches = [net.batch(3, 0), net.batch(1, 1), net.batch(2, 2, **longer)]
    model = net.model()
    module = model.module()
    return Case(net=net, model=model, module=module, traced=trace(module, batches))
