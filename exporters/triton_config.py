"""config.pbtxt: what Triton has to know of a model, as the text form of inference.ModelConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx

from ..optimizer.errors import ExportError

if TYPE_CHECKING:
    from .triton import Options

Dim: TypeAlias = int | str
Field: TypeAlias = "tuple[str, str | int | bool | Word | Sequence[int] | Sequence[Field]]"

TYPES = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.DOUBLE: "FP64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.STRING: "STRING",
    **{getattr(onnx.TensorProto, f"INT{bits}"): f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{getattr(onnx.TensorProto, f"UINT{bits}"): f"UINT{bits}" for bits in (8, 16, 32, 64)},
}
FLOATS = ("FP16", "BF16", "FP32", "FP64")
WARM_SIZE = 32
"""Size of a named dimension in the requests that warm a model up, where nothing says a usual one."""


class Word(str):
    """A value that is written without quotes: the name of an enumeration."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input or output. shape: numbers, and names of dimensions that vary ("" where they have none)."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """What a model takes and gives. batch: the dimension that counts requests, "" where there is none: see `reason`.

    sizes: usual ones of named dimensions.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: str
    reason: str
    sizes: Mapping[str, int] = field(default_factory=dict)


def read_tensors(path: Path) -> Tensors:
    """Read the inputs and outputs of an ONNX file; ExportError for a type that Triton has no name for."""
    graph = onnx.load(path, load_external_data=False).graph
    stored = {item.name for item in graph.initializer}
    inputs = tuple(_tensor(value) for value in graph.input if value.name not in stored)
    outputs = tuple(_tensor(value) for value in graph.output)
    batch, reason = _batch(inputs, outputs)
    return Tensors(inputs=inputs, outputs=outputs, batch=batch, reason=reason)


def text(name: str, tensors: Tensors, options: Options, notes: Sequence[str], library: str) -> str:
    """Return the configuration. notes: written first, as comments. library: path of our kernels there, or ""."""
    told = [*notes, *([f"max_batch_size is 0, each request runs alone: {tensors.reason}."] if tensors.reason else [])]
    plan = options.platform == "tensorrt"
    batch = options.max_batch if tensors.batch else 0
    fields: list[Field] = [
        ("name", name),
        ("platform", "tensorrt_plan") if plan else ("backend", "onnxruntime"),
        ("default_model_filename", "model.plan" if plan else "model.onnx"),
        ("max_batch_size", batch),
        *(("input", _described(tensor, bool(batch))) for tensor in tensors.inputs),
        *(("output", _described(tensor, bool(batch))) for tensor in tensors.outputs),
        ("instance_group", [("count", options.instances), ("kind", Word("KIND_GPU" if plan else "KIND_CPU"))]),
    ]
    if batch:
        delay = round(options.max_delay_ms * 1000)
        fields.append(
            ("dynamic_batching", [("preferred_batch_size", [batch]), ("max_queue_delay_microseconds", delay)])
        )
    if library:
        fields.append(("model_operations", [("op_library_filename", library)]))
    fields += [("model_warmup", _warmup(tensors, size)) for size in sorted({1, max(batch, 1)})]
    return "".join(f"# {line}\n" for line in told) + "".join(_lines(fields))


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    if kind.elem_type not in TYPES:
        name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
        raise ExportError(f"Triton has no type for {name}", where=f'"{value.name}"', fix="cast it in the network")
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim)
    return Tensor(name=value.name, dtype=TYPES[kind.elem_type], shape=dims)


def _batch(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[str, str]:
    """Return the named dimension that is first in every input and output and nowhere else, or why there is none."""
    firsts = {tensor.name: tensor.shape[0] if tensor.shape else 0 for tensor in (*inputs, *outputs)}
    batch = firsts[inputs[0].name] if inputs else 0
    if not isinstance(batch, str) or not batch:
        return "", f'the first dimension of "{inputs[0].name if inputs else ""}" is fixed'
    other = next((name for name, first in firsts.items() if first != batch), None)
    if other is not None:
        return "", f'the first dimension of "{other}" is not "{batch}"'
    inner = next((tensor.name for tensor in (*inputs, *outputs) if batch in tensor.shape[1:]), None)
    return (batch, "") if inner is None else ("", f'"{batch}" is a later dimension of "{inner}" too')


def _described(tensor: Tensor, batched: bool) -> list[Field]:
    """Return an input or output; a scalar of each request has the one dimension that Triton asks for."""
    dims = [size if isinstance(size, int) else -1 for size in tensor.shape[1 if batched else 0 :]]
    found: list[Field] = [("name", tensor.name), ("data_type", Word(f"TYPE_{tensor.dtype}")), ("dims", dims or [1])]
    return found if dims else [*found, ("reshape", [("shape", list[int]())])]


def _warmup(tensors: Tensors, batch: int) -> list[Field]:
    """Return a request that Triton executes before the model is ready: random floats, zeros of everything else."""
    found: list[Field] = [("name", f"batch {batch}"), ("batch_size", batch)]
    for tensor in tensors.inputs:
        shape = tensor.shape[1 if tensors.batch else 0 :]
        dims = [size if isinstance(size, int) else tensors.sizes.get(size, WARM_SIZE) for size in shape] or [1]
        data = "random_data" if tensor.dtype in FLOATS else "zero_data"
        value: list[Field] = [("data_type", Word(f"TYPE_{tensor.dtype}")), ("dims", dims), (data, True)]
        found.append(("inputs", [("key", tensor.name), ("value", value)]))
    return found


def _lines(fields: Sequence[Field], depth: int = 0) -> list[str]:
    margin = "  " * depth
    found: list[str] = []
    for name, value in fields:
        if isinstance(value, list) and not _is_numbers(value):
            found += [f"{margin}{name} {{\n", *_lines(value, depth + 1), f"{margin}}}\n"]
        else:
            found.append(f"{margin}{name}: {_written(value)}\n")
    return found


def _is_numbers(value: list[object]) -> bool:
    return all(isinstance(item, int) for item in value)


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return json.dumps(value)
