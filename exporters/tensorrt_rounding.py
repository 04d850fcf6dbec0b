"""Which layers have to stay float32, measured: what rounding the values of a network to 16 bits does to its outputs.

The float32 graph runs in ONNX Runtime, and every value that would have 16 bits is rounded to them and back, constants
too; sums inside an operator stay float32, as TensorRT's are. Where an output is further off than `verify` allows, each
layer is rounded alone, and those that are worst alone stay float32, as few as bring the outputs within the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper

from ..optimizer.artifact import hide_nothing
from ..optimizer.errors import ExportError
from ..optimizer.model import Model
from .difference import difference
from .runner import arrays
from .tensorrt_choice import Decision
from .tensorrt_graph import DTYPES, GraphOptions, lower
from .tensorrt_integer import symmetric
from .tensorrt_precision import Precision, wide
from .verify import TOLERANCE, Spec, tolerance

ROWS = 3
"""Samples that the outputs are compared on."""
NUMBERS = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What rounding does: the largest difference of an output, over its largest value.

    error: with the layers of `keep` in float32. before: without any kept. keep: layer, by the module of its
    operators -> the error that it causes alone.
    """

    error: float
    before: float
    keep: Mapping[str, float]


def settle(model: Model, options: GraphOptions) -> tuple[GraphOptions, tuple[Decision, ...]]:
    """Return the options with the layers in float32 that measuring asks for, and a decision for each.

    A graph that ONNX Runtime does not run is not measured, which is a decision too.
    """
    if options.precision == "fp32":
        return options, ()
    try:
        found = measure(model, options)
    except ExportError as error:
        return options, (Decision(layer="*", form=options.precision, kept=True, reason=error.what),)
    return replace(options, measured=frozenset(found.keep)), tuple(_decisions(found, options.precision))


def measure(model: Model, options: GraphOptions) -> Measured:
    """Return which layers must stay float32 besides what does for its range; none where the outputs are near enough.

    The limit is what an engine is verified with. Raises ExportError where the float32 graph does not run here.
    """
    proto = lower(model, replace(options, precision="fp32", plugin=False, opset=options.version)).proto
    stays = wide(ir.from_proto(proto).graph, options.precision)
    trial = _Trial(proto=proto, feeds=_feeds(model), precision=options.precision, stays=stays)
    limit = max(tolerance(model, Spec()), TOLERANCE[DTYPES[options.precision]])
    scopes = trial.scopes(options.keep)
    before = trial.error(scopes)
    if before <= limit:
        return Measured(error=before, before=before, keep={})
    alone = {scope: trial.error([scope]) for scope in scopes}
    worst = sorted(alone, key=lambda scope: -alone[scope])
    count, error = _fewest(lambda kept: trial.error(worst[kept:]), len(worst), limit)
    return Measured(error=error, before=before, keep={scope: alone[scope] for scope in worst[:count]})


def rounded(proto: onnx.ModelProto, precision: Precision, rounds: Callable[[onnx.NodeProto], bool]) -> onnx.ModelProto:
    """Return a graph of float32 whose nodes, where `rounds` says so, read constants and give values of 16 bits."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
    constants = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}
    wanted, narrow = NUMBERS[precision], dict[str, str]()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if not rounds(node):
            nodes.append(node)
            continue
        for index, name in enumerate(node.input):
            if name in constants:
                if name not in narrow:
                    narrow[name] = f"{name}.narrow"
                    nodes += _there_and_back(name, narrow[name], wanted)
                node.input[index] = narrow[name]
        wide = [(index, name) for index, name in enumerate(node.output) if types.get(name) == FLOAT]
        for index, name in wide:
            node.output[index] = f"{name}.wide"
        nodes.append(node)
        for _, name in wide:
            nodes += _there_and_back(f"{name}.wide", name, wanted)
    del graph.node[:]
    graph.node.extend(nodes)
    return made


def _there_and_back(name: str, result: str, wanted: int) -> Iterator[onnx.NodeProto]:
    yield helper.make_node("Cast", [name], [f"{result}.16"], to=wanted, name=f"{result}.there")
    yield helper.make_node("Cast", [f"{result}.16"], [result], to=FLOAT, name=f"{result}.back")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trial:
    """The outputs of a network with some of its layers rounded, beside those of none."""

    proto: onnx.ModelProto
    feeds: Mapping[str, np.ndarray]
    precision: Precision
    stays: frozenset[str]

    def scopes(self, keep: Collection[str]) -> list[str]:
        """Return the modules whose operators would have 16 bits, in the order of the graph."""
        found = dict.fromkeys(_scope(node) for node in self.proto.graph.node if node.name not in self.stays)
        return [scope for scope in found if not any(scope == name or scope.startswith(f"{name}.") for name in keep)]

    def error(self, scopes: Collection[str]) -> float:
        """Return the largest difference that rounding these modules makes in an output, relative to its largest."""
        chosen = set(scopes)
        file = rounded(
            self.proto,
            self.precision,
            lambda node: _scope(node) in chosen and node.name not in self.stays,
        )
        pairs = zip(plain_outputs(self.proto, self.feeds), plain_outputs(file, self.feeds), strict=True)
        return max((difference(want, have)[1] for want, have in pairs if want.dtype == np.float32), default=0.0)


def plain_outputs(file: onnx.ModelProto | Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return what a graph computes in ONNX Runtime as it stands; ExportError where it does not run.

    Nothing is fused: onnxruntime 1.31 drops a Relu before a QuantizeLinear of e4m3 as if zero were its least code.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = str(file) if isinstance(file, Path) else file.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
        found: list[np.ndarray] = session.run(None, dict(feeds))
    except Exception as error:
        why = str(error).splitlines()[0]
        raise ExportError(f"rounding was not measured, onnxruntime does not run the float32 graph: {why}") from error
    return found


def _feeds(model: Model) -> dict[str, np.ndarray]:
    exact = symmetric(replace(model, dynamic=frozenset()))
    inputs = hide_nothing(exact.inputs, exact.examples(ROWS))
    return arrays(exact.inputs, inputs)


def _fewest(error: Callable[[int], float], most: int, limit: float) -> tuple[int, float]:
    """Return the least number that brings the error within the limit, as if more were never worse."""
    high = 1
    while high < most and error(high) > limit:
        high *= 2
    low, high = high // 2, min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= limit else (middle, high)
    return high, error(high)


def _scope(node: onnx.NodeProto) -> str:
    return str(node.name).rpartition("/")[0]


def _decisions(found: Measured, precision: Precision) -> Iterator[Decision]:
    for scope, alone in found.keep.items():
        moved = f"{precision} moves the outputs by {found.before:.1e} of their range, by {alone:.1e} here alone"
        yield Decision(layer=scope or "*", form="float32", kept=False, reason=f"{moved}; {found.error:.1e} are left")
