"""Static 8-bit layers as floats of 8 bits (e4m3: sign, 4 bits of exponent, 3 of mantissa) instead of integers.

A grid that reached 127 steps reaches 448, the largest such float: each value keeps its range, and small values keep
three bits of mantissa where the steps of an integer would be coarse. GPUs have them from compute capability 8.9 on.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

LARGEST = 448.0
"""The largest number of e4m3."""
STEPS = 127
OPSET = 19
"""The first whose QuantizeLinear has e4m3."""
FP8 = ir.DataType.FLOAT8E4M3FN


def convert(graph: ir.Graph) -> int:
    """Rewrite in place all pairs of int8 grids and the int8 weights between them; return how many weights."""
    pairs = [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _is_int8(node)]
    for node in [node for node in pairs if node.op_type == "QuantizeLinear"]:
        _float_pads(node)
    pairs = [node for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _is_int8(node)]
    return sum(_convert(graph, node) for node in pairs)


def _convert(graph: ir.Graph, node: ir.Node) -> bool:
    codes, scale = node.inputs[0], _tensor(node.inputs[1])
    assert scale is not None
    held = None if codes is None else _tensor(codes)
    stem = f"{node.outputs[0].name}.fp8"
    node.replace_input_with(1, _initializer(graph, f"{stem}.scale", scale * (STEPS / LARGEST)))
    zero = torch.zeros(scale.shape).to(torch.float8_e4m3fn)
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, _initializer(graph, f"{stem}.zero", zero))
    if node.op_type == "QuantizeLinear":
        node.outputs[0].type = ir.TensorType(FP8)
    elif held is not None:
        values = (held.float() * (LARGEST / STEPS)).to(torch.float8_e4m3fn)
        node.replace_input_with(0, _initializer(graph, f"{stem}.codes", values))
    return held is not None


def _float_pads(node: ir.Node) -> None:
    """Let a Pad of codes pad floats, between two pairs of the same grid: ONNX pads no floats of 8 bits."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for pad in [use.node for use in node.outputs[0].uses() if use.node.op_type == "Pad"]:
        floats = _add(pad, "DequantizeLinear", [node.outputs[0], *node.inputs[1:]], f"{pad.outputs[0].name}.before")
        pad.replace_input_with(0, floats)
        if len(pad.inputs) > 2:
            pad.replace_input_with(2, None)  # zero, as the codes were padded with
        result = pad.outputs[0]
        result.type = ir.TensorType(ir.DataType.FLOAT)
        readers = [(use.node, use.idx) for use in result.uses()]
        again = ir.node("QuantizeLinear", [result, *node.inputs[1:]], name=f"{pad.name}.again")
        graph.insert_after(pad, again)
        again.outputs[0].name, again.outputs[0].shape = f"{result.name}.again", result.shape
        again.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        for reader, index in readers:
            reader.replace_input_with(index, again.outputs[0])


def _add(before: ir.Node, op: str, inputs: list[ir.Value | None], name: str) -> ir.Value:
    node = ir.node(op, inputs, name=f"{str(before.name).rpartition('/')[0]}/{name}")
    value = node.outputs[0]
    value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    before.graph.insert_before(before, node)  # type: ignore[union-attr]
    return value


def _is_int8(node: ir.Node) -> bool:
    """Return whether the codes of a pair's half are int8, by its zero point or by what it reads."""
    known = [value for value in (*node.inputs[2:3], node.inputs[0]) if value is not None]
    tensors = [ir.convenience.get_const_tensor(value) for value in known]
    return any(tensor is not None and tensor.dtype == ir.DataType.INT8 for tensor in tensors)


def _tensor(value: ir.Value | None) -> torch.Tensor | None:
    known = None if value is None else ir.convenience.get_const_tensor(value)
    return None if known is None else torch.from_numpy(known.numpy().copy())


def _initializer(graph: ir.Graph, name: str, tensor: torch.Tensor) -> ir.Value:
    made = TorchTensor(tensor.contiguous(), name)
    value = ir.Value(name=name, const_value=made, type=ir.TensorType(made.dtype), shape=ir.Shape(tensor.shape))
    graph.register_initializer(value)
    return value
