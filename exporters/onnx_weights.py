"""Replace the dense weights of an ONNX graph by their packed forms.

A linear layer becomes one operator that multiplies by the codes (`onnx_linear`), an embedding `paredown::LutGather`, a
convolution that rounds its inputs `paredown::LutConvInt8` (`onnx_conv`). A convolution by a low rank becomes two, the
second 1x1. Every other use of a weight (other convolutions, recurrent matrices) reads `paredown::LutDecode`, reshaped
to the parameter. Uses of one weight share its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import onnx_ir as ir
import torch

from ..kernels.onnx_bodies import onnx_function
from ..kernels.onnx_ops import DOMAIN, VERSION
from ..optimizer.errors import ExportError
from ..optimizer.model import Model
from ..optimizer.weight import Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight
from .onnx_conv import replace_convolutions
from .onnx_forms import Forms, Portable
from .onnx_linear import Layer, dtype_of, gather, replace_products
from .onnx_place import Place, is_turn, number, place_of, readers, take_over


def replace_weights(graph: ir.Graph, model: Model, forms: Forms | None = None) -> None:
    """Rewrite `graph` in place so that no initializer holds a dense copy of a compressed weight."""
    aliases, forms = model.aliases(), forms or Portable()
    for value in list(graph.initializers.values()):
        name = aliases.get(str(value.name), str(value.name))
        if name in model.weights:
            stored = _Stored(weight=model.weights[name], layout=model.layouts[name], name=name, forms=forms)
            _replace(graph, value, stored, model)


def add_functions(model: ir.Model) -> None:
    """Append the portable bodies of the operators that `model` uses."""
    used = sorted({node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN})
    if used:
        model.opset_imports[DOMAIN] = VERSION
    for op in used:
        function = ir.from_proto(onnx_function(op, model.opset_imports[""]))
        assert isinstance(function, ir.Function)
        model.functions[function.identifier()] = function


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    weight: Weight
    layout: Layout
    name: str
    forms: Forms

    def layer(self, *, rounds: bool = False) -> Layer:
        return Layer(name=self.name, weight=self.weight, rounds=rounds, forms=self.forms)


def _replace(graph: ir.Graph, value: ir.Value, stored: _Stored, model: Model) -> None:
    weight, layout = stored.weight, stored.layout
    if isinstance(weight, Dense):
        _turn_dense(graph, value, weight)
        return
    if isinstance(weight, LowRank):
        for node in list(convolutions(value, layout)):
            _divide(graph, node, weight, stored)
    rounds = stored.name in model.dynamic
    if rounds and layout.kind == "conv" and isinstance(weight, Uniform | Codebook):
        replace_convolutions(graph, value, layout, stored.layer(rounds=True))
    replace_products(graph, value, layout, stored.layer(rounds=rounds))
    if isinstance(weight, Uniform | Codebook) and not stored.forms.lookup_refusal(weight):
        for node in list(lookups(value, layout)):
            gather(graph, node, stored.layer())
    left = [node for node, _ in readers(value)]
    if left and rounds and any(node.op_type != "Gather" for node in left):
        what = f"its inputs are rounded to int8, but {left[0].op_type} reads it, for which there is no such kernel"
        raise ExportError(what, where=stored.name, fix="skip it in the step, or leave activations out")
    if left:
        _decode(graph, value, stored)


def _divide(root: ir.Graph, old: ir.Node, weight: LowRank, stored: _Stored) -> None:
    """Replace a convolution by itself with the right factor's channels and a 1x1 convolution with the left factor."""
    (result,) = old.outputs
    x, bias = old.inputs[0], old.inputs[2] if len(old.inputs) > 2 else None
    place = place_of(root, old)
    assert x is not None
    (rows, rank), dtype, spatial = weight.left.shape, weight.dtype, stored.layout.shape[2:]
    inner = _inner_layout(stored.layout, rank)
    right = _param(place, replace(stored, weight=weight.right, layout=inner, name=f"{stored.name}.right"))
    pointwise = Layout(kind="conv", shape=(rows, rank, *(1 for _ in spatial)))
    left = _param(place, replace(stored, weight=weight.left, layout=pointwise, name=f"{stored.name}.left"))
    same = {name: attribute.value for name, attribute in old.attributes.items()}
    thin = place.add(old.op_type, [place.cast(x, dtype), right], dtype, same)
    biases = [] if bias is None else [place.cast(bias, dtype)]
    take_over(result, place.add("Conv", [thin, left, *biases], dtype))


def _inner_layout(layout: Layout, rank: int) -> Layout:
    """Return the layout of the right factor: the convolution's with `rank` output channels."""
    first, second, *kernel = layout.shape
    shape = (first, rank, *kernel) if layout.kind == "conv_transpose" else (rank, second, *kernel)
    return Layout(kind=layout.kind, shape=shape)


def _decode(graph: ir.Graph, old: ir.Value, stored: _Stored) -> None:
    """Let every reader of a dense initializer read the decoded weight."""
    module = stored.name.rpartition(".")[0]
    place = Place(root=graph, before=graph[0], scope=module, stem=f"{stored.name}.dense")
    value = _param(place, stored)
    value.shape = ir.Shape(stored.layout.shape)
    for node, index in list(readers(old)):
        node.replace_input_with(index, value)


def _param(place: Place, stored: _Stored) -> ir.Value:
    """Return the decoded weight in the shape of its parameter."""
    layout, dtype = stored.layout, dtype_of(stored.weight)
    if isinstance(stored.weight, Dense):
        return place.initializer(stored.name, layout.to_param(stored.weight.values))
    matrix = _matrix(place, stored.layer())
    if layout.kind == "matrix_t":
        return place.add("Transpose", [matrix], dtype, {"perm": [1, 0]})
    shape = place.initializer(f"{stored.name}.shape", torch.tensor(layout.shape))
    if layout.kind != "conv_transpose":
        same = layout.shape == stored.weight.shape
        return matrix if same else place.add("Reshape", [matrix, shape], dtype)
    inputs, outputs, *kernel = layout.shape
    grouped = torch.tensor([layout.groups, outputs, inputs // layout.groups, *kernel])
    parted = place.add("Reshape", [matrix, place.initializer(f"{stored.name}.grouped", grouped)], dtype)
    turned = place.add("Transpose", [parted], dtype, {"perm": [0, 2, 1, *range(3, 3 + len(kernel))]})
    return place.add("Reshape", [turned, shape], dtype)


def _matrix(place: Place, layer: Layer) -> ir.Value:
    """Return W computed as `dense()` does: products and sums in float32, rounded once."""
    weight, name = layer.weight, layer.name
    match weight:
        case Dense():
            return place.initializer(name, weight.values)
        case Uniform() | Codebook():
            return layer.forms.decoded(place, weight, name)
        case LowRank():
            left = place.cast(_matrix(place, layer.part("left", weight.left)), torch.float32)
            right = place.cast(_matrix(place, layer.part("right", weight.right)), torch.float32)
            return place.cast(place.add("MatMul", [left, right], torch.float32), weight.dtype)
        case Sum():
            terms = [_matrix(place, layer.part(str(i), term)) for i, term in enumerate(weight.terms)]
            total = _add_up(place, [place.cast(term, torch.float32) for term in terms], torch.float32)
            return place.cast(total, weight.dtype)
        case _:
            assert_never(weight)


def _add_up(place: Place, terms: Sequence[ir.Value], dtype: torch.dtype) -> ir.Value:
    total = terms[0]
    for term in terms[1:]:
        total = place.add("Add", [total, term], dtype)
    return total


def _turn_dense(graph: ir.Graph, value: ir.Value, weight: Dense) -> None:
    """Store a dense weight as its linear layer reads it, unless something else reads it too."""
    found = list(readers(value))
    if len(found) != 1 or not is_turn(found[0][0]):
        return
    (turn, _), name = found[0], f"{value.name}.t"
    place = Place(root=graph, before=turn, scope="", stem=name)
    take_over(turn.outputs[0], place.initializer(name, weight.values.T), rename=False)


def lookups(value: ir.Value, layout: Layout) -> Iterator[ir.Node]:
    """Yield the nodes that look rows of the whole parameter up."""
    if layout.kind != "matrix" or len(layout.shape) != 2:
        return
    for node, index in readers(value):
        if index == 0 and node.op_type == "Gather" and number(node, "axis", 0) == 0:
            yield node


def convolutions(value: ir.Value, layout: Layout) -> Iterator[ir.Node]:
    """Yield the ungrouped convolutions whose kernel is this parameter."""
    kind = {"conv": "Conv", "conv_transpose": "ConvTranspose"}.get(layout.kind)
    for node, index in readers(value):
        if index == 1 and node.op_type == kind and layout.groups == 1:
            yield node
