"""A weight is a value: what one parameter of a network means, and the bytes that say so.

Every form stands for a matrix (out, in); `Layout` maps that matrix to the shape of the parameter. `dense()` is what
ships: each kernel, export and stored file is tested against it, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import torch
from jaxtyping import Float, Float16, Int8, Shaped, UInt8
from torch import Tensor

from ..kernels.pack import pack, packed_bytes, unpack
from .errors import InputError

TABLE_UNIT = 1.0 / 127.0
"""Value of one step of an int8 table: table entries span [-1, 1], so that scales stay in the range of fp16."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dense:
    """The parameter as it came, in its own dtype."""

    values: Float[Tensor, "out in"]

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.values)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.values

    def bits(self) -> int:
        return self.values.numel() * self.values.element_size() * 8

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def meta(self) -> dict[str, Any]:
        return {"format": "dense"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Uniform:
    """Evenly spaced levels: (code - zero) * scale.

    `codes` in 0..2**code_bits-1; `scale` holds one column per group of `group` inputs (0 = one scale per row) and may
    be negative. `dense()` computes in float32 and rounds once to `dtype`.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: int
    code_bits: int
    group: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_codes(self.codes, self.code_bits)
        _check_scale(self.scale, self.codes, self.group)

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.codes)

    def dense(self) -> Float[Tensor, "out in"]:
        levels = self.codes.float() - float(self.zero)
        return (levels * expand_scale(self.scale, self.shape[1], self.group)).to(self.dtype)

    def bits(self) -> int:
        return 8 * packed_bytes(self.codes.numel(), self.code_bits) + _stored_bits(self.scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": pack(self.codes, self.code_bits), "scale": self.scale}

    def meta(self) -> dict[str, Any]:
        return {"format": "uniform", "zero": self.zero} | _code_meta(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codebook:
    """Levels from a table: table[block of row, code] * unit * scale.

    One table for the tensor (`table_rows` = 0) or one per block of `table_rows` consecutive rows. int8 entries count in
    steps of 1/127, fp16 entries are values. `dense()` computes in float32 and rounds once to `dtype`.
    """

    codes: UInt8[Tensor, "out in"]
    table: Int8[Tensor, "blocks levels"] | Float16[Tensor, "blocks levels"]
    scale: Float[Tensor, "out groups"]
    code_bits: int
    group: int = 0
    table_rows: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_codes(self.codes, self.code_bits)
        _check_scale(self.scale, self.codes, self.group)
        blocks = math.ceil(self.shape[0] / self.table_rows) if self.table_rows else 1
        if tuple(self.table.shape) != (blocks, 2**self.code_bits):
            raise InputError(f"table {tuple(self.table.shape)} must be {(blocks, 2**self.code_bits)}")
        if self.table.dtype not in (torch.int8, torch.float16):
            raise InputError(f"table entries are {self.table.dtype}, must be int8 or float16")

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.codes)

    @property
    def unit(self) -> float:
        return TABLE_UNIT if self.table.dtype == torch.int8 else 1.0

    def dense(self) -> Float[Tensor, "out in"]:
        rows, levels = torch.arange(self.shape[0]), 2**self.code_bits
        offset = (rows // self.table_rows if self.table_rows else rows * 0) * levels
        values = self.table.float().flatten()[self.codes.long() + offset[:, None]] * torch.tensor(self.unit)
        return (values * expand_scale(self.scale, self.shape[1], self.group)).to(self.dtype)

    def bits(self) -> int:
        packed = 8 * packed_bytes(self.codes.numel(), self.code_bits)
        return packed + _stored_bits(self.scale) + _stored_bits(self.table)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": pack(self.codes, self.code_bits), "table": self.table, "scale": self.scale}

    def meta(self) -> dict[str, Any]:
        return {"format": "codebook", "table_rows": self.table_rows} | _code_meta(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """A product of two thin weights: left (out, r) times right (r, in)."""

    left: Weight
    right: Weight

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise InputError(f"factors {self.left.shape} and {self.right.shape} have no product")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dense().dtype

    def dense(self) -> Float[Tensor, "out in"]:
        return (self.left.dense().float() @ self.right.dense().float()).to(self.dtype)

    def bits(self) -> int:
        return self.left.bits() + self.right.bits()

    def tensors(self) -> dict[str, Tensor]:
        return _nested({"left": self.left, "right": self.right})

    def meta(self) -> dict[str, Any]:
        return {"format": "low_rank", "left": self.left.meta(), "right": self.right.meta()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sum:
    """A sum of weights of one shape, added in float32 in the order of `terms`."""

    terms: tuple[Weight, ...]

    def __post_init__(self) -> None:
        if len({term.shape for term in self.terms}) != 1:
            raise InputError(f"terms of shapes {[term.shape for term in self.terms]} have no sum")

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.terms[0].dense().dtype

    def dense(self) -> Float[Tensor, "out in"]:
        total = self.terms[0].dense().float()
        for term in self.terms[1:]:
            total = total + term.dense().float()
        return total.to(self.dtype)

    def bits(self) -> int:
        return sum(term.bits() for term in self.terms)

    def tensors(self) -> dict[str, Tensor]:
        return _nested({str(i): term for i, term in enumerate(self.terms)})

    def meta(self) -> dict[str, Any]:
        return {"format": "sum", "terms": [term.meta() for term in self.terms]}


Weight: TypeAlias = Dense | Uniform | Codebook | LowRank | Sum


def rebuild(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weight:
    """Return the weight that `meta()` and `tensors()` describe; a KeyError or InputError if they do not fit."""
    match meta["format"]:
        case "dense":
            return Dense(values=tensors["values"])
        case "low_rank":
            left, right = (rebuild(meta[side], _part(tensors, side)) for side in ("left", "right"))
            return LowRank(left=left, right=right)
        case "sum":
            return Sum(terms=tuple(rebuild(m, _part(tensors, str(i))) for i, m in enumerate(meta["terms"])))
    shape, bits = tuple(meta["shape"]), meta["code_bits"]
    if len(tensors["codes"]) != packed_bytes(math.prod(shape), bits):
        raise InputError(f"codes take {len(tensors['codes'])} bytes, which {shape} of {bits} bits do not")
    dtype = getattr(torch, meta["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f'unknown dtype "{meta["dtype"]}"', fix="use the version of paredown that wrote it")
    common = {
        "codes": unpack(tensors["codes"], bits, shape),
        "scale": tensors["scale"],
        "code_bits": bits,
        "group": meta["group"],
        "dtype": dtype,
    }
    if meta["format"] == "uniform":
        return Uniform(**common, zero=meta["zero"])
    if meta["format"] == "codebook":
        return Codebook(**common, table=tensors["table"], table_rows=meta["table_rows"])
    raise InputError(f'unknown weight format "{meta["format"]}"', fix="use the version of paredown that wrote it")


def format_name(weight: Weight) -> str:
    """Return the short name of a weight's form for tables: "dense", "codebook 4", "codebook 4 + rank 8"."""
    match weight:
        case Dense():
            return "dense"
        case Uniform():
            return f"uniform {weight.code_bits}"
        case Codebook():
            return f"codebook {weight.code_bits}"
        case LowRank():
            return f"rank {weight.left.shape[1]}"
        case Sum():
            return " + ".join(format_name(term) for term in weight.terms)
        case _:
            assert_never(weight)


def expand_scale(scale: Float[Tensor, "out groups"], columns: int, group: int) -> Float[Tensor, "out in"]:
    """Return one float32 scale per weight; the last group may be short."""
    if not group:
        return scale.float()
    return scale.float().repeat_interleave(group, dim=1)[:, :columns]


LayoutKind: TypeAlias = Literal["matrix", "matrix_t", "conv", "conv_transpose"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the matrix (out, in) of a weight lies in its parameter of shape `shape`.

    matrix: linear, embedding, recurrent and attention projections, rows as stored.
    matrix_t: a parameter (in, out) that multiplies from the right, as in x @ W.
    conv: (out, in/groups, *kernel), columns are (in/groups, *kernel) flattened.
    conv_transpose: (in, out/groups, *kernel), rows are output channels, columns (in/groups, *kernel) flattened.
    """

    kind: LayoutKind
    shape: tuple[int, ...]
    groups: int = 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Return (out, in) of the matrix."""
        return _shape(self.to_matrix(torch.empty(self.shape, device="meta")))

    def to_matrix(self, param: Shaped[Tensor, "..."]) -> Shaped[Tensor, "out in"]:
        if self.kind == "matrix_t":
            return param.T
        if self.kind != "conv_transpose":
            return param.reshape(self.shape[0], -1)
        inputs, outputs, *kernel = self.shape
        grouped = param.reshape(self.groups, inputs // self.groups, outputs, *kernel).transpose(1, 2)
        return grouped.reshape(self.groups * outputs, -1)

    def to_param(self, matrix: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "..."]:
        if self.kind == "matrix_t":
            return matrix.T
        if self.kind != "conv_transpose":
            return matrix.reshape(self.shape)
        inputs, outputs, *kernel = self.shape
        grouped = matrix.reshape(self.groups, outputs, inputs // self.groups, *kernel).transpose(1, 2)
        return grouped.reshape(self.shape)


def _shape(matrix: Tensor) -> tuple[int, int]:
    rows, columns = matrix.shape
    return rows, columns


def _stored_bits(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() * 8


def _code_meta(weight: Uniform | Codebook) -> dict[str, Any]:
    return {
        "code_bits": weight.code_bits,
        "group": weight.group,
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def _nested(parts: Mapping[str, Weight]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.tensors().items()}


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _check_codes(codes: Tensor, code_bits: int) -> None:
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise InputError(f"codes are {codes.dtype} {tuple(codes.shape)}, must be a uint8 matrix")
    if not 1 <= code_bits <= 8:
        raise InputError(f"code_bits={code_bits} is out of range", fix="use 2, 3, 4 or 8")
    if codes.numel() and int(codes.max()) >= 2**code_bits:
        raise InputError(f"code {int(codes.max())} does not fit {code_bits} bits")


def _check_scale(scale: Tensor, codes: Tensor, group: int) -> None:
    columns = math.ceil(codes.shape[1] / group) if group else 1
    if tuple(scale.shape) != (codes.shape[0], columns):
        raise InputError(f"scale {tuple(scale.shape)} must be {(codes.shape[0], columns)} for group={group}")
