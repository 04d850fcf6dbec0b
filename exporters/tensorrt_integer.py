"""Static int8 activations as TensorRT computes them: symmetric grids, and biases as floats."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import torch

from ..optimizer.activations_grid import CODES
from ..optimizer.model import ActQuant, Model
from .onnx_place import Place, remove_dead


def symmetric(model: Model) -> Model:
    """Return the model with every int8 grid made symmetric, signed and as wide as it was.

    TensorRT takes no zero point but 0. A grid that began at zero, as behind a rectifier, has half as many levels then.
    """
    return replace(model, acts={name: _symmetric(grid) for name, grid in model.acts.items()})


def adapt(graph: ir.Graph) -> None:
    """Rewrite in place what `onnx_qdq` writes for ONNX Runtime and TensorRT does not take."""
    _float_biases(graph)
    for node in graph:
        maker = node.inputs[0].producer() if node.op_type == "Pad" and node.inputs[0] is not None else None
        if maker is not None and maker.op_type == "QuantizeLinear" and len(node.inputs) > 2:
            node.replace_input_with(2, None)  # zero, as without it: TensorRT takes no int8 constant there


def _float_biases(graph: ir.Graph) -> None:
    """Let layers add biases as floats, which a graph holds as int32 codes: TensorRT dequantizes no int32."""
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        codes, scale = (None if value is None else value.const_value for value in node.inputs[:2])
        if codes is not None and scale is not None and codes.dtype == ir.DataType.INT32:
            bias = torch.from_numpy(codes.numpy() * scale.numpy())
            place = Place(root=graph, before=node, scope="", stem=str(node.outputs[0].name))
            held = place.initializer(f"{node.outputs[0].name}.float", bias)
            ir.convenience.replace_all_uses_with(node.outputs[0], held)
            remove_dead(node)


def _symmetric(grid: ActQuant) -> ActQuant:
    least, most = CODES[grid.signed]
    reach = max(abs(least - grid.zero), abs(most - grid.zero)) * grid.scale
    return grid if grid.signed and grid.zero == 0 else ActQuant(scale=reach / CODES[True][1], zero=0, signed=True)
