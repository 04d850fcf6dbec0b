"""Trace a dense module into an ONNX graph with the names that the model's inputs ask for.

Values keep the names of the torch nodes that made them, and a node is named "module path/value": `verify` finds layers
by both.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from ..optimizer.activations_module import free_dims, named_dims
from ..optimizer.errors import Error, ExportError
from ..optimizer.graph import capture, module_path, quiet_export
from ..optimizer.model import InputSpec
from .onnx_qdq import translations

NOISY = ("torch.onnx", "onnxscript", "onnx_ir")
"""Loggers that report, at WARNING, what no user can act on (a missing torchvision, skipped folds)."""

IR_VERSIONS = {23: 11, 24: 12, 25: 13}
"""What an opset needs at least; onnxruntime 1.31 reads up to 13, and 10 serves every opset before 23."""


def trace(module: nn.Module, inputs: Sequence[InputSpec], example: tuple[Tensor, ...], opset: int) -> ir.Model:
    """Return the network as ONNX operators in the given opset, with dense weights under their parameter names.

    Raises ExportError: an operator without an ONNX form, an opset that torch cannot write, an input dimension that
    the trace fixed although the model names it.
    """
    program = _program(module, inputs, example, opset)
    model: ir.Model = program.model
    written = model.opset_imports.get("", 0)
    if written != opset:
        raise ExportError(f"opset {opset} was asked for, torch wrote opset {written}", fix="use opset 20 or 21")
    model.ir_version = IR_VERSIONS.get(opset, 10)
    _name_nodes(model.graph)
    _name_inputs(model.graph, inputs)
    _check_inputs(model.graph, inputs)
    return model


def name_outputs(graph: ir.Graph) -> None:
    """Name outputs "output", or "output_0" and on; a value that cannot be renamed is copied."""
    count, seen = len(graph.outputs), set[int]()
    for i, value in enumerate(list(graph.outputs)):
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value], name=f"/output_{i}_copy")
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[i] = value = node.outputs[0]
        seen.add(id(value))
        _rename(graph, value, "output" if count == 1 else f"output_{i}")


def torch_program(
    module: nn.Module, inputs: Sequence[InputSpec], example: tuple[Tensor, ...], opset: int
) -> torch.export.ExportedProgram:
    """Return the torch program whose node names `trace` gives to ONNX values."""
    program = _program(module, inputs, example, opset).exported_program
    assert isinstance(program, torch.export.ExportedProgram)
    return program


@contextlib.contextmanager
def quiet_loggers() -> Iterator[None]:
    """Keep what the ONNX tools log below errors off the console."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    try:
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _recurrent_patch() -> Iterator[None]:
    """Let torch's temporary LSTM and GRU decompositions take effect, and end.

    torch 2.13 swaps the kernels of both operators while it exports, but not the dispatcher's cache: after any earlier
    capture in the process the swap is not seen and a named sequence length is fixed without a word.
    """
    operators = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
    try:
        for operator in operators:
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator in operators:
            operator._dispatch_cache.clear()


def _program(
    module: nn.Module, inputs: Sequence[InputSpec], example: tuple[Tensor, ...], opset: int
) -> torch.onnx.ONNXProgram:
    """Export with named dimensions; where torch refuses the names, let it find the dimensions itself."""
    # What torch.onnx.export imports: an interruption meanwhile would end as an error of a module that is half there.
    for name in ("torch._dynamo", "torch._inductor"):
        importlib.import_module(name)
    try:
        return _export(module, example, opset, named_dims(inputs))
    except Exception as first:
        try:
            return _export(module, example, opset, free_dims(inputs))
        except Exception:
            raise _reason(first, module, example) from first


def _export(module: nn.Module, example: tuple[Tensor, ...], opset: int, dims: Any) -> torch.onnx.ONNXProgram:
    with quiet_export(), quiet_loggers(), _recurrent_patch(), torch.no_grad():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=dims,
            custom_translation_table=translations(),
        )
    assert program is not None
    return program


def _reason(error: Exception, module: nn.Module, example: tuple[Tensor, ...]) -> ExportError:
    """Return one sentence for what the exporter said in a page."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if isinstance(chain[-1], Error):
        return ExportError(str(chain[-1]))
    for link in chain:
        if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", str(link)):
            operator = found.group(1)
            where = _where(operator, module, example)
            return ExportError(
                f"operator {operator} has no ONNX form", where=where, fix="replace it by other operators"
            )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(chain[-1])).strip().splitlines()
    first = lines[0] if lines else type(chain[-1]).__name__
    return ExportError(
        f"the network cannot be exported: {first}", fix="torch.export must accept it with the inputs of the recipe"
    )


def _where(operator: str, module: nn.Module, example: tuple[Tensor, ...]) -> str:
    """Return the path of the first module whose operators, taken apart, contain this one; "" if none is found."""
    try:
        with quiet_export():
            program = capture(module, example).program.run_decompositions()
    except Exception:
        return ""
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return next((module_path(node) for node in calls if str(node.target).startswith(f"{operator}.")), "")


def _name_nodes(graph: ir.Graph) -> None:
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        path = "" if len(scopes) < 2 or scopes[-2].startswith("_empty_nn_module") else scopes[-2]
        node.name = f"{path}/{node.outputs[0].name}"


def _name_inputs(graph: ir.Graph, inputs: Sequence[InputSpec]) -> None:
    """Give inputs the names of the specs, and dimensions found by torch the names that were asked for."""
    if len(graph.inputs) != len(inputs):
        raise ExportError(f"the network takes {len(graph.inputs)} inputs, the model names {len(inputs)}")
    symbols: dict[str, str] = {}
    for value, spec in zip(graph.inputs, inputs, strict=True):
        _rename(graph, value, spec.name)
        have = value.shape or ir.Shape([])
        for size, wanted in zip(have, spec.shape, strict=True):
            if isinstance(size, ir.SymbolicDim) and isinstance(wanted, str) and size.value:
                symbols[size.value] = wanted
        if any(isinstance(size, ir.SymbolicDim) for size in have):
            named = [
                want if isinstance(size, ir.SymbolicDim) else size for size, want in zip(have, spec.shape, strict=True)
            ]
            value.shape = ir.Shape(named)
    for node in graph:
        for value in node.outputs:
            value.shape = _renamed(value.shape, symbols)


def _renamed(shape: ir.Shape | None, symbols: dict[str, str]) -> ir.Shape | None:
    """Rename symbols; a dimension that uses any other symbol becomes unknown."""
    if shape is None:
        return None
    known = set(symbols)
    sizes: list[int | str | None] = []
    for size in shape:
        text = size.value if isinstance(size, ir.SymbolicDim) else None
        if isinstance(size, int):
            sizes.append(size)
        elif text is not None and set(re.findall(r"[A-Za-z_]\w*", text)) <= known:
            sizes.append(re.sub(r"[A-Za-z_]\w*", lambda match: symbols[match.group()], text))
        else:
            sizes.append(None)
    return ir.Shape(sizes)


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Rename a value; another value of that name steps aside."""
    for node in graph:
        for other in node.outputs:
            if other.name == name and other is not value:
                other.name = f"{name}_inner"
    if name in graph.initializers and graph.initializers[name] is not value:
        raise ExportError(f'input "{name}" has the name of a parameter', fix="rename the input in the recipe")
    value.name = name


def _check_inputs(graph: ir.Graph, inputs: Sequence[InputSpec]) -> None:
    for value, spec in zip(graph.inputs, inputs, strict=True):
        have = list(value.shape or ())
        for axis, (size, wanted) in enumerate(zip(have, spec.shape, strict=True)):
            found = size.value if isinstance(size, ir.SymbolicDim) else size
            if found != wanted:
                raise ExportError(
                    f'input "{spec.name}": dimension {axis} is {found} in the file, "{wanted}" was asked for',
                    fix="the network fixes this size; give it as a number in the recipe",
                )
