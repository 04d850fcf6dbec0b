"""Choose the values of a network that get an int8 grid, so that a runtime computes in integers from layer to layer.

Every input of an int8 layer has a grid, and so has every output of an int8 convolution (after a rectifier that follows
it, which saturation does for free). Between layers, what runtimes compute on codes stays on grids where an int8 layer
reads it in the end: sums, products, concatenations and pools get grids of their own; what only moves values keeps the
grid that they came with. All else is computed in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .activations_names import operator_name
from .graph import Graph, Site, argument
from .weight import Uniform, Weight

RECTIFIERS = {"relu", "relu6", "hardtanh", "clamp"}
POINTWISE = {"add", "mul", "cat", "concat", "leaky_relu", "sigmoid"}
POOLS = {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
MOVES = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "slice", "split",
    "split_with_sizes", "chunk", "getitem", "contiguous", "clone", "alias", "detach", "dropout", "max_pool1d",
    "max_pool2d", "upsample_nearest2d",
}  # fmt: skip
"""What ONNX Runtime 1.31 does on codes without looking at them (largest codes are largest values)."""
MIDDLE = 128
"""The code of zero in an 8-bit weight whose codes are signed bytes with this added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Which values get a grid, by the names of their nodes.

    own: a grid of their own. shared: value -> the value whose grid it has. nodes: the operators of the int8 layers,
    layers: their weights.
    """

    own: tuple[str, ...]
    shared: Mapping[str, str]
    nodes: frozenset[str]
    layers: tuple[str, ...]


def choose(graph: Graph, weights: Mapping[str, Weight]) -> Places:
    """Choose the values that get a grid; no operator of `graph` may write into a value that another one reads."""
    chooser = _Chooser(graph=graph, layers=int8_sites(graph, weights))
    chooser.run()
    return Places(
        own=tuple(chooser.own),
        shared=dict(chooser.shared),
        nodes=frozenset(chooser.layers),
        layers=tuple(dict.fromkeys(site.param for site in chooser.layers.values())),
    )


def has_codes(weight: Weight) -> bool:
    """Return whether a weight is signed bytes with one scale per row, which integer kernels take."""
    return isinstance(weight, Uniform) and (weight.code_bits, weight.group, weight.zero) == (8, 0, MIDDLE)


def int8_sites(graph: Graph, weights: Mapping[str, Weight]) -> dict[str, Site]:
    """Return the sites that integer kernels can compute, by node: float32 in and out, whole weights that have codes."""
    nodes = {node.name: node for node in graph.nodes}
    found = {name: site for name, sites in graph.sites.items() if (site := _int8_site(sites, weights))}
    return {
        name: site
        for name, site in found.items()
        if _is_float32(nodes[name]) and _is_float32(operand(nodes[name], site))
    }


def channel_axis(node: fx.Node, site: Site) -> int:
    """Return the axis of a layer's output along which the rows of its weight lie."""
    rank = int(node.meta["val"].ndim)
    return rank - 1 if site.kind == "linear" else rank - len(site.layout.shape) + 1


def operand(node: fx.Node, site: Site) -> Any:
    """Return what the weight of a site multiplies."""
    return node.args[site.operand]


def rectifier_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """Return (low, high) of an operator that clips to constants around zero, else None."""
    name = operator_name(node) if node.op == "call_function" else ""
    if name not in RECTIFIERS:
        return None
    fixed: dict[str, tuple[float | None, float | None]] = {"relu": (0.0, None), "relu6": (0.0, 6.0)}
    if name in fixed:
        return fixed[name]
    keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    low, high = (_bound(node, key) for key in keys)
    if isinstance(low, Tensor | fx.Node) or isinstance(high, Tensor | fx.Node):
        return None
    inside = (low is None or low <= 0) and (high is None or high > 0)
    return (low, high) if inside else None


def rectified(node: fx.Node) -> fx.Node:
    """Return the rectifier that is all that reads a value, else the node itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and rectifier_bounds(users[0]) is not None else node


def _bound(node: fx.Node, key: str) -> Any:
    """Return an argument as it was given, else its default."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return argument(node, key, next((known.default_value for known in schema.arguments if known.name == key), None))


def _int8_site(sites: tuple[Site, ...], weights: Mapping[str, Weight]) -> Site | None:
    """Return the site of an operator that integer kernels compute; it must use the whole weight."""
    site = sites[0]
    whole = len(sites) == 1 and site.kind in ("conv", "linear") and site.first == 0
    if not whole or site.param not in weights or not has_codes(weights[site.param]):
        return None
    return site if site.count == weights[site.param].shape[0] else None


def _is_float32(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == torch.float32


@dataclass(slots=True, kw_only=True)
class _Chooser:
    graph: Graph
    layers: Mapping[str, Site]
    own: dict[str, None] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    wanted: set[str] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)

    def run(self) -> None:
        nodes = {node.name: node for node in self.graph.nodes}
        self.needed |= {operand(nodes[name], site).name for name, site in self.layers.items()}
        for node in reversed(self.graph.nodes):
            if node.name in self.needed or any(self._passes_on(user) for user in node.users):
                self.wanted.add(node.name)
        for node in self.graph.nodes:
            self._visit(node)

    def _passes_on(self, user: fx.Node) -> bool:
        """Whether an operator computes on codes, for an int8 layer in the end."""
        return user.name in self.wanted and (_moves(user) or _mixes(user) or rectifier_bounds(user) is not None)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name in self.graph.inputs and node.name in self.wanted and _is_float32(node):
                self.own[node.name] = None
        elif node.op == "call_function" and not self._has(node):
            self._call(node)

    def _call(self, node: fx.Node) -> None:
        result = rectified(node)
        site = self.layers.get(node.name)
        if site is not None and (site.kind == "conv" or result.name in self.wanted):
            self.own[result.name] = None
        elif _moves(node) and node.name in self.wanted and self._has(node.args[0]):
            self._share(node)
        elif _mixes(node) and result.name in self.wanted and all(map(self._has, _operands(node))):
            self.own[result.name] = None
        elif node.name in self.needed:
            self.own[node.name] = None

    def _share(self, node: fx.Node) -> None:
        source: str = node.args[0].name  # type: ignore[union-attr,assignment]
        self.shared[node.name] = self.shared.get(source, source)

    def _has(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and (node.name in self.own or node.name in self.shared)


def _operands(node: fx.Node) -> Iterator[Any]:
    """Yield every argument that is not a setting: parts of a list, tensors, and numbers that stand for tensors."""
    first = node.args[0]
    if isinstance(first, list | tuple):
        yield from first
    elif operator_name(node) in ("add", "mul"):
        yield from node.args[:2]
    else:
        yield first


def _moves(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return operator_name(node) in MOVES or _pads_zeros(node)


def _pads_zeros(node: fx.Node) -> bool:
    name = operator_name(node)
    if name == "pad":
        return bool(argument(node, "mode", "constant") == "constant" and not argument(node, "value", None))
    return bool(name == "constant_pad_nd" and not argument(node, "value", 0))


def _mixes(node: fx.Node) -> bool:
    """Whether an operator computes codes from codes."""
    if node.op != "call_function":
        return False
    name = operator_name(node)
    if name == "add":
        return bool(argument(node, "alpha", 1) == 1)
    return name in POINTWISE or name in POOLS or _is_global_mean(node)


def _is_global_mean(node: fx.Node) -> bool:
    """Whether an operator averages over all positions of an image or a signal, and over nothing else."""
    source = node.args[0] if node.args else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if operator_name(node) != "mean" or not isinstance(value, Tensor) or value.ndim not in (3, 4):
        return False
    dims: Iterable[int] = argument(node, "dim", ()) or () if len(node.args) > 1 else ()
    return sorted(dim % value.ndim for dim in dims) == list(range(2, value.ndim))
