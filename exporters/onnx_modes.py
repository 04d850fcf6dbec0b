"""How the layers of an exported file compute: read from the file, not from what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import onnx

from ..kernels.onnx_ops import CONV_OPS, DECODE, DOMAIN, LINEAR_OPS
from ..optimizer.model import Model
from ..optimizer.packed import Computed, Reader
from ..optimizer.weight import Dense, LowRank, Sum, Weight

Mode: TypeAlias = Literal[
    "exact", "int8 dynamic", "exact + decoded", "int8 dynamic + decoded", "int8", "decoded", "dense"
]
"""exact: packed, sums in float32. int8 dynamic: packed, inputs rounded at run time. int8: integers between static
grids. decoded: packed in the file, floats from the moment it is loaded; after a +: for some of its operators, beside
the packed weight that the others read. dense: floats in the file."""
_REARRANGING = {"Add", "Cast", "Concat", "MatMul", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
"""What makes another form of weights where it reads nothing else; Add and MatMul: of terms and of factors."""
_PARTING = {"Slice", "Split"}


@dataclass(slots=True)
class _Uses:
    """The operators that read a weight packed, by mode, and those that read it decoded, in the order of the file."""

    packed: set[Literal["exact", "int8 dynamic"]] = field(default_factory=set)
    decoded: dict[Reader, None] = field(default_factory=dict)


def modes(path: Path, model: Model, integers: frozenset[str]) -> dict[str, Computed]:
    """Return how each weight of a model computes in its file; `integers`: those that do on static int8 grids."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {name: _Uses() for name in model.weights}
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type != DECODE:
            for owner in _owners(node, found):
                found[owner].packed.add("int8 dynamic" if _rounds(node.op_type) else "exact")
    for owner, reader in _float_readers(graph, found):
        found[owner].decoded[reader] = None
    return {name: _computed(model.weights[name], uses, name in integers) for name, uses in found.items()}


def _computed(weight: Weight, uses: _Uses, on_grids: bool) -> Computed:
    return Computed(mode="int8") if on_grids else Computed(mode=_mode(weight, uses), decoded_for=tuple(uses.decoded))


def _mode(weight: Weight, uses: _Uses) -> Mode:
    """Return the mode of a weight; the least exact one of the operators that read it packed."""
    if "int8 dynamic" in uses.packed:
        return "int8 dynamic + decoded" if uses.decoded else "int8 dynamic"
    if uses.packed:
        return "exact + decoded" if uses.decoded else "exact"
    return "dense" if _is_float(weight) else "decoded"


def _rounds(op: str) -> bool:
    return op in CONV_OPS or (op in LINEAR_OPS and LINEAR_OPS[op].mode == "int8")


def _owners(node: onnx.NodeProto, names: Mapping[str, object]) -> Iterator[str]:
    """Yield the parameters whose codes a node reads, also as a term of a sum or a factor of a product."""
    for value in node.input:
        stem = value if value.endswith(".codes") else ""
        while stem and stem not in names:
            stem = stem.rpartition(".")[0]
        if stem:
            yield stem


def _float_readers(graph: onnx.GraphProto, names: Mapping[str, object]) -> Iterator[tuple[str, Reader]]:
    """Yield (parameter, operator) for all that reads decoded weights, however they are rearranged before."""
    constants = {value.name for value in graph.initializer} | {""}
    floats: dict[str, dict[str, bool]] = {}
    """Value -> the parameters that it is made of alone, and whether of a part of them."""
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == DECODE:
            floats[node.output[0]] = dict.fromkeys(_owners(node, names), False)
            continue
        read = {owner: part for value in node.input for owner, part in floats.get(value, {}).items()}
        if node.op_type in _REARRANGING and all(value in floats or value in constants for value in node.input):
            made = {owner: part or node.op_type in _PARTING for owner, part in read.items()}
            floats |= dict.fromkeys(node.output, made)
        else:
            yield from ((owner, Reader(op=node.op_type, part=part)) for owner, part in read.items())


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
