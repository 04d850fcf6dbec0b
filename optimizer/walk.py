"""Run a network's graph over all calibration batches in lockstep, from one use of a weight to the next.

At each site every batch stands at the same operator, so the visitor sees the statistics of all of them, may replace the
weight, and the walk goes on with the replaced one: one pass through the network quantizes it sequentially. Memory is
bounded by the activations that are alive at one operator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from .errors import InputError
from .graph import RECURRENT, Graph, Site, aten, capture, flat_weights
from .rows import rows_of

Batch: TypeAlias = tuple[Tensor, ...]
Inputs: TypeAlias = Callable[[], Iterator[Tensor]]
"""Yields the tensors that a site multiplies, one per batch; may be called more than once."""

CHUNK_BYTES = 64 * 2**20
"""Rows are formed from at most this much input at a time (a 3x3 conv makes nine times as much of it)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """The inputs of one site and the rows that its weight multiplies; inputs and `nodes`, the calls, go by batch.

    reference: the inputs of the same site in the network that a walk compares with, where it compares.
    """

    site: Site
    nodes: Sequence[fx.Node]
    inputs: Inputs
    reference: Inputs | None = None

    def rows(self) -> Iterator[Float[Tensor, "groups rows in"]]:
        """Yield the rows of all batches in pieces of bounded size."""
        return self._rows(self.inputs)

    def reference_rows(self) -> Iterator[Float[Tensor, "groups rows in"]]:
        """Yield the reference's rows in the same pieces."""
        assert self.reference is not None
        return self._rows(self.reference)

    def _rows(self, inputs: Inputs) -> Iterator[Float[Tensor, "groups rows in"]]:
        for node, value in zip(self.nodes, inputs(), strict=True):
            taps = max(1, self._columns() // max(1, value.shape[1] if value.ndim > 1 else 1))
            per_item = max(1, value[:1].numel() * value.element_size() * taps)
            for piece in torch.split(value, max(1, CHUNK_BYTES // per_item)) if self._batched(value) else (value,):
                yield rows_of(self.site, node, piece)

    def _batched(self, value: Tensor) -> bool:
        """Return whether the first dimension may be cut; a convolution's input may come without a batch."""
        return value.ndim > 2 and (self.site.kind not in ("conv", "conv_transpose") or value.ndim == len(self._shape))

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.site.layout.shape

    def _columns(self) -> int:
        return math.prod(self._shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Visitor:
    """What to do at each site: `before` may replace the weight, `after` the outputs of all batches.

    before(site, reader) -> new parameter value or None.
    after(site, node, outputs) -> new outputs, one per batch, or None.
    value(graph, node, made) -> what takes the place of an input or of a result, batch by batch, or None.
    """

    before: Callable[[Site, Reader], Tensor | None] | None = None
    after: Callable[[Site, fx.Node, Sequence[Tensor]], Sequence[Tensor] | None] | None = None
    value: Callable[[Graph, fx.Node, Any], Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traced:
    """Batches and the graph that each was captured with; all graphs use the same weights in the same order."""

    graphs: tuple[Graph, ...]
    batches: tuple[Batch, ...]

    @property
    def graph(self) -> Graph:
        return self.graphs[0]

    @property
    def samples(self) -> int:
        return sum(len(batch[0]) for batch in self.batches)


def trace(module: nn.Module, batches: Sequence[Batch]) -> Traced:
    """Capture a module once for each shape that the batches have.

    Raises InputError where two shapes use different weights, or in a different order.
    """
    known: dict[Any, Graph] = {}
    for batch in batches:
        key = tuple((tuple(x.shape), x.dtype) for x in batch)
        if key not in known:
            known[key] = capture(module, batch)
            _check_same(next(iter(known.values())), known[key])
    graphs = tuple(known[tuple((tuple(x.shape), x.dtype) for x in batch)] for batch in batches)
    return Traced(graphs=graphs, batches=tuple(batches))


@torch.no_grad()
def walk(
    traced: Traced,
    values: Mapping[str, Tensor],
    visitor: Visitor | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> list[tuple[Any, ...]]:
    """Run the graph on all batches and return each batch's outputs.

    values: parameters and buffers by canonical name; the mapping is not changed. reference: other values, which no
    visitor changes, run beside them so that readers have the inputs of both; that doubles the activations alive.
    """
    last = {id(graph): _last_uses(graph.nodes) for graph in traced.graphs}

    def slots(held: dict[str, Tensor]) -> list[_Slot]:
        pairs = zip(traced.graphs, traced.batches, strict=True)
        return [_Slot(graph=graph, batch=batch, last=last[id(graph)], values=held) for graph, batch in pairs]

    now = dict(values)
    beside = [] if reference is None else slots(dict(reference))
    return _Walk(slots=slots(now), beside=beside, values=now, visitor=visitor or Visitor()).run()


def _check_same(one: Graph, other: Graph) -> None:
    if _uses(one) != _uses(other):
        raise InputError(
            "calibration batches of different shapes use different weights", fix="give batches of one shape"
        )


def _uses(graph: Graph) -> list[Any]:
    """Return what the operators with sites do, in order and without their names."""
    found = [graph.sites[node.name] for node in graph.nodes if node.name in graph.sites]
    return [[(s.param, s.kind, s.operand, s.layout, s.first, s.count) for s in sites] for sites in found]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Slot:
    """One batch on its way: node name -> value, for the values that are still needed."""

    graph: Graph
    batch: Batch
    last: Mapping[str, Sequence[str]]
    values: Mapping[str, Tensor]
    env: dict[str, Any] = field(default_factory=dict)

    def stops(self) -> list[int]:
        """Return the places of the operators with sites."""
        return [index for index, node in enumerate(self.graph.nodes) if node.name in self.graph.sites]

    def free(self, node: fx.Node) -> None:
        for dead in self.last.get(node.name, ()):
            self.env.pop(dead, None)


@dataclass(slots=True, kw_only=True)
class _Walk:
    """Batches walk alone from one operator with sites to the next, where each waits for all others.

    Between them the operators may differ (`contiguous` of a batch of one leaves no trace in a graph).
    """

    slots: list[_Slot]
    values: dict[str, Tensor]
    visitor: Visitor
    beside: list[_Slot] = field(default_factory=list)

    def run(self) -> list[tuple[Any, ...]]:
        starts = [0] * len(self.slots)
        for places in zip(*(slot.stops() for slot in self.slots), strict=True):
            for slot, start, place in zip(self.slots, starts, places, strict=True):
                self._advance(slot, slot.graph.nodes[start:place])
            for slot, start, place in zip(self.beside, starts, places, strict=bool(self.beside)):
                self._advance(slot, slot.graph.nodes[start:place])
            self._call([slot.graph.nodes[place] for slot, place in zip(self.slots, places, strict=True)])
            starts = [place + 1 for place in places]
        for slot, start in zip(self.slots, starts, strict=True):
            self._advance(slot, slot.graph.nodes[start:])
        return [tuple(self._value(node, slot) for node in slot.graph.outputs) for slot in self.slots]

    def _advance(self, slot: _Slot, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            if node.op == "placeholder" and node.name in slot.graph.inputs:
                slot.env[node.name] = self._seen(node, slot, slot.batch[slot.graph.inputs.index(node.name)])
            elif _is_call(node) and any(used.name in slot.env for used in node.all_input_nodes):
                slot.env[node.name] = self._seen(node, slot, self._run(node, slot))
            slot.free(node)

    def _call(self, nodes: Sequence[fx.Node]) -> None:
        sites = self.slots[0].graph.sites[nodes[0].name]
        if self.visitor.before is not None:
            self._before(nodes, sites)
        outputs = [self._run(node, slot) for node, slot in zip(nodes, self.slots, strict=True)]
        if self.visitor.after is not None and len(sites) == 1:
            outputs = list(self.visitor.after(sites[0], nodes[0], outputs) or outputs)
        for node, slot, output in zip(nodes, self.slots, outputs, strict=True):
            slot.env[node.name] = self._seen(node, slot, output)
            slot.free(node)
        for node, slot in zip(nodes, self.beside, strict=bool(self.beside)):
            slot.env[node.name] = self._run(node, slot)
            slot.free(node)

    def _seen(self, node: fx.Node, slot: _Slot, made: Any) -> Any:
        """Return what the visitor puts in the place of a value."""
        silent = self.visitor.value is None or slot.values is not self.values
        changed = None if silent else self.visitor.value(slot.graph, node, made)  # type: ignore[misc]
        return made if changed is None else changed

    def _before(self, nodes: Sequence[fx.Node], sites: Sequence[Site]) -> None:
        if nodes[0].target in RECURRENT:
            return self._visit_recurrent(nodes)
        for site in sites:
            beside = self._operand(nodes, site.operand, self.beside) if self.beside else None
            self._visit_site(site, nodes, self._operand(nodes, site.operand, self.slots), beside)
        return None

    def _operand(self, nodes: Sequence[fx.Node], operand: int, slots: Sequence[_Slot]) -> Inputs:
        def inputs() -> Iterator[Tensor]:
            for node, slot in zip(nodes, slots, strict=True):
                value = self._value(node.args[operand], slot)
                yield value[0] if isinstance(value, list) else value  # an LSTM cell gets [hidden, cell]

        return inputs

    def _visit_site(
        self, site: Site, nodes: Sequence[fx.Node], inputs: Inputs, reference: Inputs | None = None
    ) -> None:
        assert self.visitor.before is not None
        changed = self.visitor.before(site, Reader(site=site, nodes=nodes, inputs=inputs, reference=reference))
        if changed is not None:
            self.values[site.param] = changed

    def _run(self, node: fx.Node, slot: _Slot) -> Any:
        args = fx.map_arg(node.args, lambda n: self._value(n, slot))
        kwargs = fx.map_arg(node.kwargs, lambda n: self._value(n, slot))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, node: Any, slot: _Slot) -> Any:
        """Return a node's value; what depends on parameters alone is worked out anew, since they may change."""
        if not isinstance(node, fx.Node):
            return [self._value(item, slot) for item in node] if isinstance(node, (list, tuple)) else node
        if node.name in slot.env:
            return slot.env[node.name]
        if node.name in slot.graph.constants:
            return slot.graph.constants[node.name]
        if node.op == "placeholder":
            return slot.values[slot.graph.values[node.name]]
        return self._run(node, slot)

    def _visit_recurrent(self, nodes: Sequence[fx.Node]) -> None:
        """Visit a recurrent operator layer by layer: inputs x for W_ih, previous hidden states for W_hh."""
        plan = _Recurrent.of(nodes[0])
        sites = {site.param: site for site in self.slots[0].graph.sites[nodes[0].name]}
        layer_inputs = [plan.time_major(self._value(n.args[0], s)) for n, s in zip(nodes, self.slots, strict=True)]
        states = [plan.states(self._value(n.args[1], s)) for n, s in zip(nodes, self.slots, strict=True)]
        for layer in range(plan.layers):
            outputs: list[list[Tensor]] = [[] for _ in self.slots]
            for direction in range(plan.directions):
                cell = _Cell(plan=plan, place=layer * plan.directions + direction, reverse=direction == 1)
                visit = functools.partial(self._visit_param, sites, nodes)
                visit(cell.params[0], layer_inputs)
                visit(cell.params[1], [hidden for _, hidden in self._hidden(cell, layer_inputs, states)])
                for parts, (out, _) in zip(outputs, self._hidden(cell, layer_inputs, states), strict=True):
                    parts.append(out)
            layer_inputs = [torch.cat(parts, dim=-1) for parts in outputs]

    def _visit_param(
        self, sites: Mapping[str, Site], nodes: Sequence[fx.Node], param: fx.Node, inputs: Sequence[Tensor]
    ) -> None:
        site = sites.get(self.slots[0].graph.values.get(param.name, ""))
        if site is not None:
            self._visit_site(site, nodes, lambda: iter(inputs))

    def _hidden(
        self, cell: _Cell, inputs: Sequence[Tensor], states: Sequence[list[Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        flat = [self._value(param, self.slots[0]) for param in cell.params]
        return [cell.run(x, state, flat) for x, state in zip(inputs, states, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recurrent:
    """The arguments of aten.gru.input and its kin: (x, hx, weights, has_biases, layers, dropout, train, bi, first)."""

    node: fx.Node
    biases: bool
    layers: int
    directions: int
    batch_first: bool
    weights: tuple[fx.Node, ...]

    @staticmethod
    def of(node: fx.Node) -> _Recurrent:
        biases, layers, _, _, bidirectional, batch_first = node.args[3:9]
        return _Recurrent(
            node=node,
            biases=bool(biases),
            layers=cast(int, layers),
            directions=2 if bidirectional else 1,
            batch_first=bool(batch_first),
            weights=tuple(flat_weights(node)),
        )

    def states(self, hx: Any) -> list[Tensor]:
        return list(hx) if isinstance(hx, (list, tuple)) else [hx]

    def time_major(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.batch_first else x


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One layer and direction of a recurrent operator."""

    plan: _Recurrent
    place: int
    reverse: bool

    @property
    def params(self) -> tuple[fx.Node, ...]:
        per_cell = len(self.plan.weights) // (self.plan.layers * self.plan.directions)
        return self.plan.weights[self.place * per_cell : (self.place + 1) * per_cell]

    def run(self, x: Tensor, states: Sequence[Tensor], flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (outputs, the hidden states that W_hh multiplied), both (time, batch, hidden)."""
        first = [state[self.place : self.place + 1] for state in states]
        target: Any = self.plan.node.target
        hx = first if target == aten.lstm.input else first[0]
        x = x.flip(0) if self.reverse else x
        out = target(x, hx, flat, self.plan.biases, 1, 0.0, False, False, False)[0]
        previous = torch.cat([first[0], out[:-1]])
        return (out.flip(0), previous) if self.reverse else (out, previous)


_ASSERTIONS = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg}


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in _ASSERTIONS


def _last_uses(nodes: Iterable[fx.Node]) -> dict[str, list[str]]:
    """Return node name -> the values that nobody needs after it."""
    last: dict[str, fx.Node] = {}
    for node in nodes:
        last.setdefault(node.name, node)
        for used in node.all_input_nodes:
            last[used.name] = node
    dead: dict[str, list[str]] = {}
    for used_name, user in last.items():
        if user.op != "output":
            dead.setdefault(user.name, []).append(used_name)
    return dead
