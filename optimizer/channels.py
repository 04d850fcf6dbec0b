"""Follow channel numbers through a network's graph: which rows, columns and elements of its parameters are one channel.

Every row and every input channel of a weight gets a number, every element of the other parameters one; operators join
the numbers that must stay or go together. A value carries the numbers of its elements: a tensor of its own number of
dimensions, of size 1 along each that makes no difference (batch, space, time). Views are run on the numbers themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor, fx

from .errors import InfeasibleError
from .graph import Graph, Site, module_path
from .ledger import FREE, FROZEN, Ledger
from .weight import Layout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Value:
    """The channel numbers of a tensor. `own`: it comes from parameters alone, so that it can be cut like them."""

    ids: Int64[Tensor, "..."]
    shape: tuple[int, ...]
    own: bool = False

    @property
    def varying(self) -> tuple[int, ...]:
        """Return the dimensions along which numbers differ."""
        return tuple(axis for axis, size in enumerate(self.ids.shape) if size > 1)

    def full(self) -> Int64[Tensor, "..."]:
        return self.ids.expand(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrix:
    """The numbers of a weight's rows (out) and of its input channels (groups, in/groups), `taps` columns each."""

    layout: Layout
    rows: Int64[Tensor, "out"]
    columns: Int64[Tensor, "groups in"]
    taps: int
    producer: bool = False


@dataclass(slots=True, kw_only=True)
class Channels:
    """What following a graph found.

    matrices: weight -> its numbers. elements: other parameter or buffer -> the numbers of its elements.
    balances: runs of channels that must lose equally many, each a list of blocks. values: node -> its numbers.
    multiplied: the weights that something is multiplied by, not only looked up in.
    """

    ledger: Ledger = field(default_factory=Ledger)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    elements: dict[str, Int64[Tensor, "..."]] = field(default_factory=dict)
    balances: list[list[Int64[Tensor, "..."]]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    multiplied: set[str] = field(default_factory=set)


Rule: TypeAlias = Callable[["Follower", fx.Node], Any]
"""What an operator means: the follower and the operator's call -> the numbers of its result."""


@dataclass(slots=True, kw_only=True)
class Follower:
    """The walk over the graph's operators; the rules of single operators are in `channel_rules`."""

    graph: Graph
    channels: Channels
    fixed: frozenset[str]
    rule_of: Callable[[fx.Node, Sequence[Site]], Rule | None]
    node: Any = None
    grids: list[Value] = field(default_factory=list)

    @property
    def ledger(self) -> Ledger:
        return self.channels.ledger

    def visit(self, node: fx.Node) -> None:
        self.node = node
        if node.op == "call_function":
            self.channels.values[node.name] = self._call(node)
        elif node.op == "get_attr":
            self.channels.values[node.name] = constant(self.graph.constants[node.name])

    def _call(self, node: fx.Node) -> Any:
        if not _tensors(node.meta.get("val")):
            return None
        sites = self.graph.sites.get(node.name, ())
        rule = self.rule_of(node, sites)
        if rule is not None:
            return rule(self, node)
        used = [self.value(n) for n in node.all_input_nodes]
        live = [v for v in flat(used) if not v.own and self.ledger.is_live(v.ids)]
        if live:
            where = f'"{module_path(node)}"' if module_path(node) else "the network"
            fix = "name the layers before it in skip, or replace it by operators that are known"
            raise InfeasibleError(f"channels cannot be followed through {node.target}", where=where, fix=fix)
        return frozen_like(node.meta.get("val"))

    def value(self, node: Any) -> Any:
        """Return the numbers of a node's value; parameters and inputs get theirs when first asked for."""
        if isinstance(node, (list, tuple)):
            return [self.value(item) for item in node]
        if not isinstance(node, fx.Node):
            return None
        if node.name not in self.channels.values:
            self.channels.values[node.name] = self._placeholder(node)
        return self.channels.values[node.name]

    def _placeholder(self, node: fx.Node) -> Any:
        if node.name in self.graph.constants:
            return constant(self.graph.constants[node.name])
        name, val = self.graph.values.get(node.name), node.meta.get("val")
        if name is None or not isinstance(val, Tensor):
            return frozen_like(val)
        if name not in self.channels.elements:
            self.channels.elements[name] = self.ledger.fresh(*val.shape)
        return Value(ids=self.channels.elements[name], shape=tuple(val.shape), own=True)

    def matrix(self, site: Site) -> Matrix:
        """Return the numbers of a site's weight, the same for all its uses."""
        layout, known = site.layout, self.channels.matrices.get(site.param)
        if site.kind != "embedding":
            self.channels.multiplied.add(site.param)
        turned = layout.kind == "matrix_t"
        if known is None:
            rows, columns = layout.matrix_shape
            taps = math.prod(layout.shape[2:]) if layout.kind in ("conv", "conv_transpose") else 1
            known = Matrix(
                layout=layout,
                rows=self.ledger.fresh(rows),
                columns=self.ledger.fresh(layout.groups, columns // taps),
                taps=taps,
                producer=site.kind == "embedding",
            )
            if site.param in self.fixed:
                made = known.columns if site.kind == "embedding" else known.rows
                self.ledger.freeze(made, "skipped by the recipe")
            self.channels.matrices[site.param] = known
        if (known.layout.kind == "matrix_t") != turned:
            both = torch.cat([known.rows, known.columns.reshape(-1)])
            self.ledger.freeze(both, "its weight is used in two orientations")
            rows_of, columns_of = known.columns[0], known.rows[None]
            return Matrix(layout=layout, rows=rows_of, columns=columns_of, taps=1)
        return known

    def balance(self, blocks: Iterable[Tensor]) -> None:
        """Note that blocks of channels must lose equally many."""
        self.channels.balances.append([block.reshape(-1) for block in blocks])

    def square(self) -> None:
        """Join channels that a view laid out in a grid so that whole slices go: heads, or the lanes of a shuffle."""
        for grid in self.grids:
            grid = self.current(grid)
            while len(grid.varying) > 1:
                grid = self.merge_along(grid, grid.varying[:1])

    def why(self, text: str) -> str:
        path = module_path(self.node)
        return f"{text} ({path})" if path else text

    def packed(self, ids: Tensor) -> Tensor:
        """Return numbers with size 1 along each dimension in which their sets do not differ."""
        for axis in range(ids.ndim):
            if ids.shape[axis] > 1 and ids.stride(axis) == 0:
                ids = ids.narrow(axis, 0, 1)
        ids = self.ledger.roots(ids)
        for axis in range(ids.ndim):
            if ids.shape[axis] > 1 and bool((ids == ids.narrow(axis, 0, 1)).all()):
                ids = ids.narrow(axis, 0, 1)
        return ids

    def current(self, value: Value) -> Value:
        """Return a value with its numbers packed as they stand now."""
        return Value(ids=self.packed(value.ids), shape=value.shape, own=value.own)

    def merge_along(self, value: Value, axes: Iterable[int]) -> Value:
        """Join all numbers along some dimensions."""
        ids = value.ids
        for axis in axes:
            self.ledger.join(ids, ids.narrow(axis, 0, 1))
        return self.current(value)

    def settle(self, value: Value, axes: Iterable[int], why: str) -> Value:
        """Make the dimensions `axes` of a fixed width: whole slices along the others may go, else nothing may."""
        value = self.current(value)
        within = [axis % value.ids.ndim for axis in axes]
        caught = [axis for axis in within if axis in value.varying]
        if not caught:
            return value
        if len(caught) == len(value.varying):
            self.ledger.freeze(value.ids, self.why(why))
            return self.current(value)
        return self.merge_along(value, caught)

    def freeze_all(self, values: Any, why: str) -> None:
        for value in flat([values]):
            self.ledger.freeze(value.ids, why)

    def contract(self, value: Value, axis: int, columns: Tensor) -> None:
        """Join the numbers along one dimension with the input channels of the weight that sums over it."""
        value = self.current(value)
        ids = self.merge_along(value, [a for a in value.varying if a != axis % value.ids.ndim]).ids.movedim(axis, -1)
        line = self.ledger.roots(ids.reshape(-1, ids.shape[-1])[0])
        line = torch.where(line == FREE, torch.tensor(FROZEN), line)
        self.ledger.join(line.expand(columns.numel()) if len(line) == 1 else line, columns.reshape(-1))

    def elementwise(self, values: Sequence[Value], shape: Sequence[int]) -> Value:
        """Join operands place by place under broadcasting, and return the numbers of the result."""
        return _combine(self, [self.current(v) for v in values], tuple(shape))


def _combine(follower: Follower, values: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """Join operands under broadcasting.

    An operand that does not reach along any dimension in which numbers differ (a mask, a bias of positions) says
    nothing about them. One that reaches along some of them cuts the others short: those are joined first.
    """
    values = [_padded(value, len(shape)) for value in values]
    for _ in shape:
        varying = {axis for value in values for axis in value.varying}
        partial = next((v for v in values if 0 < len(_spanned(v, varying)) < len(varying)), None)
        if partial is None:
            break
        axes = _to_merge(partial, varying)
        values = [follower.merge_along(value, [a for a in axes if a in value.varying]) for value in values]
    reaching = [value for value in values if not varying or _spanned(value, varying)]
    carrier = _carrier(reaching if varying else values)
    for value in reaching:
        if value is not carrier and varying:
            _couple(follower, carrier, value, varying)
    if not varying:
        _couple_whole(follower, values)
    own = carrier.own and all(value.own or not follower.ledger.is_live(value.ids) for value in values)
    ids = follower.packed(carrier.ids if carrier.ids.ndim == len(shape) else carrier.ids.reshape((1,) * len(shape)))
    return Value(ids=ids, shape=shape, own=own)


def _padded(value: Value, dims: int) -> Value:
    extra = (1,) * (dims - len(value.shape))
    return Value(ids=value.ids.reshape(*extra, *value.ids.shape), shape=(*extra, *value.shape), own=value.own)


def _spanned(value: Value, varying: Iterable[int]) -> set[int]:
    return {axis for axis in varying if value.shape[axis] > 1}


def _to_merge(partial: Value, varying: set[int]) -> set[int]:
    """Return the dimensions to join so that an operand reaches along all that remain, or none."""
    spans = _spanned(partial, varying)
    if set(partial.varying) & spans and not (partial.own and max(varying) in spans):
        return varying - spans
    return spans


def _carrier(values: Sequence[Value]) -> Value:
    """Return the operand whose numbers the result has: one that differs most, activations before parameters."""
    return max(values, key=lambda v: (len(v.varying), not v.own, not bool((v.ids == FREE).all())))


def _couple(follower: Follower, carrier: Value, value: Value, varying: set[int]) -> None:
    ids = value.ids
    if value.own and not carrier.own:
        full = value.full()
        follower.ledger.join(
            full, carrier.ids.expand([max(a, b) for a, b in zip(full.shape, carrier.ids.shape, strict=True)])
        )
        return
    follower.ledger.join(ids, carrier.ids)


def _couple_whole(follower: Follower, values: Sequence[Value]) -> None:
    """Join operands each of one number: what reaches everywhere goes and stays with what it meets."""
    live = [v for v in values if not v.own and math.prod(v.shape) > 1]
    for value in live[1:]:
        follower.ledger.join(live[0].ids.reshape(-1)[:1], value.ids.reshape(-1)[:1])


def flat(values: Any) -> list[Value]:
    """Return the values in nested lists."""
    if isinstance(values, Value):
        return [values]
    return list(itertools.chain.from_iterable(flat(v) for v in values)) if isinstance(values, (list, tuple)) else []


def constant(tensor: Any) -> Any:
    """Return the numbers of a constant: FREE if it looks the same everywhere, else FROZEN."""
    if not isinstance(tensor, Tensor):
        return None
    alike = tensor.numel() > 0 and bool((tensor == tensor.reshape(-1)[0]).all())
    return filled(tensor, FREE if alike else FROZEN)


def filled(like: Any, number: int) -> Any:
    """Return values of one number, in the structure of an operator's result."""
    if isinstance(like, Tensor):
        return Value(ids=torch.full((1,) * like.ndim, number), shape=tuple(like.shape))
    return [filled(item, number) for item in like] if isinstance(like, (list, tuple)) else None


def frozen_like(like: Any) -> Any:
    return filled(like, FROZEN)


def _tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_tensors(item) for item in value)
    return isinstance(value, Tensor)
