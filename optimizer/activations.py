"""Static int8 activations: give a network whose weights are quantized the grids that integer kernels compute on.

Weights of int8 layers are signed bytes with a positive scale per row, biases whole multiples of input scale times row
scale (Jacob et al. 2018, section 2.4); both are changed here to what ships, so that torch computes what a runtime does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, fx

from .activations_graph import MIDDLE, Places, choose, int8_sites, operand
from .activations_module import dynamic_graph
from .activations_names import value_names
from .activations_range import Rule, Watch, measure
from .errors import RecipeError
from .graph import Graph, Site
from .model import Model
from .steps import Decision, short
from .walk import Batch, Traced
from .weight import Dense, Uniform, Weight

DEAD_SCALE = 2.0**-14
"""Scale of a row of zeros, which only its bias needs: the smallest normal number of float16."""
MOST_BIAS = 2.0**30
"""Largest code of a bias: as much again is left for the sum of products."""


def check(decisions: Sequence[Decision]) -> None:
    """Raise RecipeError where no layer of a plan gets the weights that int8 activations need."""
    if not any(decision.method and _fits(decision) for decision in decisions):
        raise RecipeError(
            "activations: int8 needs layers of 8-bit uniform weights with one scale per row and no residual, "
            "the step has none",
            fix="use quantizer: uniform, bits: 8, group: 0, without residual, in the step or in an override",
        )


def check_none(model: Model, asked: str) -> None:
    """Raise RecipeError where activations have grids already, or would have them beside inputs rounded at run time."""
    if model.acts:
        raise RecipeError("activations are quantized already", fix="ask for activations: int8 in the last step")
    if model.dynamic and asked == "int8":
        raise RecipeError(
            "activations: int8 does not go with activations: dynamic of an earlier step",
            fix="use one of them in every step; int8 is for 8-bit weights, dynamic for what kernels multiply by",
        )


def apply(model: Model, batches: Sequence[Batch], rule: Rule) -> tuple[Model, tuple[str, ...]]:
    """Return the model with int8 activations wherever its 8-bit uniform weights allow, and notes that say where."""
    graph = dynamic_graph(model.module(), model)
    places = choose(graph, model.weights)
    model = model.with_weights({name: signed(model.weights[name]) for name in places.layers})
    names = value_names(graph.nodes, graph.inputs, model.inputs)
    wanted = frozenset(names[node] for node in places.own)
    traced = Traced(graphs=(graph,) * len(batches), batches=tuple(batches))
    grids = measure(Watch(traced=traced, values=model.values(), inputs=model.inputs, wanted=wanted), rule)
    moved = {names[node]: grids[names[source]] for node, source in places.shared.items() if node in names}
    acts = {**grids, **moved}
    steps = {node: acts[names[operand(node, site).name]].scale for node, site in _sites(graph, places)}
    changed = replace(_with_biases(model, graph, steps), acts=dict(sorted(acts.items())))
    return changed, _notes(model, places, rule)


def layers(model: Model) -> frozenset[str]:
    """Return the parameters of the layers that compute in integers."""
    if not model.acts:
        return frozenset()
    graph = dynamic_graph(replace(model, acts={}).module(), model)
    names = value_names(graph.nodes, graph.inputs, model.inputs)
    nodes = {node.name: node for node in graph.nodes}
    found = int8_sites(graph, model.weights).items()
    return frozenset(site.param for name, site in found if names[operand(nodes[name], site).name] in model.acts)


def signed(weight: Weight) -> Uniform:
    """Return 8-bit codes with positive scales; a row of negative scale is turned, -128 becoming 127 steps of it."""
    assert isinstance(weight, Uniform)
    turned = (weight.scale < 0).expand_as(weight.codes)
    codes = torch.where(turned, (2 * MIDDLE - weight.codes.int()).clamp(max=255), weight.codes.int())
    dead = weight.scale == 0
    codes = torch.where(dead.expand_as(codes), MIDDLE, codes).to(torch.uint8)
    return replace(weight, codes=codes, scale=torch.where(dead, DEAD_SCALE, weight.scale.abs()))


def _fits(decision: Decision) -> bool:
    """Return whether a decision makes weights that `has_codes` takes."""
    if decision.method != "uniform":
        return False
    made = decision.spec.format
    return (made.bits, made.group, getattr(made, "residual", None)) == (8, 0, None)


def _notes(model: Model, places: Places, rule: Rule) -> tuple[str, ...]:
    """Say how many values and layers are int8, and which layers of quantized weights compute in float."""
    values, count = len(places.own) + len(places.shared), len(places.layers)
    notes = [f"int8 activations: {count} layers in integers, {values} values on grids ({rule.range})"]
    small = [name for name, weight in model.weights.items() if not isinstance(weight, Dense)]
    rest = [name for name in small if name not in places.layers]
    if rest:
        shown = ", ".join(short(name) for name in rest)
        notes.append(f"computed in float for want of an integer kernel or of 8-bit uniform weights: {shown}")
    return tuple(notes)


def _sites(graph: Graph, places: Places) -> Iterator[tuple[fx.Node, Site]]:
    """Yield the operators of the int8 layers."""
    for node in graph.nodes:
        if node.name in places.nodes:
            yield node, graph.sites[node.name][0]


def _with_biases(model: Model, graph: Graph, steps: Mapping[fx.Node, float]) -> Model:
    """Return the model with the biases of int8 layers as int32 holds them; `steps`: the scale of each one's input.

    A bias that several operators add keeps its values: each of them rounds it for itself.
    """
    changed: dict[str, Tensor] = {}
    for node, step in steps.items():
        name = graph.values.get(getattr(node.args[2], "name", ""), "") if len(node.args) > 2 else ""
        uses = sum(len(other.users) for other in graph.nodes if graph.values.get(other.name) == name)
        if name in model.tensors and uses == 1:
            weight = model.weights[graph.sites[node.name][0].param]
            assert isinstance(weight, Uniform)
            changed[name] = round_bias(model.tensors[name], step * weight.scale.flatten().float())
    return model.with_tensors(changed)


def round_bias(bias: Float[Tensor, "out"], unit: Float[Tensor, "out"]) -> Float[Tensor, "out"]:
    """Return a bias in whole units, as far as int32 goes."""
    codes = (bias.double() / unit.double()).round().clamp(-MOST_BIAS, MOST_BIAS)
    return (codes * unit.double()).to(bias.dtype)
