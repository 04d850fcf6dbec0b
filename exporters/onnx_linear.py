"""Replace products with a compressed weight by operators that multiply by its codes.

A layer becomes one `paredown::Lut...Linear...` that also adds the bias and a low rank and applies the activation that
follows, if nothing else reads the values in between. Where the form of a weight has no such operator, it is multiplied
term by term.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import assert_never

import onnx_ir as ir
import torch

from ..kernels.lut_spec import Activation, Mode
from ..optimizer import packed
from ..optimizer.errors import ExportError
from ..optimizer.weight import Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight
from .onnx_forms import Forms, LowTerm, Portable, Product
from .onnx_place import Place, is_turn, number, place_of, readers, remove_dead, take_over


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight that operators multiply by: its name, how it stands, and whether its inputs are rounded to int8."""

    name: str
    weight: Weight
    rounds: bool = False
    forms: Forms = field(default_factory=Portable)

    def part(self, suffix: str, weight: Weight) -> Layer:
        """Return a term or a factor of this one as a layer that sees its inputs as they are."""
        return replace(self, name=f"{self.name}.{suffix}", weight=weight, rounds=False)


def replace_products(root: ir.Graph, value: ir.Value, layout: Layout, layer: Layer) -> None:
    """Let every operator that multiplies by the dense matrix `value` multiply by the packed one."""
    for product in list(linear_uses(value, layout)):
        _replace(root, product, layer)


def linear_uses(value: ir.Value, layout: Layout) -> Iterator[ir.Node]:
    """Yield the nodes that multiply by the matrix of this parameter."""
    if layout.kind not in ("matrix", "matrix_t") or len(layout.shape) != 2:
        return
    for node, index in readers(value):
        if is_turn(node):
            for product, position in readers(node.outputs[0]):
                if _multiplies(product, position, turned=layout.kind == "matrix"):
                    yield product
        elif _multiplies(node, index, turned=layout.kind != "matrix"):
            yield node


def dtype_of(weight: Weight) -> torch.dtype:
    return weight.values.dtype if isinstance(weight, Dense) else weight.dtype


def gather(root: ir.Graph, node: ir.Node, layer: Layer) -> None:
    """Replace a look-up of rows in the dense matrix by one of packed rows."""
    place, rows, weight = place_of(root, node), node.inputs[1], layer.weight
    assert rows is not None
    assert isinstance(weight, Uniform | Codebook)
    take_over(node.outputs[0], layer.forms.looked_up(place, weight, layer.name, rows))
    remove_dead(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    """What follows a product and is computed with it: the bias, the activation; `last` makes the result."""

    last: ir.Node
    bias: ir.Value | None = None
    activation: Activation = ""

    @property
    def result(self) -> ir.Value:
        return self.last.outputs[0]


def _replace(root: ir.Graph, product: ir.Node, layer: Layer) -> None:
    """Replace MatMul or Gemm, and what is computed with it, by x W^T of a packed weight; the result keeps its name."""
    _part_bias(root, product, layer.weight.shape[0])
    x = product.inputs[0]
    assert x is not None
    tail = _tail(product, layer)
    place = place_of(root, product, tail.last)
    dtype = dtype_of(layer.weight)
    bias = None if tail.bias is None else place.cast(tail.bias, dtype)
    tail = replace(tail, bias=bias)
    take_over(tail.result, _product(place, place.cast(before_marks(x), dtype), layer, tail))
    remove_dead(tail.last)


def _product(place: Place, x: ir.Value, layer: Layer, tail: _Tail) -> ir.Value:
    """Return x W^T with what follows it, in the dtype of W."""
    weight, name, dtype = layer.weight, layer.name, dtype_of(layer.weight)
    x, found = place.cast(x, dtype), packed.terms(weight)
    if found is not None and not layer.forms.refusal(found.base, _mode(layer)):
        return _fused(place, x, layer, tail)
    if layer.rounds:
        raise ExportError("its weight has no int8 kernel", where=name, fix="run optimize again for this version")
    match weight:
        case Dense():
            turned = place.initializer(f"{name}.t", weight.values.T)
            return _plain_bias(place, place.add("MatMul", [x, turned], dtype), tail, dtype)
        case Uniform() | Codebook():
            turned = place.add("Transpose", [layer.forms.decoded(place, weight, name)], dtype, {"perm": [1, 0]})
            return _plain_bias(place, place.add("MatMul", [x, turned], dtype), tail, dtype)
        case LowRank():
            inner = _product(place, x, layer.part("right", weight.right), _Tail(last=tail.last))
            return _product(place, inner, layer.part("left", weight.left), tail)
        case Sum():
            layers = [layer.part(str(i), term) for i, term in enumerate(weight.terms)]
            total = _product(place, x, layers[0], _Tail(last=tail.last))
            for other in layers[1:]:
                term = place.cast(_product(place, x, other, _Tail(last=tail.last)), dtype)
                total = place.add("Add", [place.cast(total, dtype), term], dtype)
            return _plain_bias(place, total, tail, dtype)
        case _:
            assert_never(weight)


def _fused(place: Place, x: ir.Value, layer: Layer, tail: _Tail) -> ir.Value:
    """Return the product by one operator, or by two and a sum where the low rank has to be multiplied apart."""
    found = packed.terms(layer.weight)
    assert found is not None
    dtype, alone = found.base.dtype, _Tail(last=tail.last)
    if found.low is None:
        return _lut(place, x, layer, tail)
    base = replace(layer, name=f"{layer.name}.0", weight=found.base)
    right, left = (layer.part(f"1.{side}", getattr(found.low, side)) for side in ("right", "left"))
    inner = place.cast(_product(place, x, right, alone), dtype)
    if not packed.low_refusal(found.low):
        return _lut(place, x, base, tail, (inner, left))
    total = _lut(place, x, base, tail)
    return place.add("Add", [total, place.cast(_product(place, inner, left, alone), dtype)], dtype)


def _lut(place: Place, x: ir.Value, layer: Layer, tail: _Tail, low: tuple[ir.Value, Layer] | None = None) -> ir.Value:
    """Add the one operator of a coded weight; `low`: R x and the left factor."""
    weight, left = layer.weight, None if low is None else low[1].weight
    assert isinstance(weight, Uniform | Codebook)
    term = None
    if low is not None:
        assert isinstance(left, Uniform | Codebook)
        term = LowTerm(inner=low[0], left=left, name=low[1].name)
    product = Product(
        x=x,
        weight=weight,
        name=layer.name,
        mode=_mode(layer),
        bias=tail.bias,
        activation=tail.activation,
        low=term,
    )
    return layer.forms.multiplied(place, product)


def _mode(layer: Layer) -> Mode:
    return "int8" if layer.rounds else "exact"


def _plain_bias(place: Place, value: ir.Value, tail: _Tail, dtype: torch.dtype) -> ir.Value:
    return value if tail.bias is None else place.add("Add", [value, tail.bias], dtype)


def _takes_tail(layer: Layer) -> bool:
    """Whether the operator that makes the result can add a bias and apply an activation."""
    weight, found = layer.weight, packed.terms(layer.weight)
    if found is not None and not layer.forms.refusal(found.base, "exact"):
        return found.low is None or not packed.low_refusal(found.low)
    return isinstance(weight, LowRank) and _takes_tail(layer.part("left", weight.left))


def _tail(product: ir.Node, layer: Layer) -> _Tail:
    """Find what can be computed with a product; nothing else may read the values in between."""
    bias = product.inputs[2] if len(product.inputs) > 2 else None
    last = product
    if not _takes_tail(layer):
        return _Tail(last=last, bias=bias)
    last = after_marks(last)
    add = only_reader(last.outputs[0], "Add")
    if bias is None and add is not None:
        (other,) = [value for value in add.inputs if value is not last.outputs[0]] or [None]
        if _is_vector(other, layer.weight.shape[0]):
            bias, last = other, after_marks(add)
    activation, end = _activation(last.outputs[0])
    return _Tail(last=end or last, bias=bias, activation=activation)


def _part_bias(root: ir.Graph, product: ir.Node, rows: int) -> None:
    """Let an Add of its own add what a Gemm adds, where that is no vector."""
    if len(product.inputs) < 3 or _is_vector(product.inputs[2], rows):
        return
    (result,), bias = product.outputs, product.inputs[2]
    product.resize_inputs(2)
    if bias is None:
        return
    node = ir.node("Add", [result, bias], name=f"{product.name}.biased")
    (total,) = node.outputs
    total.shape, total.type = result.shape, result.type
    ir.convenience.replace_all_uses_with(result, total, replace_graph_outputs=True)
    node.replace_input_with(0, result)
    total.name, result.name = result.name, f"{result.name}.product"
    root.insert_after(product, node)


def _activation(value: ir.Value) -> tuple[Activation, ir.Node | None]:
    """Return the activation that alone reads a value, and the node that makes its result."""
    if relu := only_reader(value, "Relu"):
        return "relu", relu
    if gelu := only_reader(value, "Gelu"):
        kind = gelu.attributes.get_string("approximate", "none")
        return ("gelu_tanh" if kind == "tanh" else "gelu"), gelu
    users = {use.node.op_type: use.node for use in value.uses()}
    if len(value.uses()) != 2 or set(users) != {"Sigmoid", "Mul"} or value.is_graph_output():
        return "", None
    gate = users["Sigmoid"].outputs[0]
    return ("silu", users["Mul"]) if only_reader(gate, "Mul") is users["Mul"] else ("", None)


def only_reader(value: ir.Value, op: str) -> ir.Node | None:
    """Return the one operator of a kind that reads a value, None where anything else does."""
    uses = list(value.uses())
    one = len(uses) == 1 and uses[0].node.op_type == op and not uses[0].node.domain and not value.is_graph_output()
    return uses[0].node if one else None


def after_marks(node: ir.Node) -> ir.Node:
    """Return the last of the Identity nodes that follow a node alone: marks of the trace."""
    while (mark := only_reader(node.outputs[0], "Identity")) is not None:
        node = mark
    return node


def before_marks(value: ir.Value) -> ir.Value:
    """Return what the Identity nodes before a value read."""
    while (maker := value.producer()) is not None and maker.op_type == "Identity" and maker.inputs[0] is not None:
        value = maker.inputs[0]
    return value


def _is_vector(value: ir.Value | None, size: int) -> bool:
    return value is not None and value.shape is not None and list(value.shape) == [size]


def _multiplies(node: ir.Node, index: int, *, turned: bool) -> bool:
    """Whether a node computes x M (`turned`) or x M^T from the matrix M that is its input `index`."""
    if index != 1:
        return False
    if node.op_type == "MatMul":
        return turned
    if node.op_type != "Gemm" or number(node, "transA", 0) or number(node, "transB", 0) == turned:
        return False
    return number(node, "alpha", 1) == 1 and number(node, "beta", 1) == 1
