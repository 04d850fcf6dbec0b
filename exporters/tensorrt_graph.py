"""Lower a model to the ONNX graph that TensorRT gets: one strongly typed network of operators that it has.

Precision stands in the graph, weights in forms that an engine keeps packed, and there are no functions and no
unsigned codes. TensorRT computes layers whose inputs are rounded at run time with exact inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, assert_never

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from ..kernels.onnx_ops import DOMAIN, VERSION
from ..optimizer import activations
from ..optimizer.errors import ExportError, RecipeError, nearest
from ..optimizer.model import Model
from ..optimizer.steps import short
from ..optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight
from . import tensorrt_fp8, tensorrt_plugin
from .onnx_file import clean
from .onnx_forms import Forms
from .onnx_qdq import place
from .onnx_trace import name_outputs, quiet_loggers, trace
from .onnx_weights import replace_weights
from .tensorrt_choice import Decision, Rule, choose
from .tensorrt_forms import Constants
from .tensorrt_integer import adapt, symmetric
from .tensorrt_precision import Kept, Precision, note_outputs, set_precision

if TYPE_CHECKING:
    from torch import Tensor

OPSETS = range(18, 23)
"""From 23 on torch writes Attention, which TensorRT takes in float16 alone; 21 is the first with INT4."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphOptions:
    """How a model is lowered.

    precision: type of the floats; inputs and outputs of the network keep theirs.
    opset: version of the standard operators; bfloat16 takes 22 for 21, the first whose convolutions have it.
    keep: layers (parameters or modules) whose floats stay float32. measured: modules whose operators do, since
    `tensorrt_rounding` found them too far off; "" are those of no module.
    forms: "smallest" keeps packed weights where the engine is smaller by them, "stored" wherever TensorRT has them,
    "floats" nowhere.
    fp8: layers between int8 grids compute in floats of 8 bits instead (`tensorrt_fp8`).
    plugin: layers multiply by codes in operators of the domain paredown, which a plugin has to have.
    example: inputs to trace with, two or more in each named dimension; seeded ones without it.
    """

    precision: Precision = "fp16"
    opset: int = 21
    fp8: bool = False
    plugin: bool = False
    keep: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()
    forms: Literal["smallest", "stored", "floats"] = "smallest"
    example: tuple[Tensor, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise RecipeError(
                f"opset={self.opset} is out of range", fix=f"use {OPSETS[0]} to {OPSETS[-1]}; 21 has INT4"
            )
        if self.precision not in DTYPES:
            raise RecipeError(f'unknown precision "{self.precision}"', fix=nearest(self.precision, DTYPES))
        if self.fp8 and self.opset < tensorrt_fp8.OPSET:
            what = f"opset {self.opset} has no floats of 8 bits"
            raise RecipeError(what, where="--fp8", fix=f"use {tensorrt_fp8.OPSET} or more")
        if self.plugin and self.precision == "fp32":
            what = "the plugin multiplies float16 and bfloat16, not float32"
            raise RecipeError(what, where="--plugin", fix="use --precision fp16 or bf16, or leave it out")

    @property
    def version(self) -> int:
        return 22 if self.precision == "bf16" else self.opset


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lowered:
    """A graph for TensorRT, and how it holds each compressed layer and each one that stays float32."""

    proto: onnx.ModelProto
    decisions: tuple[Decision, ...]


def lower(model: Model, options: GraphOptions | None = None) -> Lowered:
    """Return the graph of a model; ExportError where the network or a named dimension cannot be expressed."""
    options = options or GraphOptions()
    _check_keep(model, options.keep)
    exact = symmetric(replace(model, dynamic=frozenset()))
    graph = trace(exact.module(), exact.inputs, options.example or exact.examples(2), options.version)
    place(graph.graph, exact)
    adapt(graph.graph)
    if options.fp8 and not tensorrt_fp8.convert(graph.graph):
        what = "no layer computes in int8, which floats of 8 bits would stand for"
        raise RecipeError(what, where="--fp8", fix="quantize with bits: 8 and activations: int8")
    choice = choose(graph.graph, exact, _rule(model, options))
    replace_weights(graph.graph, _typed(choice.model, options), _forms(options))
    clean(graph)
    name_outputs(graph.graph)
    kept = _cast(graph, options)
    _name_nodes(graph.graph)
    proto = ir.to_proto(graph)
    _check(proto)
    decisions = _with_notes(choice.decisions, model, fp8=options.fp8)
    if options.plugin:
        taken = tensorrt_plugin.taken(graph.graph, _dtypes(model, options))
        decisions = [*taken.notes(decisions, choice.model.weights)]
    return Lowered(proto=proto, decisions=(*decisions, *_stays(kept)))


def _forms(options: GraphOptions) -> Forms:
    return tensorrt_plugin.Plugin() if options.plugin else Constants()


def _rule(model: Model, options: GraphOptions) -> Rule:
    return Rule(
        smallest=options.forms != "stored",
        floats=options.forms == "floats",
        itemsize=4 if options.precision == "fp32" else 2,
        float32=frozenset(name for name in model.weights if _is_wide(name, options)),
        int4=options.version >= 21,
        plugin=tensorrt_plugin.refusal if options.plugin else None,
        dtype=DTYPES[options.precision],
    )


def _check_keep(model: Model, keep: frozenset[str]) -> None:
    """Raise RecipeError where a layer to keep is none of the model's."""
    modules = [name for name, _ in model.skeleton.named_modules()]
    known = {*modules, *model.weights, *model.tensors} - {""}
    for name in sorted(keep - known):
        raise RecipeError(f'there is no layer "{name}" to keep in float32', fix=nearest(name, known))


def _is_wide(weight: str, options: GraphOptions) -> bool:
    """Whether a weight is multiplied in float32."""
    return _is_kept(weight, options.keep) or weight.rpartition(".")[0] in options.measured


def _is_kept(name: str, keep: Iterable[str]) -> bool:
    """Whether a parameter or the module of a node belongs to a layer that stays float32."""
    return any(name == layer or name.startswith(f"{layer}.") or name == short(layer) for layer in keep)


def _stays_wide(node: ir.Node, options: GraphOptions) -> bool:
    scope = str(node.name).rpartition("/")[0]
    return scope in options.measured or _is_kept(scope, options.keep)


def _cast(graph: ir.Model, options: GraphOptions) -> tuple[Kept, ...]:
    with quiet_loggers():
        passes.ShapeInferencePass()(graph)
        note_outputs(graph.graph)
        kept = set_precision(graph, options.precision, lambda node: _stays_wide(node, options))
        passes.RemoveUnusedNodesPass()(graph)
        passes.ClearMetadataAndDocStringPass()(graph)
        passes.TopologicalSortPass()(graph)
        passes.NameFixPass()(graph)
    for value in graph.graph.outputs:
        value.metadata_props.clear()
    return kept


def _typed(model: Model, options: GraphOptions) -> Model:
    """Return the model with the weights of plugins in the precision asked for: their operators are named by it."""
    if not options.plugin:
        return model
    dtypes = _dtypes(model, options)
    changed = {
        name: _with_dtype(weight, dtypes[name])
        for name, weight in model.weights.items()
        if not isinstance(weight, Dense)
    }
    return model.with_weights(changed)


def _dtypes(model: Model, options: GraphOptions) -> dict[str, torch.dtype]:
    """Return the type of the floats that each weight multiplies."""
    dtype = DTYPES[options.precision]
    return {name: torch.float32 if _is_wide(name, options) else dtype for name in model.weights}


def _with_dtype(weight: Weight, dtype: torch.dtype) -> Weight:
    match weight:
        case Dense():
            return Dense(values=weight.values.to(dtype))
        case Uniform() | Codebook():
            return replace(weight, dtype=dtype)
        case LowRank():
            return LowRank(left=_with_dtype(weight.left, dtype), right=_with_dtype(weight.right, dtype))
        case Sum():
            return Sum(terms=tuple(_with_dtype(term, dtype) for term in weight.terms))
        case _:
            assert_never(weight)


def _name_nodes(graph: ir.Graph) -> None:
    """Give every node a name of its own: TensorRT takes no two layers of one name."""
    seen: set[str] = set()
    for node in graph.all_nodes():
        name = str(node.name or f"/{node.outputs[0].name}")
        while name in seen:
            name += "_"
        node.name = name
        seen.add(name)


def _with_notes(decisions: Iterable[Decision], model: Model, *, fp8: bool) -> list[Decision]:
    """Say of layers whose inputs are rounded at run time, and of int8 grids, what TensorRT computes instead."""
    notes = []
    for decision in decisions:
        note = "" if decision.layer not in model.dynamic else "inputs are not rounded: TensorRT computes it exactly"
        if decision.form == "int8" and model.acts and _has_uneven_grids(model):
            note = "grids are made symmetric: TensorRT has no zero points"
        if decision.form == "int8" and fp8 and model.acts and decision.layer in activations.layers(model):
            decision = replace(decision, form="fp8", reason="computes in e4m3 between grids of the same reach")
        notes.append(replace(decision, reason=f"{decision.reason}; {note}") if note else decision)
    return notes


def _has_uneven_grids(model: Model) -> bool:
    return any(not grid.signed or grid.zero for grid in model.acts.values())


def _stays(kept: Iterable[Kept]) -> list[Decision]:
    """Return one decision per node that stays float32 although another precision was asked for."""
    return [Decision(layer=one.node, form="float32", kept=False, reason=one.reason) for one in kept]


def _check(proto: onnx.ModelProto) -> None:
    """Let onnx check the graph and infer every type and shape; ExportError where it does not hold together."""
    if any(node.domain == DOMAIN for node in proto.graph.node):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
        return
    if proto.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        return
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx rejects the graph for TensorRT: {error}") from error
