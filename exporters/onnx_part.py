"""Cut the operators of single layers out of an exported file and out of its float form, to run them alone.

Both files come from one trace, so that a value has the same name in both: where a packed operator also adds the bias
and rectifies, the float part ends behind the same rectifier.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper

from ..optimizer.model import Model
from . import onnx_file, onnx_integer, onnx_runner
from .onnx import Options

TAIL = {"Add", "Cast", "Clip", "Gelu", "Identity", "Relu"}
"""What belongs to a layer where it alone reads the layer's result: bias, activation, and sums of the layer's terms."""
REORDERS = ("ReorderInput", "ReorderOutput")
"""onnxruntime's moves into its blocked layout of images and back. A network has them at its ends, a part at each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a part reads and makes, by the names of values. `layers`: weights that one operator reads stay together."""

    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """A part as two files in memory: `before` with floats, `after` as it ships."""

    part: Part
    before: onnx.ModelProto
    after: onnx.ModelProto

    @property
    def signature(self) -> bytes:
        """What cuts have in common that take the same time on inputs of one shape."""
        return _signature(self.before) + b"|" + _signature(self.after)


def cuts(model: Model, names: Collection[str], folder: Path) -> list[Cut]:
    """Return the layers of `names` as parts of their own; a layer that has none, in both forms, is left out.

    Leaves "floats.onnx" of the whole model in `folder`, whose values `with_outputs` can show.
    """
    before, after = folder / "floats.onnx", folder / "packed.onnx"
    onnx_file.write_floats(model, before, Options())
    onnx_file.write(model, after, Options())
    files = _typed(before), _typed(after)
    return [found for part in parts(files[1].graph, names) if (found := _cut_both(files, part)) is not None]


def with_outputs(path: Path, names: Iterable[str], written: Path) -> None:
    """Write a file again with these values as its only outputs; those that are inputs come back as copies."""
    file = onnx.load(path)
    del file.graph.output[:]
    for name in names:
        file.graph.node.append(helper.make_node("Identity", [name], [f"{name}.seen"]))
        file.graph.output.append(onnx.ValueInfoProto(name=f"{name}.seen"))
    onnx.save(file, written)


def write(file: onnx.ModelProto, path: Path) -> None:
    """Write a part as onnxruntime would run it inside a network: without moves into its layout of images and back."""
    onnx.save(file, path)
    library = onnx_runner.kernel_library() if onnx_runner.has_packed_layers(path) else None
    optimized = onnx_integer.optimized(path, library, weights=True)
    if any(node.op_type in REORDERS for node in optimized.graph.node):
        onnx.save(_without_reorders(optimized), path)


def nodes(path: Path) -> int:
    """Return how many operators onnxruntime runs of a file."""
    library = onnx_runner.kernel_library() if onnx_runner.has_packed_layers(path) else None
    return len(onnx_integer.optimized(path, library).graph.node)


def write_chain(count: int, path: Path) -> None:
    """Write a file of `count` operators that do next to nothing, one after another."""
    steps = [helper.make_node("Neg", [f"x{i}"], [f"x{i + 1}"]) for i in range(count)]
    ends = [helper.make_tensor_value_info(f"x{i}", onnx.TensorProto.FLOAT, [1]) for i in (0, count)]
    graph = helper.make_graph(steps, "chain", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def parts(graph: onnx.GraphProto, names: Collection[str]) -> list[Part]:
    """Return what reads each of the weights; weights that one operator reads are one part."""
    readers = _readers(graph)
    constants = _constants(graph, names)
    found: list[tuple[set[str], set[int]]] = []
    for index, node in enumerate(graph.node):
        owners = {owner for name in node.input for owner in constants.get(name, ())}
        if not owners or all(name in constants for name in node.output):
            continue
        own, at = owners, {index}
        for other in [item for item in found if item[0] & own]:
            own, at = own | other[0], at | other[1]
            found.remove(other)
        found.append((own, at))
    return [_part(graph, sorted(own), at, (constants, readers)) for own, at in found]


def _part(
    graph: onnx.GraphProto,
    layers: Sequence[str],
    at: set[int],
    flow: tuple[Mapping[str, frozenset[str]], Mapping[str, list[int]]],
) -> Part:
    constants, readers = flow
    at, ends = set(at), {value.name for value in graph.output}
    made = {name for index in at for name in graph.node[index].output if name}
    for index, node in enumerate(graph.node):
        reads = {name for name in node.input if name and name not in constants}
        ours = bool(reads) and reads <= made and not reads & ends and node.op_type in TAIL and not node.domain
        if index not in at and ours and all(set(readers[name]) <= at | {index} for name in reads):
            at.add(index)
            made |= set(node.output)
    order = [graph.node[index] for index in sorted(at)]
    inputs = [name for node in order for name in node.input if name and name not in constants and name not in made]
    outside = [name for name in made if name in ends or not set(readers.get(name, ())) <= at]
    return Part(layers=tuple(layers), inputs=tuple(dict.fromkeys(inputs)), outputs=tuple(sorted(outside)))


def _readers(graph: onnx.GraphProto) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            found.setdefault(name, []).append(index)
    return found


def _constants(graph: onnx.GraphProto, names: Collection[str]) -> dict[str, frozenset[str]]:
    """Return every value that depends on no input, and the weights that it is made of."""
    found = {value.name: frozenset(_owner(value.name, names)) for value in graph.initializer}
    for node in graph.node:
        reads = [name for name in node.input if name]
        if reads and all(name in found for name in reads):
            found |= dict.fromkeys(node.output, frozenset().union(*(found[name] for name in reads)))
    return found


def _owner(value: str, names: Collection[str]) -> Iterator[str]:
    """Yield the weight that an initializer is a tensor of: "conv1.weight.c16.codes" is of "conv1.weight"."""
    stem = value
    while stem and stem not in names:
        stem = stem.rpartition(".")[0]
    if stem:
        yield stem


def _typed(path: Path) -> onnx.ModelProto:
    """Return a file with its weights, and with the types of all its values, found without the weights."""
    file = onnx.load(path)
    known = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph.value_info
    del file.graph.value_info[:]
    file.graph.value_info.extend(known)
    return file


def _cut_both(files: tuple[onnx.ModelProto, onnx.ModelProto], part: Part) -> Cut | None:
    before, after = (_cut(file, part) for file in files)
    return None if before is None or after is None else Cut(part=part, before=before, after=after)


def _cut(file: onnx.ModelProto, part: Part) -> onnx.ModelProto | None:
    """Return what makes the outputs of a part from its inputs; None where this file does not make them of those."""
    graph = file.graph
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    held = {value.name: value for value in graph.initializer}
    types = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    if not part.outputs or not all(name in types for name in part.inputs):
        return None
    wanted, taken, constants = list(part.outputs), set[int](), dict[str, onnx.TensorProto]()
    while wanted:
        name = wanted.pop()
        if name in held:
            constants[name] = held[name]
        elif name and name not in part.inputs:
            if name not in makers:
                return None
            if makers[name] not in taken:
                taken.add(makers[name])
                wanted += graph.node[makers[name]].input
    made = onnx.ModelProto(ir_version=file.ir_version, opset_import=file.opset_import, functions=file.functions)
    made.graph.name = "part"
    made.graph.node.extend(graph.node[index] for index in sorted(taken))
    made.graph.initializer.extend(constants.values())
    made.graph.input.extend(types[name] for name in part.inputs)
    made.graph.output.extend(types.get(name, onnx.ValueInfoProto(name=name)) for name in part.outputs)
    return made


def _signature(file: onnx.ModelProto) -> bytes:
    """Return operators, attributes and shapes without names and values."""
    numbers: dict[str, int] = {}
    lines = [str([(numbers.setdefault(x.name, len(numbers)), str(x.type)) for x in file.graph.input])]
    for node in file.graph.node:
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        names = [numbers.setdefault(name, len(numbers)) for name in (*node.input, *node.output)]
        lines.append(f"{node.domain} {node.op_type} {names} {attributes!r}")
    shapes = sorted((numbers[x.name], x.data_type, tuple(x.dims)) for x in file.graph.initializer)
    return "\n".join((*lines, str(shapes))).encode()


def _without_reorders(file: onnx.ModelProto) -> onnx.ModelProto:
    """Return an optimized part whose inputs and outputs are in the blocked layout; numbers differ, time does not."""
    graph = file.graph
    renamed = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "ReorderInput"}
    ends = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "ReorderOutput"}
    kept = [node for node in graph.node if node.op_type not in REORDERS]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, ends.get(name, name))
    outputs = [onnx.ValueInfoProto(name=ends.get(value.name, value.name)) for value in graph.output]
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.output.extend(outputs)
    return file
