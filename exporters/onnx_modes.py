"""How the layers of an exported file compute: read from the file, not from what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import onnx

from ..kernels.onnx_ops import CONV_OPS, DECODE, DOMAIN, LINEAR_OPS
from ..optimizer.model import Model
from ..optimizer.weight import Dense, LowRank, Sum, Weight

Mode: TypeAlias = Literal["exact", "int8 dynamic", "int8", "decoded", "dense"]
"""exact: packed, sums in float32. int8 dynamic: packed, inputs rounded at run time. int8: integers between static
grids. decoded: packed in the file, floats from the moment it is loaded. dense: floats in the file."""
_WORST: tuple[Mode, ...] = ("decoded", "int8 dynamic", "exact")
"""What a layer of several operators is said to be."""


def modes(path: Path, model: Model, integers: frozenset[str]) -> dict[str, Mode]:
    """Return the mode of each weight of a model in its file; `integers`: those that compute on static int8 grids."""
    found: dict[str, set[Mode]] = {name: set() for name in model.weights}
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.domain == DOMAIN:
            mode: Mode = "decoded" if node.op_type == DECODE else "exact"
            if node.op_type in CONV_OPS:
                mode = "int8 dynamic"
            if node.op_type in LINEAR_OPS and LINEAR_OPS[node.op_type].mode == "int8":
                mode = "int8 dynamic"
            for value in node.input:
                if owner := _owner(value, found):
                    found[owner].add(mode)
    return {name: "int8" if name in integers else _mode(weight, found[name]) for name, weight in model.weights.items()}


def _owner(value: str, names: Mapping[str, object]) -> str:
    """Return the parameter whose codes an input is, also as a term of a sum or a factor of a product."""
    if not value.endswith(".codes"):
        return ""
    stem = value
    while stem and stem not in names:
        stem = stem.rpartition(".")[0]
    return stem


def _mode(weight: Weight, found: set[Mode]) -> Mode:
    for mode in _WORST:
        if mode in found:
            return mode
    return "dense" if _is_float(weight) else "decoded"


def _is_float(weight: Weight) -> bool:
    match weight:
        case Dense():
            return True
        case LowRank():
            return _is_float(weight.left) and _is_float(weight.right)
        case Sum():
            return all(_is_float(term) for term in weight.terms)
        case _:
            return False
