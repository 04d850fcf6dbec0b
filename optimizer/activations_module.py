"""A module that computes with int8 activations: the network's graph with `fake_quantize` or `round_inputs` in it.

Behind an int8 layer stands `requantize` instead: torch then gives what integer kernels give, code by code.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from .activations_dynamic import insert
from .activations_graph import channel_axis, int8_sites, rectified
from .activations_grid import operators
from .activations_names import value_names
from .errors import ExportError, InputError, nearest
from .graph import Graph, from_program, quiet_export
from .model import ActQuant, InputSpec, Model
from .weight import Uniform

Dims: TypeAlias = tuple[dict[int, Any], ...]


def quantized(module: nn.Module, model: Model) -> nn.Module:
    """Return a module that computes as `module` does, with int8 activations where `model` has them.

    Each value that `model.acts` names is put on its grid, inputs of the layers in `model.dynamic` are rounded. Named
    dimensions stay free, and parameters and buffers keep their canonical names.
    Raises InputError where a name means no value of the graph.
    """
    captured = dynamic_graph(module, model)
    lifted = captured.program.module(check_guards=False)
    assert isinstance(lifted, fx.GraphModule)
    follow_writes(lifted.graph)
    held = _insert(lifted.graph, model, _Sums.of(captured, model)) if model.acts else {}
    held |= insert(lifted.graph, captured, model)
    return _rebuilt(lifted, held, module, model)


def dynamic_graph(module: nn.Module, model: Model) -> Graph:
    """Capture with named dimensions free and no operator that writes into what another reads.

    Where torch refuses the names, it finds the dimensions itself. Raises ExportError where the network fixes one.
    """
    example = model.examples(2)
    try:
        program = _export(module, example, named_dims(model.inputs))
    except Exception as first:
        try:
            program = _export(module, example, free_dims(model.inputs))
        except Exception:
            text = str(first).strip().splitlines()
            raise ExportError(
                f"the network cannot be captured: {text[0] if text else type(first).__name__}",
                fix="int8 activations need a network that torch.export accepts with the inputs of the recipe",
            ) from first
    follow_writes(program.graph)
    graph = from_program(program, module)
    _check_free(graph, model.inputs)
    return graph


def _check_free(graph: Graph, inputs: Sequence[InputSpec]) -> None:
    """Raise ExportError where a named dimension became a number."""
    shapes = {node.name: node.meta["val"].shape for node in graph.nodes if node.name in graph.inputs}
    for name, spec in zip(graph.inputs, inputs, strict=True):
        for size, wanted in zip(shapes[name], spec.shape, strict=True):
            if isinstance(wanted, str) and isinstance(size, int):
                raise ExportError(
                    f'input "{spec.name}": the network fixes "{wanted}" at {size}',
                    fix="int8 activations need free dimensions; give its size as a number in the recipe",
                )


def named_dims(inputs: Sequence[InputSpec]) -> Dims:
    """Return the dynamic dimensions of each input, one symbol a name."""
    names = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    dims = {name: torch.export.Dim(name, min=1) for name in names}
    return tuple({i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs)


def free_dims(inputs: Sequence[InputSpec]) -> Dims:
    """Return the dynamic dimensions of each input, for torch to relate by itself."""
    auto = torch.export.Dim.AUTO
    return tuple({i: auto for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs)


def follow_writes(graph: fx.Graph) -> None:
    """Let later readers of what an operator in place has changed read that operator's result."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            changed = node.args[0]
            if isinstance(changed, fx.Node):
                changed.replace_all_uses_with(node, delete_user_cb=_readers_after(order, node))


def _readers_after(order: Mapping[fx.Node, int], node: fx.Node) -> Callable[[fx.Node], bool]:
    return lambda user: order[user] > order[node]


def _export(module: nn.Module, example: tuple[Tensor, ...], dims: Dims) -> torch.export.ExportedProgram:
    with quiet_export(), torch.no_grad():
        return torch.export.export(module.eval(), example, dynamic_shapes=dims, strict=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sums:
    """By the name of the node that gets a grid: the unit of an int8 layer's sums, and the axis of its rows."""

    units: Mapping[str, tuple[Tensor, int]]

    @staticmethod
    def of(graph: Graph, model: Model) -> _Sums:
        names = value_names(graph.nodes, graph.inputs, model.inputs)
        nodes = {node.name: node for node in graph.nodes}
        found: dict[str, tuple[Tensor, int]] = {}
        for name, site in int8_sites(graph, model.weights).items():
            source: Any = nodes[name].args[site.operand]
            grid, weight = model.acts.get(names.get(source.name, "")), model.weights[site.param]
            if grid is not None and isinstance(weight, Uniform):
                unit = grid.scale * weight.scale.flatten().float()
                found[rectified(nodes[name]).name] = (unit, channel_axis(nodes[name], site))
        return _Sums(units=found)


def _insert(graph: fx.Graph, model: Model, sums: _Sums) -> dict[str, Tensor]:
    """Put each value that has a grid on it; return the constants that the graph refers to from then on."""
    placeholders = [node.name for node in graph.nodes if node.op == "placeholder"]
    names = value_names(graph.nodes, placeholders, model.inputs)
    missing = sorted(set(model.acts) - set(names.values()))
    if missing:
        fix = f"{nearest(missing[0], list(names.values()))}; run optimize again for this network"
        raise InputError(f'there is no value "{missing[0]}" to quantize', fix=fix)
    held: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        grid = model.acts.get(names.get(node.name, ""))
        if grid is not None:
            unit, axis = sums.units.get(node.name, (None, 0))
            made = _quantize_after(graph, node, grid)
            if unit is not None:
                _requantize(graph, made, f"unit_{len(held)}", axis)
                held[f"unit_{len(held)}"] = unit
    return held


def _quantize_after(graph: fx.Graph, node: fx.Node, grid: ActQuant) -> fx.Node:
    with graph.inserting_after(node):
        made = graph.call_function(operators()[0], (node, grid.scale, grid.zero, grid.signed))
    made.meta = {key: node.meta[key] for key in ("nn_module_stack", "val") if key in node.meta}
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    return made


def _requantize(graph: fx.Graph, made: fx.Node, constant: str, axis: int) -> None:
    """Let a `fake_quantize` be a `requantize` by the constant of that name."""
    with graph.inserting_before(made):
        unit = graph.create_node("get_attr", constant)
    made.target, made.args = operators()[1], (*made.args, unit, axis)


def _rebuilt(lifted: fx.GraphModule, constants: Mapping[str, Tensor], module: nn.Module, model: Model) -> nn.Module:
    """Return a plain module of the graph: tied parameters are one, constants are no buffers."""
    other = model.aliases()
    values: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    held: dict[str, Any] = dict(constants)
    for node in lifted.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = name = other.get(str(node.target), str(node.target))
            if name not in held:
                held[name] = values[name] if name in values else operator.attrgetter(name)(lifted)
    made = fx.GraphModule(held, lifted.graph)
    for name in [name for name, _ in made.named_buffers() if name not in values]:
        path, _, leaf = name.rpartition(".")
        owner = made.get_submodule(path)
        setattr(owner, leaf, owner._buffers.pop(leaf))
    return made.eval()
