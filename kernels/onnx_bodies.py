"""The operators of onnx_ops.py as functions of standard ONNX operators, put together from the parts beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lut_conv import ConvSpec
from .lut_spec import LutSpec
from .onnx_conv_part import CONV_INT8
from .onnx_ops import (
    CONV_OPS,
    DECODE,
    DOMAIN,
    GATHERS,
    LINEAR_OPS,
    Attributes,
    ConvOp,
    LinearOp,
    conv_attributes,
    onnx_attributes,
)
from .onnx_parts import (
    ACTIVATIONS,
    CONSTANTS,
    DECODE_STREAM,
    DECODE_TURNED,
    GATHER_ROWS,
    ONE_PLANE,
    PLANES,
    ROUND_INPUTS,
)

if TYPE_CHECKING:
    import onnx


def onnx_function(op: str, opset: int) -> onnx.FunctionProto:
    """Return the portable body of an operator, for models of this opset (18 or later)."""
    import onnx.parser

    inputs, output, body = _signature(op)
    names = ", ".join(_attributes(op, "left_codes" in inputs))
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{op} <{names}> ({", ".join(inputs)}) => ({output}) {{'
    return onnx.parser.parse_function(text + CONSTANTS + body + "}")


def _attributes(op: str, low_rank: bool) -> Attributes:
    """Return the attributes of an operator, of some weight."""
    if op in CONV_OPS:
        spec = LutSpec(n=1, k=4, bits=3 if CONV_OPS[op].planes else 1)
        return conv_attributes(spec, 1, ConvSpec(channels=1, kernel=(1, 1)))
    spec = LutSpec(n=1, k=1, bits=3 if op in LINEAR_OPS and LINEAR_OPS[op].planes else 1)
    return onnx_attributes(op, spec, 1, LutSpec(n=1, k=1, bits=1) if low_rank else None)


def _signature(op: str) -> tuple[tuple[str, ...], str, str]:
    """Return inputs, output and body."""
    if op == DECODE:
        return ("codes", "table", "scale"), "W", DECODE_STREAM
    if op in GATHERS.values():
        return ("indices", "codes", "table", "scale"), "y", GATHER_ROWS
    if op in CONV_OPS:
        return ("x", "codes", "table", "scale", "bias"), "y", _conv(CONV_OPS[op])
    form = LINEAR_OPS[op]
    return form.inputs, "y", _linear(form)


def _linear(op: LinearOp) -> str:
    parts = [_weight(PLANES if op.planes else ONE_PLANE, "")]
    x, total = "x", "product"
    if op.mode == "int8":
        parts.append(ROUND_INPUTS)
        x = "x_rounded"
    parts.append(f"product = MatMul ({x}, W_t)\n")
    if op.low_rank:
        parts += [_weight(ONE_PLANE, "left_"), "low = MatMul (t, left_W_t)\nwith_low = Add (product, low)\n"]
        total = "with_low"
    result = "biased" if op.activation else "y"
    parts.append(f"{result} = Add ({total}, bias)\n")
    return "".join([*parts, ACTIVATIONS[op.activation]])


def _conv(op: ConvOp) -> str:
    decode = _weight(PLANES if op.planes else ONE_PLANE, "")
    end = (
        "biased = Add (product, bias_planes)\n" + ACTIVATIONS["relu"] if op.relu else "y = Add (product, bias_planes)\n"
    )
    return decode + CONV_INT8 + end


def _weight(index: str, prefix: str) -> str:
    """Return the decoding of a weight, which begins with `index`, to `<prefix>W_t` (k, n)."""
    return (index + DECODE_TURNED).replace("$", prefix)
