"""Where new nodes of an ONNX graph go, how they are named, and who reads a value."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor

from ..kernels.onnx_ops import DOMAIN

Attribute: TypeAlias = int | float | str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
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
        return self.constant(name, TorchTensor(tensor.detach().contiguous(), name))

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return a new initializer, of any type that ONNX has."""
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(tensor.numpy().shape)
        self.root.register_initializer(value)
        return value


def place_of(root: ir.Graph, old: ir.Node, before: ir.Node | None = None) -> Place:
    """Return the place of what stands for a node, before it or a later one."""
    scope, _, stem = str(old.name).rpartition("/")
    return Place(root=root, before=before or old, scope=scope, stem=stem)


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the nodes that still lead to something, of those that read a value."""
    for use in value.uses():
        outputs = use.node.outputs
        if any(output.uses() or output.is_graph_output() for output in outputs):
            yield use.node, use.idx


def take_over(old: ir.Value, new: ir.Value, *, rename: bool = True) -> None:
    """Let `new` stand where `old` stood, graph outputs and name included."""
    new.shape = old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if rename:
        new.name, old.name = old.name, f"{old.name}.replaced"
        new.producer().name = str(new.producer().name).rpartition("/")[0] + f"/{new.name}"  # type: ignore[union-attr]


def remove_dead(node: ir.Node) -> None:
    """Remove a node whose results nothing reads, and what only it read."""
    if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    makers = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for maker in makers:
        if maker is not None:
            remove_dead(maker)


def number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def is_turn(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
