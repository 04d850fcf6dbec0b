"""Find the first layer of an ONNX file whose values differ from torch.

ONNX values keep the names of the torch nodes that made them, so both sides can be asked for the same value. The graph
is searched by opening parts of it, each of what some values are made of, with those as its outputs: memory holds
`Search.at_once` intermediate values of the file, and torch runs up to the node in question, freeing the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from ..optimizer.model import Model
from .difference import difference
from .onnx_trace import torch_program
from .runner import Open, RunnerOptions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Search:
    """How to look: the inputs that show the difference, what is allowed, and which output exceeds it.

    at_once: values that are compared each time a part of the file is opened; more where opening it takes long.
    """

    open_: Open
    options: RunnerOptions
    inputs: tuple[Tensor, ...]
    limit: float
    output: int
    at_once: int = 1


def first_bad_layer(model: Model, path: Path, search: Search) -> str | None:
    """Return "module (value)" of a value that is wrong although all values it is made of are right.

    None where the file does not name its values after torch nodes (another tool wrote it).
    """
    proto = _typed(onnx.load(path, load_external_data=False))
    opset = next(known.version for known in proto.opset_import if not known.domain)
    program = torch_program(model.module(), model.inputs, model.examples(2), opset)
    probe = _Probe(model=model, path=path, search=search, proto=proto, program=program, nodes=_nodes(proto, program))
    bad = proto.graph.output[search.output].name
    if bad not in probe.nodes:
        return None
    lineage = _Lineage(proto=proto, known=frozenset(probe.nodes))
    while True:
        bad = _bisect(probe, lineage.ancestors(bad), bad)
        worse = probe.first_bad(lineage.parents(bad))
        if worse is None:
            return _describe(proto, bad, probe.nodes[bad].name)
        bad = worse


def _typed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the types of its values, as far as they can be inferred."""
    return onnx.shape_inference.infer_shapes(proto)


def _bisect(probe: _Probe, ancestors: Sequence[str], bad: str) -> str:
    """Return the first bad value of `ancestors` (in graph order), or `bad`, as if errors never healed."""
    order = [*ancestors, bad]
    good, found = -1, len(order) - 1
    while found - good > 1:
        inner = min(probe.search.at_once, found - good - 1)
        points = [good + (found - good) * (i + 1) // (inner + 1) for i in range(inner)]
        first = probe.first_bad([order[point] for point in points])
        edges = [good, *points, found]
        at = len(points) if first is None else points.index(order.index(first))
        good, found = edges[at], edges[at + 1]
    return order[found]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lineage:
    """Which comparable values a value is made of."""

    proto: onnx.ModelProto
    known: frozenset[str]

    def ancestors(self, name: str) -> list[str]:
        """Return all comparable values behind `name`, in graph order."""
        makers = self._makers()
        seen, todo = set[str](), [name]
        while todo:
            for source in makers.get(todo.pop(), ()):
                if source not in seen:
                    seen.add(source)
                    todo.append(source)
        return [out for node in self.proto.graph.node for out in node.output if out in seen & self.known]

    def parents(self, name: str) -> list[str]:
        """Return the nearest comparable values behind `name`."""
        makers, seen, todo, found = self._makers(), set[str](), [name], list[str]()
        while todo:
            for source in makers.get(todo.pop(), ()):
                if source in seen:
                    continue
                seen.add(source)
                (found if source in self.known else todo).append(source)
        return found

    def _makers(self) -> dict[str, list[str]]:
        return {out: list(node.input) for node in self.proto.graph.node for out in node.output}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Probe:
    model: Model
    path: Path
    search: Search
    proto: onnx.ModelProto
    program: torch.export.ExportedProgram
    nodes: Mapping[str, fx.Node]
    answers: dict[str, bool] = field(default_factory=dict)

    def first_bad(self, names: Sequence[str]) -> str | None:
        """Return the first of some values that differs from torch; one of another shape tells nothing, and is good."""
        for start in range(0, len(names), self.search.at_once):
            part = names[start : start + self.search.at_once]
            new = [name for name in part if name not in self.answers]
            for name, have in self._file(new).items() if new else ():
                want = self._torch(self.nodes[name])
                self.answers[name] = want.shape == have.shape and not difference(want, have)[1] <= self.search.limit
            worse = next((name for name in part if self.answers[name]), None)
            if worse is not None:
                return worse
        return None

    def _torch(self, node: fx.Node) -> np.ndarray:
        with torch.no_grad():
            value = _run_until(self.program, node, self.search.inputs)
        return value.numpy(force=True)

    def _file(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        probe = _prefix(self.proto, [self._value(name) for name in names])
        fed = {value.name for value in probe.graph.input}
        beside = self.path.with_name(f".{self.path.stem}.probe.onnx")
        try:
            beside.write_bytes(probe.SerializeToString())
            pairs = zip(self.model.inputs, self.search.inputs, strict=True)
            feeds = {spec.name: value.numpy() for spec, value in pairs if spec.name in fed}
            have = self.search.open_(beside, self.search.options).run(feeds)
            return {name: have[name] for name in names}
        finally:
            beside.unlink(missing_ok=True)

    def _value(self, name: str) -> onnx.ValueInfoProto:
        """Return a value as an output, of the type that the file gives it, else of torch's."""
        graph = self.proto.graph
        known = next((v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output) if v.name == name), 0)
        dtype = known or int(from_torch_dtype(self.nodes[name].meta["val"].dtype))
        return onnx.helper.make_tensor_value_info(name, dtype, None)


def _prefix(proto: onnx.ModelProto, outputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
    """Return the part of a model that computes some values, with those as its outputs."""
    wanted, nodes = {value.name for value in outputs}, list[onnx.NodeProto]()
    for node in reversed(proto.graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted |= _read(node)
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    for field_, kept in (
        ("node", nodes[::-1]),
        ("output", outputs),
        ("input", [value for value in proto.graph.input if value.name in wanted]),
        ("initializer", [value for value in proto.graph.initializer if value.name in wanted]),
    ):
        part.graph.ClearField(field_)
        getattr(part.graph, field_).extend(kept)
    return part


def _read(node: onnx.NodeProto) -> set[str]:
    """Return the values that a node reads, those that its subgraphs read from outside among them."""
    inner = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return {*node.input, *(name for graph in inner for part in graph.node for name in _read(part))}


def _nodes(proto: onnx.ModelProto, program: torch.export.ExportedProgram) -> dict[str, fx.Node]:
    """Return ONNX value name -> torch node, for the floating values that both sides have."""
    by_name = {node.name: node for node in program.graph.nodes if _is_floating(node)}
    found = {out: by_name[out] for node in proto.graph.node for out in node.output if out in by_name}
    names = [name for name in program.graph_signature.user_outputs if isinstance(name, str)]
    if len(names) == len(proto.graph.output):
        found |= {out.name: by_name[n] for out, n in zip(proto.graph.output, names, strict=True) if n in by_name}
    return found


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point()


def _run_until(program: torch.export.ExportedProgram, last: fx.Node, inputs: Sequence[Tensor]) -> Tensor:
    """Return the value of a node; only what it is made of is computed, and freed after its last use."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        if "assert" not in str(node.target):  # the trace's own claims about sizes: what is wrong shows in the values
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.name == last.name:
            break
    graph.output(copies[last])
    graph.eliminate_dead_code()
    module = fx.GraphModule(program.graph_module, graph)
    value: Tensor = fx.Interpreter(module, garbage_collect_values=True).run(*_arguments(program, inputs))
    return value


def _arguments(program: torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> Iterator[Any]:
    """Yield the values of the placeholders: parameters, buffers and constants of the program, then inputs in order."""
    given = iter(inputs)
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            yield next(given)
        else:
            target = str(spec.target)
            yield program.state_dict[target] if target in program.state_dict else program.constants[target]


def _describe(proto: onnx.ModelProto, value: str, node: str) -> str:
    maker = next(n.name for n in proto.graph.node if value in n.output)
    module = maker.rpartition("/")[0]
    return f"{module} ({node})" if module else node
