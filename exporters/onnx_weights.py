"""Replace the dense weights of an ONNX graph by their packed forms.

A linear layer becomes one `paredown::LutLinear` per codebook (two after another for a low rank, their sum for a sum),
then the bias as its own Add. A convolution by a low rank becomes two, the second 1x1. Every other use of a weight
(convolution, embedding, recurrent matrices) reads `paredown::LutDecode`, reshaped to the parameter. Uses of one weight
share its tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from ..kernels.lut_linear import DOMAIN, ONNX_OPS, VERSION, LutSpec, OnnxOp, onnx_attributes, onnx_function, pack
from ..optimizer.weight import TABLE_UNIT, Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight

INT8_ZERO = 128
"""Added to the entries of an int8 table: TensorRT takes no int8 constant that is not dequantized."""

Attribute: TypeAlias = int | float | str | Sequence[int]


def replace_weights(
    model: ir.Model, weights: Mapping[str, Weight], layouts: Mapping[str, Layout], aliases: Mapping[str, str]
) -> None:
    """Rewrite `model` in place so that no initializer holds a dense copy of a compressed weight."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        name = aliases.get(str(value.name), str(value.name))
        if name not in weights:
            continue
        weight, layout = weights[name], layouts[name]
        if isinstance(weight, Dense):
            _turn_dense(graph, value, weight)
            continue
        if isinstance(weight, LowRank):
            for node in list(_convolutions(value, layout)):
                _divide(graph, node, weight, _Stored(weight=weight, layout=layout, name=name))
        for use in list(_linear_uses(value, layout)):
            _fuse(graph, use.product, _Stored(weight=weight, layout=layout, name=name))
        if any(True for _ in _readers(value)):
            _decode(graph, value, _Stored(weight=weight, layout=layout, name=name))


def add_functions(model: ir.Model) -> None:
    """Append the portable bodies of the operators that `model` uses."""
    held = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    used = [op for op in ONNX_OPS if op in held]
    if used:
        model.opset_imports[DOMAIN] = VERSION
    for op in used:
        function = ir.from_proto(onnx_function(op, model.opset_imports[""]))
        assert isinstance(function, ir.Function)
        model.functions[function.identifier()] = function


def lut_parts(weight: Uniform | Codebook) -> tuple[dict[str, Tensor], LutSpec]:
    """Return the tensors {codes, table, scale} of the op that decodes a weight, and its spec."""
    n, k = weight.shape
    table, zero, unit, rows = torch.arange(2**weight.code_bits).to(torch.uint8)[None], 0, 1.0, 0
    match weight:
        case Uniform():
            zero = weight.zero
        case Codebook():
            table, unit, rows = weight.table, weight.unit, weight.table_rows
            if table.dtype == torch.int8:
                table, zero, unit = (table.to(torch.int16) + INT8_ZERO).to(torch.uint8), INT8_ZERO, TABLE_UNIT
        case _:
            assert_never(weight)
    parts = {"codes": pack(weight.codes, weight.code_bits), "table": table, "scale": weight.scale}
    bits, group = weight.code_bits, weight.group
    return parts, LutSpec(n=n, k=k, bits=bits, group=group, table_rows=rows, zero=float(zero), unit=unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    weight: Weight
    layout: Layout
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _LinearUse:
    """A node that computes x W^T, and the Transpose on the way to it."""

    product: ir.Node
    transpose: ir.Node | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where new nodes go: before a node; they are named "module path/value", values "stem.0", "stem.1", ..."""

    root: ir.Graph
    before: ir.Node
    scope: str
    stem: str
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def add(
        self, op: str, inputs: Sequence[ir.Value], dtype: torch.dtype, attributes: Mapping[str, Attribute] | None = None
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, domain=DOMAIN if op.startswith("Lut") else "")
        (value,) = node.outputs
        value.name, value.type = f"{self.stem}.{next(self.numbers)}", ir.TensorType(from_torch_dtype(dtype))
        node.name = f"{self.scope}/{value.name}"
        self.before.graph.insert_before(self.before, node)  # type: ignore[union-attr]
        return value

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        wanted = from_torch_dtype(dtype)
        return value if value.dtype in (None, wanted) else self.add("Cast", [value], dtype, {"to": int(wanted)})

    def initializer(self, name: str, tensor: Tensor) -> ir.Value:
        """Return an initializer by its name, made on first use."""
        if name in self.root.initializers:
            return self.root.initializers[name]
        value = ir.Value(name=name, const_value=TorchTensor(tensor.detach().contiguous(), name))
        value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(from_torch_dtype(tensor.dtype))
        self.root.register_initializer(value)
        return value


def _fuse(root: ir.Graph, old: ir.Node, stored: _Stored) -> None:
    """Replace MatMul or Gemm by x W^T of a packed weight, then the bias; the result keeps its name."""
    (result,) = old.outputs
    x, bias = old.inputs[0], old.inputs[2] if len(old.inputs) > 2 else None
    scope, _, stem = str(old.name).rpartition("/")
    place = _Place(root=root, before=old, scope=scope, stem=stem)
    assert x is not None
    dtype = _dtype(stored.weight)
    value = _product(place, place.cast(x, dtype), stored.weight, stored.name)
    if bias is not None:
        value = place.add("Add", [value, place.cast(bias, dtype)], dtype)
    _take_over(result, value)


def _divide(root: ir.Graph, old: ir.Node, weight: LowRank, stored: _Stored) -> None:
    """Replace a convolution by itself with the right factor's channels and a 1x1 convolution with the left factor."""
    (result,) = old.outputs
    x, bias = old.inputs[0], old.inputs[2] if len(old.inputs) > 2 else None
    scope, _, stem = str(old.name).rpartition("/")
    place = _Place(root=root, before=old, scope=scope, stem=stem)
    assert x is not None
    (rows, rank), dtype, spatial = weight.left.shape, weight.dtype, stored.layout.shape[2:]
    inner = _inner_layout(stored.layout, rank)
    right = _param(place, _Stored(weight=weight.right, layout=inner, name=f"{stored.name}.right"))
    pointwise = Layout(kind="conv", shape=(rows, rank, *(1 for _ in spatial)))
    left = _param(place, _Stored(weight=weight.left, layout=pointwise, name=f"{stored.name}.left"))
    same = {name: attribute.value for name, attribute in old.attributes.items()}
    thin = place.add(old.op_type, [place.cast(x, dtype), right], dtype, same)
    biases = [] if bias is None else [place.cast(bias, dtype)]
    _take_over(result, place.add("Conv", [thin, left, *biases], dtype))


def _inner_layout(layout: Layout, rank: int) -> Layout:
    """Return the layout of the right factor: the convolution's with `rank` output channels."""
    first, second, *kernel = layout.shape
    shape = (first, rank, *kernel) if layout.kind == "conv_transpose" else (rank, second, *kernel)
    return Layout(kind=layout.kind, shape=shape)


def _product(place: _Place, x: ir.Value, weight: Weight, name: str) -> ir.Value:
    """Return x W^T in the dtype of W."""
    dtype = _dtype(weight)
    match weight:
        case Dense():
            turned = place.initializer(f"{name}.t", weight.values.T)
            return place.add("MatMul", [place.cast(x, dtype), turned], dtype)
        case Uniform() | Codebook():
            return _lut(place, "LutLinear", [place.cast(x, dtype)], weight, name)
        case LowRank():
            inner = _product(place, x, weight.right, f"{name}.right")
            return _product(place, inner, weight.left, f"{name}.left")
        case Sum():
            terms = [_product(place, x, term, f"{name}.{i}") for i, term in enumerate(weight.terms)]
            return _add_up(place, [place.cast(term, dtype) for term in terms], dtype)
        case _:
            assert_never(weight)


def _decode(graph: ir.Graph, old: ir.Value, stored: _Stored) -> None:
    """Let every reader of a dense initializer read the decoded weight."""
    module = stored.name.rpartition(".")[0]
    place = _Place(root=graph, before=graph[0], scope=module, stem=f"{stored.name}.dense")
    value = _param(place, stored)
    value.shape = ir.Shape(stored.layout.shape)
    for node, index in list(_readers(old)):
        node.replace_input_with(index, value)


def _param(place: _Place, stored: _Stored) -> ir.Value:
    """Return the decoded weight in the shape of its parameter."""
    layout, dtype = stored.layout, _dtype(stored.weight)
    if isinstance(stored.weight, Dense):
        return place.initializer(stored.name, layout.to_param(stored.weight.values))
    matrix = _matrix(place, stored.weight, stored.name)
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


def _matrix(place: _Place, weight: Weight, name: str) -> ir.Value:
    """Return W computed as `dense()` does: products and sums in float32, rounded once."""
    match weight:
        case Dense():
            return place.initializer(name, weight.values)
        case Uniform() | Codebook():
            return _lut(place, "LutDecode", [], weight, name)
        case LowRank():
            left = place.cast(_matrix(place, weight.left, f"{name}.left"), torch.float32)
            right = place.cast(_matrix(place, weight.right, f"{name}.right"), torch.float32)
            return place.cast(place.add("MatMul", [left, right], torch.float32), weight.dtype)
        case Sum():
            terms = [_matrix(place, term, f"{name}.{i}") for i, term in enumerate(weight.terms)]
            total = _add_up(place, [place.cast(term, torch.float32) for term in terms], torch.float32)
            return place.cast(total, weight.dtype)
        case _:
            assert_never(weight)


def _lut(place: _Place, op: OnnxOp, x: Sequence[ir.Value], weight: Uniform | Codebook, name: str) -> ir.Value:
    parts, spec = lut_parts(weight)
    inputs = [place.initializer(f"{name}.{key}", tensor) for key, tensor in parts.items()]
    attributes = onnx_attributes(spec, int(from_torch_dtype(weight.dtype)))
    return place.add(op, [*x, *inputs], weight.dtype, attributes)


def _add_up(place: _Place, terms: Sequence[ir.Value], dtype: torch.dtype) -> ir.Value:
    total = terms[0]
    for term in terms[1:]:
        total = place.add("Add", [total, term], dtype)
    return total


def _turn_dense(graph: ir.Graph, value: ir.Value, weight: Dense) -> None:
    """Store a dense weight as its linear layer reads it, unless something else reads it too."""
    readers = list(_readers(value))
    if len(readers) != 1 or not _is_turn(readers[0][0]):
        return
    (turn, _), name = readers[0], f"{value.name}.t"
    place = _Place(root=graph, before=turn, scope="", stem=name)
    _take_over(turn.outputs[0], place.initializer(name, weight.values.T), rename=False)


def _linear_uses(value: ir.Value, layout: Layout) -> Iterator[_LinearUse]:
    """Yield the nodes that multiply by the matrix of this parameter."""
    if layout.kind not in ("matrix", "matrix_t") or len(layout.shape) != 2:
        return
    for node, index in _readers(value):
        if _is_turn(node):
            for product, position in _readers(node.outputs[0]):
                if _multiplies(product, position, turned=layout.kind == "matrix"):
                    yield _LinearUse(product=product, transpose=node)
        elif _multiplies(node, index, turned=layout.kind != "matrix"):
            yield _LinearUse(product=node, transpose=None)


def _convolutions(value: ir.Value, layout: Layout) -> Iterator[ir.Node]:
    """Yield the ungrouped convolutions whose kernel is this parameter."""
    kind = {"conv": "Conv", "conv_transpose": "ConvTranspose"}.get(layout.kind)
    for node, index in _readers(value):
        if index == 1 and node.op_type == kind and layout.groups == 1:
            yield node


def _multiplies(node: ir.Node, index: int, *, turned: bool) -> bool:
    """Whether a node computes x M (`turned`) or x M^T from the matrix M that is its input `index`."""
    if index != 1:
        return False
    if node.op_type == "MatMul":
        return turned
    if node.op_type != "Gemm" or _number(node, "transA", 0) or _number(node, "transB", 0) == turned:
        return False
    return _number(node, "alpha", 1) == 1 and _number(node, "beta", 1) == 1


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _is_turn(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the nodes that still lead to something, of those that read a value."""
    for use in value.uses():
        outputs = use.node.outputs
        if any(output.uses() or output.is_graph_output() for output in outputs):
            yield use.node, use.idx


def _take_over(old: ir.Value, new: ir.Value, *, rename: bool = True) -> None:
    """Let `new` stand where `old` stood, graph outputs and name included."""
    new.shape = old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if rename:
        new.name, old.name = old.name, f"{old.name}.replaced"
        new.producer().name = str(new.producer().name).rpartition("/")[0] + f"/{new.name}"  # type: ignore[union-attr]


def _dtype(weight: Weight) -> torch.dtype:
    return weight.values.dtype if isinstance(weight, Dense) else weight.dtype
