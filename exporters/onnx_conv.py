"""Replace convolutions whose inputs are rounded to int8 by operators that convolve with the codes.

A convolution becomes one `paredown::LutConvInt8` that also adds the bias and applies a Relu that follows, if nothing
else reads the value in between.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from ..kernels.lut_conv import ConvSpec, tap_spec
from ..kernels.onnx_ops import ConvOp, conv_attributes
from ..optimizer import packed
from ..optimizer.errors import ExportError
from ..optimizer.weight import Codebook, Layout, Uniform
from .onnx_forms import held, no_bias
from .onnx_linear import Layer, after_marks, before_marks, only_reader
from .onnx_place import Place, place_of, readers, remove_dead, take_over


def replace_convolutions(root: ir.Graph, value: ir.Value, layout: Layout, layer: Layer) -> None:
    """Let every convolution with the dense kernel `value` convolve with the packed one."""
    for node, index in list(readers(value)):
        if index == 1 and node.op_type == "Conv" and not node.domain:
            _replace(root, node, layer, _spec(node, layout, layer.name))


def _replace(root: ir.Graph, node: ir.Node, layer: Layer, conv: ConvSpec) -> None:
    weight = layer.weight
    assert isinstance(weight, Uniform | Codebook)
    last = after_marks(node)
    relu = only_reader(last.outputs[0], "Relu")
    last = relu or last
    place, dtype = place_of(root, node, last), weight.dtype
    x, bias = node.inputs[0], _bias(node)
    assert x is not None
    spec = packed.lut_spec(weight)
    op = ConvOp(relu=relu is not None, planes=spec.bits == 3)
    added = no_bias(place, dtype) if bias is None else place.cast(bias, dtype)
    inputs = [place.cast(before_marks(x), dtype), *_parts(place, weight, conv, layer.name), added]
    attributes = conv_attributes(tap_spec(spec, conv), int(from_torch_dtype(dtype)), conv)
    take_over(last.outputs[0], place.add(op.name, inputs, dtype, attributes))
    remove_dead(last)


def _bias(node: ir.Node) -> ir.Value | None:
    """Return what a convolution adds; torch writes none as zeros of a size that it asks the kernel for."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    waiting = [bias]
    while waiting:
        value = waiting.pop()
        maker = None if value is None else value.producer()
        if maker is not None and maker.op_type == "Shape" and maker.inputs[0] is node.inputs[1]:
            return None
        waiting += [] if maker is None else list(maker.inputs)
    return bias


def _parts(place: Place, weight: Uniform | Codebook, conv: ConvSpec, name: str) -> list[ir.Value]:
    """Return codes, table and scale as the kernel uses them in place."""
    return held(place, name, lambda: packed.conv_parts(weight, conv))


def _spec(node: ir.Node, layout: Layout, name: str) -> ConvSpec:
    _, channels, height, width = layout.shape
    dilation = _pair(node, "dilations")
    kernel = (height, width)
    pads = _pads(node, [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)], name)
    return ConvSpec(channels=channels, kernel=kernel, stride=_pair(node, "strides"), dilation=dilation, pads=pads)


def _pair(node: ir.Node, name: str) -> tuple[int, int]:
    attribute = node.attributes.get(name)
    first, second = (1, 1) if attribute is None else attribute.as_ints()
    return first, second


def _pads(node: ir.Node, around: list[int], name: str) -> tuple[int, int, int, int]:
    """Return the zeros at the top, left, bottom and right; `around`: what the kernel reaches beyond its first input."""
    attribute = node.attributes.get("pads")
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    match automatic:
        case "NOTSET":
            top, left, bottom, right = (0, 0, 0, 0) if attribute is None else attribute.as_ints()
            return top, left, bottom, right
        case "VALID":
            return 0, 0, 0, 0
        case "SAME_UPPER" | "SAME_LOWER" if _pair(node, "strides") == (1, 1):
            less, more = [size // 2 for size in around], [size - size // 2 for size in around]
            before, behind = (less, more) if automatic == "SAME_UPPER" else (more, less)
            return before[0], before[1], behind[0], behind[1]
        case _:
            raise ExportError(f"its convolution pads by {automatic}", where=name, fix="give its padding as numbers")
