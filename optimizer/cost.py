"""What a network costs to run, and what a run of paredown will cost, from the captured graph."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .graph import Graph, Site
from .walk import Batch
from .weight import LowRank, Sum, Weight


def macs(graph: Graph, weights: Mapping[str, Weight] | None = None) -> int:
    """Return the multiply-accumulates of all weights for one sample (one row of the first input).

    weights: those of the model, whose low ranks count as the two operators that they are; all dense without it.
    Products of activations with each other (attention scores) are not counted.
    """
    nodes, known = {node.name: node for node in graph.nodes}, weights or {}
    uses = [(site, nodes[site.node]) for sites in graph.sites.values() for site in sites]
    return sum(_weight_macs(site, node, known.get(site.param)) for site, node in uses) // _samples(graph)


def layer_macs(graph: Graph, sites: Sequence[Site], rank: int | None = None) -> int:
    """Return the multiply-accumulates of a layer's uses in the captured batch, dense or as a low rank."""
    nodes = {node.name: node for node in graph.nodes}
    uses = [(site, nodes[site.node]) for site in sites]
    return sum(_site_macs(*use) if rank is None else _rank_macs(*use, rank) for use in uses)


def divides(site: Site) -> bool:
    """Return whether this use of a low rank runs as two operators: a whole linear layer or ungrouped convolution."""
    if site.kind in ("conv", "conv_transpose"):
        return site.layout.groups == 1
    return site.kind == "linear" and site.count == site.layout.matrix_shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted seconds and peak bytes of calibrating and quantizing."""

    seconds: float
    peak_bytes: int


def estimate(graph: Graph, batch: Batch, samples: int, base_bytes: int) -> Estimate:
    """Predict a sequential calibration of `samples` samples from one captured batch and two short probes."""
    nodes = {node.name: node for node in graph.nodes}
    scale = samples / max(1, len(batch[0]))
    forward = macs(graph) * samples
    gram = sum(_gram_macs(site, nodes[site.node]) for sites in graph.sites.values() for site in sites) * scale
    solve = sum(_solve_macs(site) for sites in graph.sites.values() for site in sites)
    single, double = _rate(torch.float32), _rate(torch.float64)
    live = int(_peak_live(graph) * scale)
    return Estimate(seconds=3 * forward / single + 2 * (gram + solve) / double, peak_bytes=base_bytes + 2 * live)


def _weight_macs(site: Site, node: fx.Node, weight: Weight | None) -> int:
    """Count a sum term by term where a linear layer adds products; elsewhere it is decoded to one matrix."""
    match weight:
        case LowRank() if divides(site):
            return _rank_macs(site, node, weight.left.shape[1])
        case Sum() if divides(site) and site.kind == "linear":
            return sum(_weight_macs(site, node, term) for term in weight.terms)
        case _:
            return _site_macs(site, node)


def _rank_macs(site: Site, node: fx.Node, rank: int) -> int:
    """Count the right factor in place of the operator, then the left one at each of its output positions."""
    rows, columns = site.layout.matrix_shape
    positions = _site_macs(site, node) // max(1, rows * columns)
    after = positions
    if site.kind == "conv_transpose":
        after = math.prod(_shape(node)[:1]) * math.prod(_shape(node)[2:])
    return positions * rank * columns + after * rank * rows


def _site_macs(site: Site, node: fx.Node) -> int:
    weights = math.prod(site.layout.shape)
    if site.kind == "embedding":
        return 0
    if site.kind == "conv":
        return math.prod(_shape(node)[0:1]) * math.prod(_shape(node)[2:]) * weights
    if site.kind == "conv_transpose":
        shape = _shape(node.all_input_nodes[0])
        return shape[0] * math.prod(shape[2:]) * weights
    columns = site.layout.shape[-1] if site.layout.kind == "matrix" else site.layout.shape[0]
    source = _shape(node.all_input_nodes[1 if site.operand == 1 else 0])
    if site.kind == "recurrent" and len(source) == 3:
        return source[0] * source[1] * weights
    return math.prod(source) // max(1, columns if source[-1] == columns else source[-1]) * columns * site.count


def _gram_macs(site: Site, node: fx.Node) -> int:
    rows, columns = site.layout.matrix_shape
    return _site_macs(site, node) // max(1, rows) * columns * site.layout.groups


def _solve_macs(site: Site) -> int:
    """Error feedback and table fitting: a Cholesky factor, then some passes over rows x columns^2."""
    rows, columns = site.layout.matrix_shape
    return columns**3 * site.layout.groups + 20 * rows * columns**2


def _peak_live(graph: Graph) -> int:
    """Return the most bytes of activations alive at once for the captured batch."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        for used in node.all_input_nodes:
            last[used.name] = index
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(graph.nodes):
        if node.name not in graph.values and node.op in ("placeholder", "call_function"):
            alive[node.name] = _bytes(node.meta.get("val"))
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, index) > index}
    return peak


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (tuple, list)) else 0


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    if isinstance(value, Sequence) and value:
        value = value[0]
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else (1,)


def _rate(dtype: torch.dtype) -> float:
    """Return the multiply-accumulates per second of a 256 x 256 product on this machine."""
    a = torch.ones(256, 256, dtype=dtype)
    a @ a
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    return 10 * 256**3 / max(time.perf_counter() - start, 1e-6)


def _samples(graph: Graph) -> int:
    """Return how many samples the graph was captured with."""
    first = next(node for node in graph.nodes if node.name == graph.inputs[0])
    return max(1, _shape(first)[0])
