"""Write int8 activations as QuantizeLinear and DequantizeLinear, such that runtimes compute in integers between them.

Each `fake_quantize` of the traced network becomes such a pair. Layers between two of them get signed bytes as weights
and int32 biases, each behind a DequantizeLinear of its own: what ONNX Runtime fuses to QLinearConv, QGemm and
MatMulIntegerToFloat, and TensorRT to its int8 layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from onnxscript import opset18
from torch import Tensor

from ..optimizer import activations_dynamic
from ..optimizer.activations_graph import MIDDLE, has_codes
from ..optimizer.activations_grid import CODES, operators
from ..optimizer.model import Model
from ..optimizer.weight import Layout, Uniform


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how torch's exporter writes the operators of int8 activations.

    Those of dynamic ones stay as an Identity: the operator of the layer rounds (`onnx_linear`).
    """

    op: Any = opset18  # its types know arrays and not what a trace passes

    def pair(x: Any, scale: float, zero: int, signed: bool) -> Any:
        dtype = onnx.TensorProto.INT8 if signed else onnx.TensorProto.UINT8
        step = op.Constant(value=onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [scale]))
        middle = op.Constant(value=onnx.helper.make_tensor("zero", dtype, [], [zero]))
        return op.DequantizeLinear(op.QuantizeLinear(x, step, middle), step, middle)

    def requantize(x: Any, scale: float, zero: int, signed: bool, unit: Any, axis: int) -> Any:
        return pair(x, scale, zero, signed)

    def mark(x: Any, *settings: Any) -> Any:
        return op.Identity(x)

    known = dict(zip(operators(), (pair, requantize), strict=True))
    return known | dict.fromkeys(activations_dynamic.operators(), mark)


def place(graph: ir.Graph, model: Model) -> None:
    """Rewrite `graph` in place: rectifiers that saturation replaces go, int8 layers get int8 weights, int32 biases."""
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        _saturate(node)
    other = model.aliases()
    for node in list(graph):
        product = _product(node, model, other)
        if product is not None:
            _quantize_product(product)
    for node in list(graph):
        if node.op_type == "Pad":
            _pad_codes(node)
        elif node.op_type == "ReduceMean":
            _pool(node)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A layer with a dequantized input; `turn` is the Transpose between its weight and it."""

    node: ir.Node
    name: str
    weight: Uniform
    layout: Layout
    turn: ir.Node | None


def _saturate(node: ir.Node) -> None:
    """Let a QuantizeLinear read what a rectifier before it reads, if saturation does to the codes all that it does."""
    value = node.inputs[0]
    clip = value.producer() if value is not None else None
    if value is None or clip is None or clip.op_type not in ("Relu", "Clip") or len(value.uses()) != 1:
        return
    scale, zero = _constant(node.inputs[1]), _constant(node.inputs[2])
    least, most = CODES[_is_signed(node)]
    low, high = (end / scale + zero for end in _bounds(clip))
    if low < least + 0.5 and high > most - 0.5:
        node.replace_input_with(0, clip.inputs[0])


def _bounds(clip: ir.Node) -> tuple[float, float]:
    """Return the numbers that a Relu or Clip cuts at, infinite where it leaves an end open."""
    if clip.op_type == "Relu":
        return 0.0, math.inf
    low, high = (clip.inputs[i] if i < len(clip.inputs) else None for i in (1, 2))
    return -math.inf if low is None else _constant(low), math.inf if high is None else _constant(high)


def _pad_codes(node: ir.Node) -> None:
    """Let convolutions pad by themselves, else pad codes, where a Pad stands between two pairs of one grid.

    ONNX Runtime 1.31 would pad floats.
    """
    back, ahead = dequantizer(node.inputs[0]), _reader(node.outputs[0])
    if back is None or ahead is None or not _is_same_grid(back, ahead):
        return
    for pair in [use.node for use in ahead.outputs[0].uses()]:
        for conv in [use.node for use in pair.outputs[0].uses() if use.node.op_type == "Conv" and use.idx == 0]:
            _pad_in_place(conv, node)
    padded = _add(ahead, "Pad", [back.inputs[0], node.inputs[1], back.inputs[2], *node.inputs[3:]], node.attributes)
    kind = ir.DataType.INT8 if _is_signed(back) else ir.DataType.UINT8
    padded.type, padded.shape = ir.TensorType(kind), node.outputs[0].shape
    result = ahead.outputs[0]
    ir.convenience.replace_all_uses_with(result, padded)
    padded.name, result.name = result.name, f"{result.name}.float"


def _pad_in_place(conv: ir.Node, pad: ir.Node) -> None:
    """Add a padding with zeros to a convolution's own, if it has the same axes and cuts nothing off."""
    ends = ir.convenience.get_const_tensor(pad.inputs[1]) if pad.inputs[1] is not None else None
    mode, own = conv.attributes.get_string("auto_pad", "NOTSET"), conv.attributes.get_ints("pads")
    if ends is None or len(pad.inputs) > 3 or mode != "NOTSET":
        return
    sizes = [int(size) for size in ends.numpy()]
    rank = len(sizes) // 2
    spatial = sizes[2:rank] + sizes[rank + 2 :]
    if min(sizes) < 0 or any(sizes[:2] + sizes[rank : rank + 2]):
        return
    total = [size + before for size, before in zip(spatial, own or [0] * len(spatial), strict=True)]
    conv.attributes["pads"] = ir.AttrInt64s("pads", total)
    conv.replace_input_with(0, pad.inputs[0])


def _pool(node: ir.Node) -> None:
    """Turn a mean over all positions into a GlobalAveragePool, which has an integer kernel, between its grids."""
    ahead, value, shape = _reader(node.outputs[0]), node.inputs[0], node.outputs[0].shape
    if dequantizer(value) is None or ahead is None or value is None or value.shape is None or shape is None:
        return
    keeps = bool(_number(node, "keepdims", 1))
    if value.shape.rank() < 3 or not (all(size == 1 for size in shape[2:]) if keeps else shape.rank() == 2):
        return
    pooled = _add(node, "GlobalAveragePool", [value])
    if not keeps:
        codes = _add(node, "QuantizeLinear", [pooled, *ahead.inputs[1:]])
        pooled = _add(node, "DequantizeLinear", [codes, *ahead.inputs[1:]])
        pooled = _add(node, "Flatten", [pooled], {"axis": 1})
    _take_over(node, pooled)


def _product(node: ir.Node, model: Model, other: Mapping[str, str]) -> _Product | None:
    """Return a convolution or matrix product of a dequantized input with a weight of signed bytes."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or dequantizer(node.inputs[0]) is None:
        return None
    held, turn = node.inputs[1], None
    if held is not None and node.op_type == "MatMul" and _is_turn(held.producer()):
        turn = held.producer()
        held = turn.inputs[0] if turn is not None else None
    if held is None or not held.is_initializer():
        return None
    name = other.get(str(held.name), str(held.name))
    weight = model.weights.get(name)
    if not isinstance(weight, Uniform) or not has_codes(weight):
        return None
    layout = model.layouts[name]
    fits = layout.kind == "conv" if node.op_type == "Conv" else _multiplies(node, layout, turned=turn is not None)
    return _Product(node=node, name=name, weight=weight, layout=layout, turn=turn) if fits else None


def _multiplies(node: ir.Node, layout: Layout, *, turned: bool) -> bool:
    """Whether a Gemm or MatMul computes x W^T of the matrix W that its second input holds."""
    if node.op_type == "MatMul":
        return layout.kind == ("matrix" if turned else "matrix_t")
    plain = all(_number(node, key, default) == default for key, default in (("transA", 0), ("alpha", 1), ("beta", 1)))
    return plain and layout.kind == ("matrix" if _number(node, "transB", 0) else "matrix_t")


def _quantize_product(product: _Product) -> None:
    node, is_conv = product.node, product.node.op_type == "Conv"
    name, axis = (product.name, 0) if is_conv else (f"{product.name}.t", 1)
    parts = integer_parts(product.weight, product.layout, turned=not is_conv)
    node.replace_input_with(1, _dequantized(node, name, parts, axis))
    if node.op_type == "Gemm":
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is not None:
        _quantize_bias(node, bias, _input_scale(node) * parts["scale"])


def _quantize_bias(node: ir.Node, bias: ir.Value, scale: Tensor) -> None:
    """Store a bias as int32 in units of the sum of products, which differ where several layers add it."""
    assert bias.const_value is not None
    codes = bias_codes(torch.from_numpy(bias.const_value.numpy().copy()), scale)
    name = str(bias.name) if len(bias.uses()) == 1 else f"{bias.name}.{node.outputs[0].name}"
    node.replace_input_with(2, _dequantized(node, name, {"codes": codes, "scale": scale}, 0))


def integer_parts(weight: Uniform, layout: Layout, *, turned: bool) -> dict[str, Tensor]:
    """Return signed codes, and a scale and a zero point per row, as a DequantizeLinear reads them.

    turned: the codes are (inputs, outputs), for a matrix product; else they lie as the parameter.
    """
    signed = (weight.codes.to(torch.int16) - MIDDLE).to(torch.int8)
    scale = weight.scale.flatten().float()
    codes = signed.T if turned else layout.to_param(signed)
    return {"codes": codes, "scale": scale, "zero": torch.zeros(len(scale), dtype=torch.int8)}


def bias_codes(bias: Tensor, scale: Tensor) -> Tensor:
    """Return a bias as int32 in units of `scale`."""
    return (bias.double() / scale.double()).round().clamp(-(2.0**31), 2.0**31 - 1).to(torch.int32)


def _dequantized(node: ir.Node, name: str, parts: Mapping[str, Tensor], axis: int) -> ir.Value:
    """Return constants behind a DequantizeLinear of `node`'s own; layers of one weight share the constants."""
    inputs = [_initializer(node, f"{name}.{key}", tensor) for key, tensor in parts.items()]
    value = _add(node, "DequantizeLinear", inputs, {"axis": axis})
    value.name, value.type = f"{node.outputs[0].name}.{name}", ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(parts["codes"].shape)
    return value


def _input_scale(node: ir.Node) -> Tensor:
    maker = dequantizer(node.inputs[0])
    assert maker is not None
    return torch.tensor(_constant(maker.inputs[1]), dtype=torch.float32)


def _constant(value: ir.Value | None) -> float:
    """Return a number that a graph holds, maybe cast; NaN where it is computed from something else."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type in ("Cast", "CastLike", "Identity"):
        return _constant(maker.inputs[0])
    known = None if value is None else ir.convenience.get_const_tensor(value)
    return math.nan if known is None else float(known.numpy())


def _is_turn(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _initializer(node: ir.Node, name: str, tensor: Tensor) -> ir.Value:
    """Return an initializer by its name, made on first use."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, const_value=TorchTensor(tensor.detach().contiguous(), name))
    value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(from_torch_dtype(tensor.dtype))
    graph.register_initializer(value)
    return value


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that makes a value, if one does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _reader(value: ir.Value) -> ir.Node | None:
    """Return the QuantizeLinear that is all that reads a value, if so."""
    users = [use.node for use in value.uses()]
    one = len(users) == 1 and users[0].op_type == "QuantizeLinear" and not value.is_graph_output()
    return users[0] if one else None


def _is_signed(node: ir.Node) -> bool:
    """Return whether the zero point of a QuantizeLinear or DequantizeLinear says that codes are signed."""
    zero = node.inputs[2]
    known = None if zero is None else ir.convenience.get_const_tensor(zero)
    return known is not None and known.dtype == ir.DataType.INT8


def _is_same_grid(one: ir.Node, other: ir.Node) -> bool:
    return all(_constant(one.inputs[i]) == _constant(other.inputs[i]) for i in (1, 2))


def _add(before: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Any = None) -> ir.Value:
    node = ir.node(op, inputs, attributes)
    node.name = f"{str(before.name).rpartition('/')[0]}/{before.outputs[0].name}.{op}"
    before.graph.insert_before(before, node)  # type: ignore[union-attr]
    return node.outputs[0]


def _take_over(old: ir.Node, new: ir.Value) -> None:
    """Let `new` stand where the result of `old` stood, name included."""
    (result,) = old.outputs
    new.shape, new.type = result.shape, result.type
    ir.convenience.replace_all_uses_with(result, new, replace_graph_outputs=True)
    new.name, result.name = result.name, f"{result.name}.float"
