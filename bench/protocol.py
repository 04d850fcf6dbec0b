"""The open inference protocol (KServe v2, HTTP) as far as tensors go: JSON, and the binary extension of Triton.

A body is a JSON object; with the header Inference-Header-Content-Length it ends after so many bytes, and the raw bytes
of the tensors that say `binary_data_size` follow in their order, little-endian, row after row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..optimizer.errors import InputError
from .feeds import Feeds

if TYPE_CHECKING:  # it imports torch
    from ..optimizer.model import InputSpec

DATATYPES = {
    "BOOL": "bool",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    **{f"{sign.upper()}{bits}": f"{sign}{bits}" for sign in ("int", "uint") for bits in (8, 16, 32, 64)},
}
"""Names of the protocol -> numpy's."""
NAMES = {name: key for key, name in DATATYPES.items()}
EXTENSIONS = ("binary_tensor_data",)
Json: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Query:
    """A request that was understood. outputs: name -> whether raw bytes are wanted; empty: all, as `binary` says."""

    identity: str
    feeds: Feeds
    outputs: Mapping[str, bool]
    binary: bool


def read(body: bytes, header: int | None, inputs: Sequence[InputSpec]) -> Query:
    """Return the query of a body; InputError in one sentence where it is none, or does not fit the model.

    header: length of the JSON part, None where the body is nothing else.
    """
    document, raw = _document(body, header)
    given = document.get("inputs")
    if not isinstance(given, list) or not all(isinstance(item, Mapping) for item in given):
        raise InputError('"inputs" is no list of tensors', where="request")
    specs, feeds, at = {spec.name: spec for spec in inputs}, dict[str, np.ndarray](), 0
    for item in given:
        name = str(item.get("name"))
        if name not in specs or name in feeds:
            known = ", ".join(specs)
            raise InputError(f'"{name}" is given twice or is none of the inputs', where="request", fix=f"give {known}")
        feeds[name], at = _tensor(item, specs[name], (raw, at))
    missing = [name for name in specs if name not in feeds]
    if missing or at != len(raw):
        what = f"the input {missing[0]} is missing" if missing else f"{len(raw) - at} bytes belong to no tensor"
        raise InputError(what, where="request")
    _check_common(feeds, specs)
    wanted = document.get("outputs") or []
    outputs = {str(item["name"]): bool(_parameters(item).get("binary_data")) for item in wanted}
    binary = bool(_parameters(document).get("binary_data_output"))
    return Query(identity=str(document.get("id", "")), feeds=feeds, outputs=outputs, binary=binary)


def write(query: Query, found: Mapping[str, np.ndarray], model: str) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON part where raw bytes follow."""
    unknown = [name for name in query.outputs if name not in found]
    if unknown:
        raise InputError(f'the model has no output "{unknown[0]}"', where="request", fix=f"use {', '.join(found)}")
    wanted = query.outputs or dict.fromkeys(found, query.binary)
    tensors, raw = [], b""
    for name, binary in wanted.items():
        array = np.ascontiguousarray(found[name])
        entry: dict[str, Any] = {"name": name, "datatype": NAMES[array.dtype.name], "shape": list(array.shape)}
        if binary:
            part = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            entry["parameters"] = {"binary_data_size": len(part)}
            raw += part
        else:
            if not _is_finite(array):
                fix = "ask for raw bytes, with binary_data: true"
                raise InputError("it holds NaN or Infinity, which JSON has not", where=f'output "{name}"', fix=fix)
            entry["data"] = array.ravel().tolist()
        tensors.append(entry)
    document = {"model_name": model, "model_version": "1", "outputs": tensors}
    if query.identity:
        document["id"] = query.identity
    text = json.dumps(document).encode()
    return text + raw, len(text) if any(wanted.values()) else None


def described(name: str, dtype: str, shape: Sequence[int | str]) -> dict[str, Any]:
    """Return a tensor as the metadata of a model has it: -1 for sizes that vary."""
    return {
        "name": name,
        "datatype": NAMES.get(dtype, dtype.upper()),
        "shape": [size if isinstance(size, int) else -1 for size in shape],
    }


def _document(body: bytes, header: int | None) -> tuple[Json, bytes]:
    if header is not None and not 0 <= header <= len(body):
        raise InputError(f"the JSON part has {header} of {len(body)} bytes", where="Inference-Header-Content-Length")
    text, raw = (body, b"") if header is None else (body[:header], body[header:])
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InputError(f"the body is no JSON: {error}", where="request") from error
    if not isinstance(document, Mapping):
        raise InputError("the body is no JSON object", where="request")
    return document, raw


def _tensor(item: Json, spec: InputSpec, rest: tuple[bytes, int]) -> tuple[np.ndarray, int]:
    """Return a tensor, and where the raw bytes of the next one begin."""
    raw, at = rest
    shape, where = item.get("shape"), f'input "{spec.name}"'
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise InputError(f"its shape is {shape!r}", where=where, fix="give a list of whole numbers")
    _check_shape(shape, spec, where)
    if DATATYPES.get(str(item.get("datatype"))) != spec.dtype:
        what = f"its datatype is {item.get('datatype')}"
        raise InputError(what, where=where, fix=f"give {NAMES.get(spec.dtype, spec.dtype)}")
    size = _parameters(item).get("binary_data_size")
    dtype = np.dtype(spec.dtype)
    if size is None:
        return _listed(item.get("data"), shape, dtype, where), at
    if size != math.prod(shape) * dtype.itemsize or at + size > len(raw):
        what = f"binary_data_size is {size}, and {len(raw) - at} bytes are left"
        raise InputError(what, where=where, fix=f"send {math.prod(shape) * dtype.itemsize} bytes")
    part = np.frombuffer(raw, dtype.newbyteorder("<"), math.prod(shape), at)
    return part.astype(dtype).reshape(shape), at + size


def _listed(data: Any, shape: Sequence[int], dtype: np.dtype[Any], where: str) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            array = np.array(data, dtype=dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"its data are no numbers of {dtype}: {error}", where=where) from error
    if not _is_finite(array):
        what = f"its data hold null, NaN, Infinity or what is too large for {dtype}"
        raise InputError(what, where=where, fix="send such numbers as raw bytes, with binary_data_size")
    if array.size != math.prod(shape):
        raise InputError(f"it has {array.size} numbers, its shape says {math.prod(shape)}", where=where)
    return array.reshape(shape)


def _is_finite(array: np.ndarray) -> bool:
    return not np.issubdtype(array.dtype, np.floating) or bool(np.isfinite(array).all())


def _check_shape(shape: Sequence[int], spec: InputSpec, where: str) -> None:
    wanted = ", ".join(str(size) for size in spec.shape)
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, spec.shape, strict=True)
    )
    if not fits or 0 in shape:
        raise InputError(f"its shape is {list(shape)}", where=where, fix=f"give [{wanted}]")


def _check_common(feeds: Feeds, specs: Mapping[str, InputSpec]) -> None:
    """Raise InputError where a named dimension has two sizes."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in feeds.items():
        for dim, size in zip(specs[name].shape, array.shape, strict=True):
            known = sizes.setdefault(dim, (size, name)) if isinstance(dim, str) else (size, name)
            if known[0] != size:
                raise InputError(f"{dim} is {known[0]} in {known[1]} and {size} in {name}", where="request")


def _parameters(item: Json) -> Json:
    found = item.get("parameters") if isinstance(item, Mapping) else None
    return found if isinstance(found, Mapping) else {}
