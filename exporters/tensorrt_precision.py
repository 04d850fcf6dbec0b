"""Put the precision of a strongly typed network into its graph: floats of one type, Casts around what stays float32.

Inputs and outputs keep their types. Float16 ends at 65504 and at 6e-8: what has constants beyond these, and what
squares, exponentiates or sums, stays float32, with all that carries its result on, up to an operator that bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from ..kernels.onnx_ops import DOMAIN

Precision: TypeAlias = Literal["fp16", "bf16", "fp32"]

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
GROWS = {"Pow", "Exp", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd", "CumSum"}
"""Operators whose results leave the range of their inputs."""
CARRIES = {"Add", "Sub", "Mul", "Neg", "Abs", "Max", "Min", "Where", "ReduceMean", "ReduceMax", "ReduceMin"} | {
    *("Concat", "Expand", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    *("Cast", "CastLike", "Flatten", "Gather", "Tile", "Trilu"),
}
"""Operators whose results are as large as their inputs."""
RECURRENT = {"GRU", "LSTM", "RNN"}
"""Operators that bound what they read themselves; a Cast before one of them stops the builder (tensorrt-rtx 1.7.1)."""
NO_BFLOAT16 = {"GRU", "ConvTranspose"}
"""Operators that the parser or the builder refuses in bfloat16 (tensorrt-rtx 1.7.1)."""
SCALES = {"DequantizeLinear", "QuantizeLinear"}
FIXED = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs that have to be float32."""
LARGEST = 65504.0
"""The largest number of float16."""
WORST_NUMBER = 2.0**-8
"""Relative error up to which a single number, an epsilon say, may be rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A node that stays float32, and why."""

    node: str
    reason: str


def set_precision(model: ir.Model, precision: Precision, keep: Callable[[ir.Node], bool]) -> tuple[Kept, ...]:
    """Rewrite `model` in place; every value must have a type. `keep` names nodes that stay float32 besides."""
    wanted = TYPES[precision]
    reasons = dict(_kept(model.graph, precision, keep)) if precision != "fp32" else {}
    caster = _Caster(graph=model.graph, wanted=wanted)
    for node in list(model.graph):
        caster.visit(node, ir.DataType.FLOAT if node in reasons else wanted)
    caster.outputs()
    return tuple(Kept(node=str(node.name), reason=reason) for node, reason in reasons.items() if reason)


def wide(graph: ir.Graph, precision: Precision) -> frozenset[str]:
    """Return the names of the nodes that stay float32 for what they are."""
    return frozenset(str(node.name) for node, _ in _kept(graph, precision, lambda node: False))


def _kept(graph: ir.Graph, precision: Precision, keep: Callable[[ir.Node], bool]) -> Iterator[tuple[ir.Node, str]]:
    """Yield the nodes that stay float32, with the reason where the user has not asked for it."""
    wide: set[ir.Value] = set()
    for node in graph:
        if node.domain == DOMAIN:
            continue
        reason = _reason(node, precision)
        carried = precision == "fp16" and node.op_type not in RECURRENT and _reads(node, wide)
        grows = precision == "fp16" and (node.op_type in GROWS or _squares(node))
        beyond = reason != "" and precision == "fp16"
        if (grows or beyond or carried) and (grows or node.op_type in CARRIES):
            wide.update(node.outputs)
        if reason or carried or grows or keep(node):
            yield node, reason


def _reads(node: ir.Node, values: set[ir.Value]) -> bool:
    return any(value in values for value in node.inputs if value is not None)


def _reason(node: ir.Node, precision: Precision) -> str:
    """Return why a node stays float32 for what it is, "" where nothing speaks against another type."""
    if any(True for _ in _subgraphs(node)):
        return f"{node.op_type} has graphs of its own"
    if precision == "bf16":
        return f"{node.op_type} is not computed in bfloat16" if node.op_type in NO_BFLOAT16 else ""
    for i, value in enumerate(node.inputs):
        if value is not None and value.const_value is not None and value.dtype in FLOATS:
            exact = i == 1 and node.op_type in SCALES
            found = _beyond(value.const_value.numpy().astype(np.float64), exact=exact)
            if found:
                return f"{value.name} holds {found}, which float16 does not"
    return ""


def _beyond(values: np.ndarray, *, exact: bool) -> str:
    """Return a number that float16 cannot stand for: a finite one beyond its range, or one that it rounds too far.

    Of many, small ones count little beside large ones: they are judged together, unless they have to be `exact`.
    """
    known = values[np.isfinite(values) & (values != 0)]
    if not known.size:
        return ""
    largest = known[np.abs(known).argmax()]
    if abs(largest) > LARGEST:
        return f"{largest:.3g}"
    lost = np.abs(known.astype(np.float16) - known)
    if values.size != 1 and not exact:
        too_small = np.linalg.norm(lost / abs(largest)) > WORST_NUMBER * np.linalg.norm(known / abs(largest))
        return f"nothing above {abs(largest):.3g}" if too_small else ""
    wrong = lost / np.abs(known)
    return f"{known[wrong.argmax()]:.3g}" if wrong.max() > WORST_NUMBER else ""


def _squares(node: ir.Node) -> bool:
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


@dataclass(slots=True)
class _Caster:
    """Casts values where their readers want another type; each value once per type."""

    graph: ir.Graph
    wanted: ir.DataType
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def visit(self, node: ir.Node, dtype: ir.DataType) -> None:
        if node.domain == DOMAIN:
            dtype = node.outputs[0].dtype or dtype
        fixed = FIXED.get(node.op_type, ()) if not node.domain else ()
        for i, value in enumerate(node.inputs):
            if value is not None and _is_float(value):
                node.replace_input_with(i, self.cast(value, ir.DataType.FLOAT if i in fixed else dtype, node))
        for inner, i in _captured(node):
            value = inner.inputs[i]
            if value is not None and _is_float(value):
                inner.replace_input_with(i, self.cast(value, ir.DataType.FLOAT, node))
        _set_attributes(node, dtype)
        for value in node.outputs:
            if _is_float(value):
                value.type = ir.TensorType(dtype)

    def cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.made:
            made = self._constant(value, dtype) if value.const_value is not None else None
            self.made[value, dtype] = made or self._cast(value, dtype, before)
        return self.made[value, dtype]

    def outputs(self) -> None:
        """Give the outputs of the graph the types that they had."""
        for i, value in enumerate(list(self.graph.outputs)):
            had = value.metadata_props.get(TYPE)
            if had is None or value.dtype == ir.DataType[had]:
                continue
            name, value.name = value.name, f"{value.name}.inner"
            node = ir.node("Cast", [value], {"to": int(ir.DataType[had])}, name=f"/{name}.cast")
            (result,) = node.outputs
            result.name, result.shape, result.type = name, value.shape, ir.TensorType(ir.DataType[had])
            self.graph.append(node)
            self.graph.outputs[i] = result

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}.{dtype.name.lower()}"
        with np.errstate(over="ignore"):
            held = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
        made = ir.Value(name=name, const_value=held, shape=value.shape, type=ir.TensorType(dtype))
        self.graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        node = ir.node("Cast", [value], {"to": int(dtype)})
        (result,) = node.outputs
        result.name, result.shape, result.type = f"{value.name}.{dtype.name.lower()}", value.shape, ir.TensorType(dtype)
        node.name = f"{str(before.name).rpartition('/')[0]}/{result.name}"
        self.graph.insert_before(before, node)
        return result


TYPE = "dtype"
"""Where an output notes the type that it had."""


def note_outputs(graph: ir.Graph) -> None:
    """Note the types of outputs, which `set_precision` gives back to them."""
    for value in graph.outputs:
        if _is_float(value) and value.dtype is not None:
            value.metadata_props[TYPE] = value.dtype.name


def _set_attributes(node: ir.Node, dtype: ir.DataType) -> None:
    """Let attributes that name a floating type, or hold a number of one, say the new one."""
    for key in ("to", "dtype", "output_dtype"):
        known = node.attributes.get(key)
        if known is not None and not node.domain and ir.DataType(known.as_int()) in FLOATS:
            node.attributes[key] = ir.AttrInt64(key, int(dtype))
    if node.op_type == "ConstantOfShape" and _is_float(node.outputs[0]):
        held = node.attributes.get("value")
        number = np.zeros(1) if held is None else held.as_tensor().numpy()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(number.astype(dtype.numpy()), dtype=dtype))


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _captured(node: ir.Node) -> Iterator[tuple[ir.Node, int]]:
    """Yield the reads of outer values by the graphs of a node."""
    for graph in _subgraphs(node):
        inner = list(graph.all_nodes())
        own = {*graph.inputs, *graph.initializers.values(), *_results(inner)}
        for part in inner:
            yield from ((part, i) for i, value in enumerate(part.inputs) if value is not None and value not in own)


def _results(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    for node in nodes:
        yield from node.outputs


def _is_float(value: ir.Value) -> bool:
    return value.dtype in FLOATS
