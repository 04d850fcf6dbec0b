"""Build and write an ONNX file: trace, pack the weights, fold, name, save, check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants_ir

from ..kernels.onnx_ops import DOMAIN
from ..optimizer.errors import ExportError
from ..optimizer.model import Model
from ..optimizer.weight import Dense
from .onnx_qdq import place
from .onnx_trace import name_outputs, quiet_loggers, trace
from .onnx_weights import add_functions, replace_weights

if TYPE_CHECKING:
    from .onnx import Options

REARRANGE = {"Concat", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that only move weights; folded whatever their size, because the result is no larger."""
MANY_ELEMENTS = 2**62


def write(model: Model, path: Path, options: Options) -> None:
    """Write a model to `path`, with weights above `options.external_bytes` in "<path>.data" beside it."""
    _write(model, model, path, options)


def write_floats(model: Model, path: Path, options: Options) -> None:
    """Write the same trace with every weight as floats: all values have the names that they have in `write`'s file."""
    floats = {name: Dense(values=weight.dense()) for name, weight in model.weights.items()}
    _write(model, replace(model, weights=floats, dynamic=frozenset()), path, options)


def _write(model: Model, stored: Model, path: Path, options: Options) -> None:
    """Trace `model`, and let its weights stand in the file as `stored` has them."""
    example = options.example or model.examples(2)
    graph = trace(model.module(), model.inputs, example, options.opset)
    place(graph.graph, model)
    replace_weights(graph.graph, stored)
    clean(graph)
    name_outputs(graph.graph)
    add_functions(graph)
    _save(graph, path, options.external_bytes)
    _check(path)


def clean(model: ir.Model) -> None:
    """Fold constants, drop what nothing reads and what names this machine; packed weights stay packed."""
    with quiet_loggers():
        passes.RemoveUnusedNodesPass()(model)
        fold_constants_ir(model, should_fold=_small)
        fold_constants_ir(
            model, should_fold=_rearranges, input_size_limit=MANY_ELEMENTS, output_size_limit=MANY_ELEMENTS
        )
        ir.passes.Sequential(
            passes.IdentityEliminationPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.ClearMetadataAndDocStringPass(),
            passes.TopologicalSortPass(),
            passes.NameFixPass(),
        )(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            value.metadata_props.clear()
    model.producer_name, model.producer_version, model.graph.name = "paredown", None, "main"


def _small(node: ir.Node) -> bool | None:
    """Leave packed weights alone; elsewhere the limits of the folder decide."""
    return False if node.domain == DOMAIN else None


def _rearranges(node: ir.Node) -> bool:
    """Whether a node moves weights that nothing else reads in their old place."""
    if node.domain or node.op_type not in REARRANGE:
        return False
    sources = [value for value in node.inputs if value is not None and value.is_initializer()]
    if node.op_type == "Slice":
        return all(use.node.op_type == "Slice" for value in sources[:1] for use in value.uses())
    return all(len(value.uses()) == 1 for value in sources if value.const_value and value.const_value.size > 1024)


def _save(model: ir.Model, path: Path, external_bytes: int) -> None:
    values = model.graph.initializers.values()
    total = sum(value.const_value.nbytes for value in values if value.const_value is not None)
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    ir.save(model, path, external_data=beside.name if total > external_bytes else None, size_threshold_bytes=1024)


def _check(path: Path) -> None:
    """Let onnx check the file and infer every type and shape strictly."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx rejects the file: {error}", where=path.name) from error
