"""What others make of the same original: half precision and ONNX Runtime's own quantizers, each at its best settings.

These are the files that a benchmark holds ours against. Every one keeps the names, types and dimensions of the
original's inputs and outputs.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

from ..optimizer.errors import ExportError
from .onnx_runner import has_packed_layers, load
from .runner import RunnerOptions

Feeds: TypeAlias = Mapping[str, np.ndarray]
BLOCKS = {"matmulnbits": 32, "matmulnbits128": 128}
"""Weights that share a scale: 32 is the more exact, 128 the faster one (the tables of the README)."""
EXTERNAL_BYTES = 1_000_000
"""As our own files: weights above so many bytes stand beside the graph, from where they are mapped."""


def make(name: str, original: Path, path: Path, feeds: Sequence[Feeds]) -> str:
    """Write the baseline `name` of an original to `path` and return how it was made.

    feeds: inputs to calibrate with. Raises ExportError, leaving no file, where the tool cannot make it or what it made
    does not run.
    """
    if has_packed_layers(original):
        raise ExportError("the original has packed layers", where=original.name, fix="name the float original first")
    try:
        with _quiet():
            how = _MAKERS[name](original, path, feeds)
            load(path, RunnerOptions()).run(dict(feeds[0]))
    except Exception as problem:  # the tools raise whatever they stumble over
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        raise ExportError(_reason(problem), where=name) from problem
    return how


def _half(original: Path, path: Path, _feeds: Sequence[Feeds]) -> str:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _save(convert_float_to_float16(onnx.load(original), keep_io_types=True), path)
    return "weights and operators in float16, inputs and outputs as they were"


def _int8(original: Path, path: Path, feeds: Sequence[Feeds]) -> str:
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static

    signed, reduced = _int8_settings()
    with tempfile.TemporaryDirectory(prefix=".paredown-", dir=path.parent) as made:
        folder = Path(made)
        # Our exporter infers every shape strictly; the symbolic pass adds nothing and does not know all operators.
        quant_pre_process(str(original), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
        quantize_static(
            str(folder / "prepared.onnx"),
            str(folder / "int8.onnx"),
            _Reader(feeds),
            per_channel=True,
            reduce_range=reduced,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": signed},
        )
        _save(onnx.load(folder / "int8.onnx"), path)
    form = "signed activations" if signed else "unsigned activations"
    return f"quantize_static, Q/DQ, per channel, {form}{', weights of 7 bits' * reduced}"


def _matmulnbits(block: int) -> Callable[[Path, Path, Sequence[Feeds]], str]:
    def make_it(original: Path, path: Path, _feeds: Sequence[Feeds]) -> str:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        model = onnx.load(original)
        _split_gemms(model.graph)
        quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=block, is_symmetric=False, accuracy_level=4)
        quantizer.process()
        made = quantizer.model.model
        count = sum(node.op_type == "MatMulNBits" for node in made.graph.node)
        if not count:
            raise ExportError("it has no product with a constant matrix for MatMulNBits")
        _save(made, path)
        return f"MatMulNBits, 4 bits, block {block}, accuracy level 4, in {count} linear layer{'s' * (count > 1)}"

    return make_it


_MAKERS: Mapping[str, Callable[[Path, Path, Sequence[Feeds]], str]] = {
    "fp16": _half,
    "int8": _int8,
    **{name: _matmulnbits(block) for name, block in BLOCKS.items()},
}


def _int8_settings() -> tuple[bool, bool]:
    """Return (signed activations, weights of 7 bits) as onnxruntime's guide advises for this processor.

    Arm takes signed ones. x86 wants unsigned ones, where signed ones were slower than float; without VNNI sums of 8-bit
    products saturate.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True, False
    flags = Path("/proc/cpuinfo")
    return False, not (flags.is_file() and "vnni" in flags.read_text())


class _Reader:
    """What `quantize_static` calibrates with: one batch a call, then None."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._left, None)
        return None if batch is None else dict(batch)


def _split_gemms(graph: onnx.GraphProto) -> None:
    """Write each x W^T + b of constants as MatMul and Add: MatMulNBits knows MatMul alone."""
    constants = {item.name: item for item in graph.initializer}
    nodes = [part for node in graph.node for part in _split(node, graph, constants)]
    del graph.node[:]
    graph.node.extend(nodes)


def _split(
    node: onnx.NodeProto, graph: onnx.GraphProto, constants: Mapping[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    settings = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    plain = settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0 and not settings.get("transA", 0)
    if node.op_type != "Gemm" or node.domain or not plain or node.input[1] not in constants:
        return [node]
    weight = numpy_helper.to_array(constants[node.input[1]])
    name, output = f"{node.output[0]}_matrix", node.output[0]
    matrix = np.ascontiguousarray(weight.T if settings.get("transB", 0) else weight)
    graph.initializer.append(numpy_helper.from_array(matrix, name))
    biased = len(node.input) > 2 and bool(node.input[2])
    product = f"{output}_product" if biased else output
    parts = [onnx.helper.make_node("MatMul", [node.input[0], name], [product], name=f"{node.name or output}_matmul")]
    if biased:
        parts.append(
            onnx.helper.make_node("Add", [product, node.input[2]], [output], name=f"{node.name or output}_add")
        )
    return parts


def _save(model: onnx.ModelProto, path: Path) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used or not _is_flat(model.graph)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    beside = model.ByteSize() > EXTERNAL_BYTES
    onnx.save_model(
        model, path, save_as_external_data=beside, location=f"{path.name}.data" if beside else None, size_threshold=1024
    )


def _is_flat(graph: onnx.GraphProto) -> bool:
    """Return whether no node has a graph of its own, which could read the initializers too."""
    kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    return not any(item.type in kinds for node in graph.node for item in node.attribute)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the tools log off the console, and undo `logging.basicConfig`, which one of them calls on import."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        for handler in [item for item in root.handlers if item not in handlers]:
            root.removeHandler(handler)


def _reason(problem: Exception) -> str:
    if isinstance(problem, ExportError):
        return problem.what
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'without a word'}"
