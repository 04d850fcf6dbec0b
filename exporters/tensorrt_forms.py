"""How coded weights stand in a graph for TensorRT: as INT8 or INT4 constants that an engine keeps as they are.

    int8     DequantizeLinear(codes, scale of the row)
    int4     DequantizeLinear(codes, scales of blocks of inputs)
    levels   DequantizeLinear(codes, 1) * scale
    indices  Gather(table, Cast(DequantizeLinear(codes, 1)) + offset) * scale
    pairs    the same with a table of 16 pairs of levels: two codes of two bits each in one INT4 index

TensorRT takes a quantized constant only before a DequantizeLinear, its INT4 is signed, and blocks are whole. It would
fold codes in other types to floats. One orientation serves all: an engine is as small with a Transpose behind these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, assert_never

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from ..kernels.lut_spec import Mode
from ..optimizer.errors import ExportError
from ..optimizer.packed import Coded
from ..optimizer.weight import TABLE_UNIT, Codebook, Uniform, expand_scale
from .onnx_forms import Product
from .onnx_place import Place

Form: TypeAlias = Literal["int8", "int4", "levels", "indices", "pairs"]

INT4, INT8 = (-8, 7), (-128, 127)
BLOCKS = (128, 64, 32)
"""Runs of inputs that share a scale, tried where a row has one: TensorRT fuses blocked INT4 into the product, and its
engine of 512 x 512 is 149 kB with blocks of 128, 274 kB with one scale per row (tensorrt-rtx 1.7.1, SM86, fp16)."""


class Constants:
    """What an engine keeps packed without a plugin."""

    def refusal(self, weight: Coded, mode: Mode) -> str:
        return "no operator of TensorRT multiplies by codes of a table"

    def lookup_refusal(self, weight: Coded) -> str:
        return ""

    def multiplied(self, place: Place, product: Product) -> ir.Value:
        raise ExportError(self.refusal(product.weight, product.mode), where=product.name)

    def decoded(self, place: Place, weight: Coded, name: str) -> ir.Value:
        matrix = _Matrix(place=place, weight=_held(weight), name=name)
        if form_of(weight) in ("int8", "int4"):
            return _dequantized(matrix)
        return _decoded(matrix, lambda value: value, 1)

    def looked_up(self, place: Place, weight: Coded, name: str, rows: ir.Value) -> ir.Value:
        """Return rows that are picked as codes and decoded then."""
        if rows.shape is None:
            return place.add("Gather", [self.decoded(place, weight, name), rows], weight.dtype, {"axis": 0})

        def picked(value: ir.Value) -> ir.Value:
            assert value.dtype is not None
            return place.add("Gather", [value, rows], to_torch_dtype(value.dtype), {"axis": 0})

        return _decoded(_Matrix(place=place, weight=_held(weight), name=name), picked, rows.shape.rank())


def form_of(weight: Coded) -> Form:
    """Return how the codes of a weight stand in the graph."""
    n, k = weight.shape
    match weight:
        case Uniform():
            low, high = -weight.zero, 2**weight.code_bits - 1 - weight.zero
            if weight.code_bits <= 2:
                return "pairs"
            whole = (not weight.group or k % weight.group == 0) and bool((weight.scale > 0).all())
            if _inside((low, high), INT4):
                return "int4" if whole and n * k % 2 == 0 else "levels"
            if _is_int4(weight) or not _inside((low, high), INT8):
                return "indices"
            return "levels" if weight.group or int8_rows(weight) is None else "int8"
        case Codebook():
            if weight.code_bits <= 2:
                return "pairs"
            return "int8" if weight.code_bits > 4 and int8_rows(weight) is not None else "indices"
        case _:
            assert_never(weight)


def form_bytes(weight: Coded, itemsize: int) -> int:
    """Return the bytes of the constants of a weight where floats take `itemsize` each."""
    form, (n, k) = form_of(weight), weight.shape
    scales = n * (_blocks(weight) if form == "int4" else weight.scale.shape[1])
    if form == "pairs":
        return -(-n * k // 4) + itemsize * scales
    tables = 2**weight.code_bits if form == "indices" else 0
    codes = n * k // (2 if _is_int4(weight) else 1)
    return codes + itemsize * (scales + tables) + (4 * n if _offset_rows(weight) else 0)


def int8_rows(weight: Coded) -> Uniform | None:
    """Return the same weight as signed bytes with one positive scale per row, None where it is none."""
    if weight.group:
        return None
    match weight:
        case Uniform():
            values, unit = weight.codes.to(torch.int16) - weight.zero, 1.0
        case Codebook(table=table) if table.dtype == torch.int8:
            values, unit = _flat_codes(weight, table), TABLE_UNIT
        case _:
            return None
    scale = weight.scale.float() * unit
    values, scale = torch.where(scale < 0, -values, values) * (scale != 0), torch.where(scale == 0, 1.0, scale.abs())
    if values.numel() and not _inside((int(values.min()), int(values.max())), INT8):
        return None
    return Uniform(codes=(values + 128).to(torch.uint8), scale=scale, zero=128, code_bits=8, dtype=weight.dtype)


def positive(weight: Coded) -> Coded:
    """Return the same weight with positive scales, itself where the codes of a negative one cannot be turned.

    A DequantizeLinear of TensorRT takes positive scales only.
    """
    if not isinstance(weight, Uniform) or bool((weight.scale > 0).all()):
        return weight
    scale = expand_scale(weight.scale, weight.shape[1], weight.group)
    values = (weight.codes.to(torch.int16) - weight.zero) * (scale != 0)
    codes = torch.where(scale < 0, -values, values) + weight.zero
    if not _inside((int(codes.min()), int(codes.max())), (0, 2**weight.code_bits - 1)):
        return weight
    held = torch.where(weight.scale == 0, torch.ones_like(weight.scale), weight.scale.abs())
    return replace(weight, codes=codes.to(torch.uint8), scale=held)


def scales(weight: Coded) -> Tensor | None:
    """Return the scales that a DequantizeLinear applies, None where a product does."""
    form = form_of(weight)
    return _held(weight).scale.float() if form in ("int8", "int4") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """A weight that is decoded, and where."""

    place: Place
    weight: Coded
    name: str

    @property
    def columns(self) -> int:
        """Return the stored columns: whole groups and pairs, and no odd number of INT4 indices in all."""
        (n, k), weight = self.weight.shape, self.weight
        width = (2 if weight.code_bits <= 2 else 1) * (2 if n % 2 and _is_int4(weight) else 1)
        step = math.lcm(weight.group or 1, width)
        return -(-k // step) * step

    def add(self, op: str, inputs: list[ir.Value], dtype: torch.dtype | None = None, **attributes: int) -> ir.Value:
        return self.place.add(op, inputs, dtype or self.weight.dtype, attributes)

    def constant(self, key: str, tensor: Tensor) -> ir.Value:
        return self.place.initializer(f"{self.name}.{key}", tensor)


def _dequantized(matrix: _Matrix) -> ir.Value:
    """Return the matrix by one DequantizeLinear with a scale per row or per block."""
    weight, blocks = matrix.weight, _blocks(matrix.weight) if _is_int4(matrix.weight) else 1
    codes, scale = _codes(matrix), weight.scale.to(weight.dtype)
    if blocks == 1:
        return matrix.add("DequantizeLinear", [codes, matrix.constant("scale", scale.flatten())], axis=0)
    held, size = matrix.constant("block_scale", scale.expand(-1, blocks)), weight.shape[1] // blocks
    return matrix.add("DequantizeLinear", [codes, held], axis=1, block_size=size)


def _decoded(matrix: _Matrix, picked: Callable[[ir.Value], ir.Value], rank: int) -> ir.Value:
    """Return levels times scales of the rows that `picked` leaves, whose numbers have `rank` dimensions."""
    place, weight = matrix.place, matrix.weight
    one = place.initializer(f"one.{str(weight.dtype).removeprefix('torch.')}", torch.ones((), dtype=weight.dtype))
    levels = picked(matrix.add("DequantizeLinear", [_codes(matrix), one]))
    table = _table(matrix)
    if table is not None:
        index = matrix.add("Cast", [levels], torch.int32, to=int(ir.DataType.INT32))
        rows = _offset_rows(weight)
        offset = matrix.constant("offset", _offset(weight))
        index = matrix.add("Add", [index, picked(offset) if rows else offset], torch.int32)
        levels = matrix.add("Gather", [table, index], axis=0)
        if weight.code_bits <= 2:
            levels = _shaped(matrix, levels, rank, (matrix.columns,))
    value = _scaled(matrix, levels, picked, rank)
    return _cut(matrix, value, rank)


def _scaled(matrix: _Matrix, levels: ir.Value, picked: Callable[[ir.Value], ir.Value], rank: int) -> ir.Value:
    weight = matrix.weight
    scale = weight.scale.to(weight.dtype)
    if not weight.group:
        return matrix.add("Mul", [levels, picked(matrix.constant("row_scale", scale))])
    groups = matrix.columns // weight.group
    padded = torch.nn.functional.pad(scale, (0, groups - scale.shape[1]))
    held = picked(matrix.constant("group_scale", padded[..., None]))
    parted = _shaped(matrix, levels, rank, (groups, weight.group))
    return _shaped(matrix, matrix.add("Mul", [parted, held]), rank, (matrix.columns,))


def _shaped(matrix: _Matrix, value: ir.Value, rank: int, last: tuple[int, ...]) -> ir.Value:
    """Return a value with its first `rank` dimensions and others behind them."""
    shape = matrix.constant(f"shape.{rank}.{'x'.join(map(str, last))}", torch.tensor([0] * rank + list(last)))
    return matrix.add("Reshape", [value, shape])


def _cut(matrix: _Matrix, value: ir.Value, rank: int) -> ir.Value:
    """Return a value without the columns that were added to it."""
    k = matrix.weight.shape[1]
    if k == matrix.columns:
        return value
    ends = [
        matrix.constant(f"{key}.{rank}", torch.tensor([at])) for key, at in (("from", 0), ("to", k), ("axis", rank))
    ]
    return matrix.add("Slice", [value, *ends])


def _codes(matrix: _Matrix) -> ir.Value:
    """Return the constant of the codes, in whole columns, as signed numbers."""
    weight, name = matrix.weight, f"{matrix.name}.codes"
    codes = torch.nn.functional.pad(weight.codes, (0, matrix.columns - weight.shape[1])).to(torch.int16)
    if weight.code_bits <= 2:
        pairs = codes.reshape(weight.shape[0], -1, 2)
        return _int4(matrix.place, name, pairs[..., 0] * 4 + pairs[..., 1] + INT4[0])
    codes = codes - _middle(weight)
    return _int4(matrix.place, name, codes) if _is_int4(weight) else matrix.constant("codes", codes.to(torch.int8))


def _table(matrix: _Matrix) -> ir.Value | None:
    """Return the table that indices point into, None where codes are levels."""
    weight = matrix.weight
    if form_of(weight) not in ("indices", "pairs"):
        return None
    match weight:
        case Uniform():
            table = (torch.arange(2**weight.code_bits) - weight.zero)[None].float()
        case Codebook():
            table = weight.table.float() * weight.unit
        case _:
            assert_never(weight)
    if weight.code_bits > 2:
        return matrix.constant("table", table.flatten().to(weight.dtype))
    table = torch.nn.functional.pad(table, (0, 4 - table.shape[1]))
    first, second = table.repeat_interleave(4, 1), table.repeat(1, 4)
    return matrix.constant("pairs", torch.stack([first, second], -1).reshape(-1, 2).to(weight.dtype))


def _offset(weight: Coded) -> Tensor:
    """Return what makes a code the number of its level in all tables: one number, or one per row."""
    rows, levels = _offset_rows(weight), 16 if weight.code_bits <= 2 else 2**weight.code_bits
    if not rows:
        return torch.tensor(_middle(weight), dtype=torch.int32)
    return (torch.arange(weight.shape[0]) // rows * levels + _middle(weight)).to(torch.int32)[:, None]


def _middle(weight: Coded) -> int:
    """Return what is taken from codes to make them signed."""
    if form_of(weight) not in ("indices", "pairs"):
        assert isinstance(weight, Uniform)
        return weight.zero
    return -INT4[0] if _is_int4(weight) else -INT8[0]


def _offset_rows(weight: Coded) -> int:
    """Return how many rows share a table, 0 where all do or no table is looked up."""
    rows = weight.table_rows if isinstance(weight, Codebook) else 0
    return rows if form_of(weight) in ("indices", "pairs") else 0


def _is_int4(weight: Coded) -> bool:
    return weight.code_bits <= 4


def _held(weight: Coded) -> Coded:
    """Return a weight as its constants say it: codes that are levels where it is signed bytes."""
    rows = int8_rows(weight) if form_of(weight) == "int8" else None
    return weight if rows is None else rows


def _flat_codes(weight: Codebook, table: Tensor) -> Tensor:
    """Return the entry of an integer table that each code stands for."""
    rows = torch.arange(weight.shape[0])
    block = rows // weight.table_rows if weight.table_rows else rows * 0
    return table.to(torch.int16)[block[:, None], weight.codes.long()]


def _blocks(weight: Coded) -> int:
    """Return how many blocks of inputs have scales of their own in a DequantizeLinear of INT4."""
    if weight.group:
        return weight.scale.shape[1]
    size = next((block for block in BLOCKS if weight.shape[1] % block == 0), weight.shape[1])
    return weight.shape[1] // size


def _int4(place: Place, name: str, codes: Tensor) -> ir.Value:
    if name in place.root.initializers:
        return place.root.initializers[name]
    return place.constant(name, ir.tensor(codes.numpy().astype(ir.DataType.INT4.numpy()), name=name))


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]
