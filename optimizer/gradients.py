"""Gradients of a loss without labels, by interpreting the captured graph: of gates on channels, and of outputs.

Losses are drawn from the network's own outputs, so that mean squares of gradients are its Fisher information (Martens
2014, arXiv 1412.1193). Each sample runs alone: its gradient is its own, wherever the network keeps its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .data import Batch, Calibration, rebatch
from .entry import user_code
from .errors import InputError
from .graph import Graph, Site, from_program, quiet_export
from .model import Model
from .walk import trace
from .weight import Layout

Loss: TypeAlias = Callable[[Any, Batch], Tensor]
"""loss(what the network returned, the batch) -> a number or one per sample, to be summed."""

DISTRIBUTION = 1e-3
"""Outputs that are nowhere negative and sum to 1 within this along their classes are probabilities already."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gradients:
    """What one backward pass per sample says of each weight.

    gates: parameter -> (samples, input channels), dL/dg of a gate g = 1 on each input channel of its operators, that is
    the sum over positions of x * dL/dx, added up over the weight's sites. For W_ih and W_hh of recurrent operators the
    sum over rows of w * dL/dw: the same number, of a gate on what this matrix alone reads.
    outputs: parameter -> (out), mean over samples and positions of (dL/dy)^2 for each row; none for recurrent ones.
    A network with a fixed batch size gives one row for each batch.
    """

    gates: Mapping[str, Float64[Tensor, "samples channels"]]
    outputs: Mapping[str, Float64[Tensor, "out"]]


def gradients(
    model: Model, calibration: Calibration, params: Collection[str], seed: int, loss: Loss | None = None
) -> Gradients:
    """Run the network forwards and backwards on each sample; memory is that of one.

    Without a `loss` it is the sum over floating outputs of `sampled_loss`. Raises InputError for a loss that is not
    finite, and for a parameter that is used in two orientations.
    """
    if not params:
        return Gradients(gates={}, outputs={})
    calibration = rebatch(calibration, 1)
    module, values = model.module(), model.values()
    traced = trace(module, calibration.batches)
    known: dict[int, _Tape] = {}
    generator = torch.Generator().manual_seed(seed)
    total = _Total()
    for graph, batch in zip(traced.graphs, traced.batches, strict=True):
        tape = known.setdefault(id(graph), _tape(graph, module, frozenset(params)))
        run = tape.run(values, batch)
        with torch.enable_grad():
            value = _user_loss(loss, run, batch) if loss else _own_loss(run, batch, generator)
        total.add(tape, run, value)
    return total.result()


def sampled_loss(output: Tensor, generator: torch.Generator, inputs: Sequence[Tensor] = ()) -> Tensor:
    """Return a loss whose gradients have the Fisher information of the output's distribution as their mean square.

    Scores have their classes along dimension 1 (batch, classes) and (batch, classes, space ...), and along the last of
    (batch, time, classes); what is a distribution already is taken as it is. An output of one class, of one dimension,
    or of an input's shape (a filtered signal or image) is the mean of a Gaussian of variance 1.

    The gradient of cross-entropy against a target drawn from p has covariance diag(p) - p p^T. So has that of
    (sqrt(p) e) . log p with random signs e, p held, which is used here: a target drawn from a confident network is its
    first choice again and again. Measured on ResNet-20, 128 samples: two seeds drew the same targets, with a tenth of
    the information; Taylor's rank correlation with the divergence that removing each channel causes was 0.76 with drawn
    targets and 0.83 with signs, Fisher's 0.71 and 0.76 (512 samples: 0.84 and 0.87, 0.78 and 0.83).
    """
    axis = -1 if output.ndim == 3 else 1
    signal = any(output.shape == x.shape and x.is_floating_point() for x in inputs)
    if output.ndim < 2 or output.shape[axis] == 1 or signal:
        return (_signs(output, generator) * output).sum()
    scores = output.movedim(axis, -1)
    likely = scores.detach()
    proper = bool((likely >= 0).all()) and bool(((likely.sum(-1) - 1).abs() < DISTRIBUTION).all())
    logs = scores.clamp(min=torch.finfo(scores.dtype).tiny).log() if proper else scores.log_softmax(-1)
    signs = _signs(scores, generator) * logs.detach().exp().sqrt()
    return (signs * logs.clamp(min=torch.finfo(logs.dtype).min)).sum()


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return 1.0 - 2.0 * torch.randint(0, 2, like.shape, generator=generator).to(like.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """One forward pass: the outputs as the network returns them, and what to differentiate by.

    gates, results: (site, tensor) for each operator; matrices: recurrent parameter -> its leaf.
    """

    outputs: Any
    gates: Sequence[tuple[Site, Tensor]]
    results: Sequence[tuple[Site, Tensor]]
    matrices: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tape:
    """A graph without operators in place, and the sites to gate."""

    graph: Graph
    sites: Mapping[str, Site]
    recurrent: Mapping[str, Layout]

    def run(self, values: Mapping[str, Tensor], batch: Batch) -> _Run:
        """Run one batch with a gate on each site's input, and a leaf for each recurrent matrix."""
        matrices = {name: values[name].detach().clone().requires_grad_() for name in self.recurrent}
        env = self._given({**values, **matrices}, batch)
        gates: list[tuple[Site, Tensor]] = []
        results: list[tuple[Site, Tensor]] = []
        with torch.enable_grad():
            for node in (node for node in self.graph.nodes if node.op == "call_function"):
                given: Any = fx.map_arg((node.args, node.kwargs), lambda used: env[used.name])
                args, kwargs = given
                site = self.sites.get(node.name)
                if site is not None:
                    gate = _gate(site, args[site.operand])
                    gates.append((site, gate))
                    args = _replaced(args, site.operand, gate)
                env[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
                if site is not None:
                    results.append((site, env[node.name]))
        flat = [None if node is None else env[node.name] for node in self.graph.outputs]
        return _Run(outputs=self._structured(flat), gates=gates, results=results, matrices=matrices)

    def _given(self, values: Mapping[str, Tensor], batch: Batch) -> dict[str, Any]:
        """Return what the graph starts from: inputs, parameters, buffers and constants by node name."""
        inputs = dict(zip(self.graph.inputs, batch, strict=True))
        held = {name: values[param] for name, param in self.graph.values.items()}
        return {**self.graph.constants, **held, **inputs}

    def _structured(self, flat: list[Any]) -> Any:
        spec = self.graph.program.call_spec.out_spec
        return pytree.tree_unflatten(flat, spec) if spec is not None else tuple(flat)


@dataclass(slots=True, kw_only=True)
class _Total:
    """What has been summed so far, sample by sample."""

    rows: list[dict[str, Tensor]] = field(default_factory=list)
    squares: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, tape: _Tape, run: _Run, loss: Tensor) -> None:
        """Differentiate one sample's loss by all gates, outputs and matrices at once."""
        _check(loss)
        leaves = [*(gate for _, gate in run.gates), *(y for _, y in run.results), *run.matrices.values()]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
        middle, end = len(run.gates), len(run.gates) + len(run.results)
        row: dict[str, Tensor] = {}
        for (site, _), slope in zip(run.gates, slopes[:middle], strict=True):
            row[site.param] = row.get(site.param, 0.0) + slope.flatten().double()
        for (site, _), slope in zip(run.results, slopes[middle:end], strict=True):
            self._square(site, slope)
        for (name, matrix), slope in zip(run.matrices.items(), slopes[end:], strict=True):
            row[name] = tape.recurrent[name].to_matrix(matrix.detach().double() * slope.double()).sum(0)
        self.rows.append(row)

    def result(self) -> Gradients:
        gates = {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}
        outputs = {name: total / self.counts[name].clamp(min=1) for name, total in self.squares.items()}
        return Gradients(gates=gates, outputs=outputs)

    def _square(self, site: Site, slope: Tensor) -> None:
        wide = slope.movedim(_channel_axis(site, slope), -1).double().reshape(-1, site.count)
        out, _ = site.layout.matrix_shape
        for sums, value in ((self.squares, wide.square().sum(0)), (self.counts, torch.tensor(float(len(wide))))):
            sums.setdefault(site.param, torch.zeros(out, dtype=torch.float64))
            sums[site.param][site.first : site.first + site.count] += value


def _tape(graph: Graph, module: nn.Module, params: frozenset[str]) -> _Tape:
    if any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in graph.nodes):
        with quiet_export():
            graph = from_program(graph.program.run_decompositions({}), module)
    sites: dict[str, Site] = {}
    recurrent: dict[str, Layout] = {}
    seen: dict[str, Layout] = {}
    for node, found in graph.sites.items():
        for site in found:
            if site.param not in params or site.kind == "embedding":
                continue
            if seen.setdefault(site.param, site.layout) != site.layout:
                raise InputError(
                    "is used in two orientations and has no one set of inputs", where=f'"{site.param}"', fix="skip it"
                )
            if site.kind == "recurrent":
                recurrent[site.param] = site.layout
            else:
                sites[node] = site
    return _Tape(graph=graph, sites=sites, recurrent=recurrent)


def _gate(site: Site, x: Tensor) -> Tensor:
    """Return ones to multiply an operator's input with, one for each channel."""
    shape = [1] * x.ndim
    shape[_channel_axis(site, x)] = x.shape[_channel_axis(site, x)]
    return torch.ones(shape, dtype=x.dtype, requires_grad=True)


def _replaced(args: Sequence[Any], place: int, gate: Tensor) -> tuple[Any, ...]:
    return (*args[:place], args[place] * gate, *args[place + 1 :])


def _channel_axis(site: Site, value: Tensor) -> int:
    """Return the dimension of an operator's input or output that its channels lie along."""
    return value.ndim - (len(site.layout.shape) - 1 if site.kind in ("conv", "conv_transpose") else 1)


def _own_loss(run: _Run, batch: Batch, generator: torch.Generator) -> Tensor:
    outputs = [y for y in pytree.tree_leaves(run.outputs) if isinstance(y, Tensor) and y.is_floating_point()]
    if not outputs:
        raise InputError("the network has no floating output to take gradients of", fix="give a loss")
    return torch.stack([sampled_loss(y, generator, batch).double() for y in outputs]).sum()


def _user_loss(loss: Loss, run: _Run, batch: Batch) -> Tensor:
    with user_code("the loss entry"):
        value = loss(run.outputs, batch)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise InputError(f"it returned {type(value).__name__}", where="the loss entry", fix="return a floating tensor")
    return value.sum()


def _check(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise InputError(
            f"the loss is {float(loss.detach())}", where="calibration", fix="look for overflow in the network"
        )
    if not loss.requires_grad:
        raise InputError("the loss does not depend on the layers to prune", fix="compute it from the outputs")
