"""See in which layers of a file ONNX Runtime computes in integers, in the graph that it has optimized and runs."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime

from ..optimizer.errors import ExportError
from .onnx_session import session_options

PRODUCTS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
PAIR = ("QuantizeLinear", "DequantizeLinear")
MOVES = (
    *("Concat", "Flatten", "Identity", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze"),
    *("Transpose", "Unsqueeze"),
)
"""Operators that compute nothing: in floats they cost time and no more."""
CODES = (".codes", ".t.codes")
"""What the name of a parameter ends with where the file holds its codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """layers: parameters that integer kernels multiply by. floats: "Operator name" of what computes in float although
    codes go in and codes come out."""

    layers: frozenset[str]
    floats: tuple[str, ...]


def kernels(path: Path) -> Kernels:
    """Return what computes in integers, and what computes in float in between."""
    proto = optimized(path)
    products = (node for node in proto.graph.node if node.op_type in PRODUCTS)
    layers = frozenset(name for node in products if (name := _parameter(node.input)))
    return Kernels(layers=layers, floats=tuple(_floats(proto.graph.node)))


def optimized(path: Path, library: Path | None = None, *, weights: bool = False) -> onnx.ModelProto:
    """Return the graph that ONNX Runtime runs on this machine, with large weights only where `weights` asks for them.

    library: what has kernels for the file's packed layers; without it their portable bodies are what is optimized.
    """
    settings = session_options(threads=1, library=library)
    settings.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "optimized.onnx"
        settings.optimized_model_filepath = str(written)
        try:
            onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime does not load it: {error}", where=path.name) from error
        return onnx.load(written, load_external_data=weights)


def check(path: Path, layers: Collection[str]) -> Kernels:
    """Return the kernels of a file; ExportError where one of `layers` (parameters) does not compute in integers."""
    found = kernels(path)
    missing = sorted(set(layers) - found.layers)
    if missing:
        raise ExportError(
            f'"{missing[0]}" ({len(missing)} of {len(layers)} layers) does not compute in integers',
            where=f"{path.name} in onnxruntime",
            fix="skip it in the step, or leave activations out",
        )
    return found


def _parameter(inputs: Iterable[str]) -> str:
    """Return the parameter whose codes are among the inputs of a product; biases have codes too, after them."""
    for name in inputs:
        for ending in reversed(CODES):
            if name.endswith(ending):
                return name.removesuffix(ending)
    return ""


def _floats(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    nodes = list(nodes)
    made = {out: node for node in nodes for out in node.output}
    read: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            read.setdefault(name, []).append(node)
    for node in nodes:
        if _computes_float(node):
            behind = [made[name] for name in node.input if name in made]
            ahead = [user for name in node.output for user in read.get(name, [])]
            if _any(behind, "DequantizeLinear") and _any(ahead, "QuantizeLinear"):
                yield f"{node.op_type} {node.name}"


def _computes_float(node: onnx.NodeProto) -> bool:
    return node.op_type not in (*PRODUCTS, *PAIR, *MOVES) and not node.op_type.startswith("QLinear")


def _any(nodes: Iterable[onnx.NodeProto], op: str) -> bool:
    return any(node.op_type == op for node in nodes)
