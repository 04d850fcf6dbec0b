"""Names of the values in a network's graph that do not change from one capture to the next.

"layer1.0/relu#2" is the second result of an operator `relu` that the module at "layer1.0" computes itself; "input/x"
is an input of the network. Numbers count within one module, so that a node more or less elsewhere changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from .graph import module_path
from .model import InputSpec


def operator_name(node: fx.Node) -> str:
    """Return what an operator is called, whatever its overload and whether it writes in place: "relu", "conv2d"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2].rstrip("_")
    return str(getattr(node.target, "__name__", node.target))


def value_names(nodes: Iterable[fx.Node], user_inputs: Sequence[str], inputs: Sequence[InputSpec]) -> dict[str, str]:
    """Return node name -> stable name, for the inputs and for each call that makes a tensor.

    user_inputs: the placeholders of `inputs`, in order.
    """
    known = {name: f"input/{spec.name}" for name, spec in zip(user_inputs, inputs, strict=True)}
    seen: Counter[str] = Counter()
    found: dict[str, str] = {}
    for node in nodes:
        if node.op == "placeholder" and node.name in known:
            found[node.name] = known[node.name]
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            stem = f"{module_path(node)}/{operator_name(node)}"
            seen[stem] += 1
            found[node.name] = stem if seen[stem] == 1 else f"{stem}#{seen[stem]}"
    return found
