"""`paredown::lut_linear`: multiply by a weight that is stored as codes into a table.

    W[r, c] = (table[r // table_rows, code[r, c]] - zero) * unit * scale[r, c // group]          y = x W^T

The same op exists twice: here for torch, and as the ONNX operator `paredown::LutLinear` (`LutDecode` gives W alone, for
convolutions and embeddings). An ONNX file carries both as functions of standard operators, so that it runs in any
runtime; a runtime that has our library uses a kernel instead. W is computed in float32, in the order above, and
rounded once: torch, ONNX and `Weight.dense()` agree bit for bit.

A table is uint8 or float16: TensorRT takes no int8 constant that is not dequantized (TensorRT-RTX 1.7.1), so entries
-127..127 are stored with 128 added and `zero` = 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from . import pack as packing

if TYPE_CHECKING:
    import onnx

DOMAIN, VERSION = "paredown", 1
OnnxOp: TypeAlias = Literal["LutDecode", "LutLinear"]
ONNX_OPS: tuple[OnnxOp, ...] = ("LutDecode", "LutLinear")


@dataclass(frozen=True, slots=True, kw_only=True)
class LutSpec:
    """The shape and meaning of one weight (n, k); `group` 0 = one scale per row, `table_rows` 0 = one table."""

    n: int
    k: int
    bits: int
    group: int = 0
    table_rows: int = 0
    zero: float = 0.0
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is out of range; use 1 to 8")
        if min(self.n, self.k) < 1 or min(self.group, self.table_rows) < 0:
            raise ValueError(f"({self.n}, {self.k}), group={self.group}, table_rows={self.table_rows} is no weight")

    @property
    def table_shape(self) -> tuple[int, int]:
        return math.ceil(self.n / self.table_rows) if self.table_rows else 1, 2**self.bits

    @property
    def scale_shape(self) -> tuple[int, int]:
        return self.n, math.ceil(self.k / self.group) if self.group else 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LutParts:
    """The tensors of one weight; `codes` as `pack` left them."""

    codes: UInt8[Tensor, "bytes"]
    table: UInt8[Tensor, "blocks levels"] | Float[Tensor, "blocks levels"]
    scale: Float[Tensor, "n groups"]


def pack(codes: UInt8[Tensor, "n k"], bits: int) -> UInt8[Tensor, "bytes"]:
    """Return codes in the layout of the op, "rows": the stream of `kernels.pack`."""
    return packing.pack(codes, bits)


def supports(spec: LutSpec, dtype: torch.dtype) -> str:
    """Return "" if a weight of this spec can multiply activations of `dtype`, else the reason."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return f"activations of {dtype} are not floating point"
    return ""


def lut_linear(x: Float[Tensor, "... k"], parts: LutParts, spec: LutSpec) -> Float[Tensor, "... n"]:
    """Return x W^T by the best kernel that is loaded; ValueError where tensors and spec do not fit."""
    sizes = (spec.n, spec.k, spec.bits, spec.group, spec.table_rows)
    product: Tensor = torch.ops.paredown.lut_linear(
        x, parts.codes, parts.table, parts.scale, *sizes, spec.zero, spec.unit
    )
    return product


def reference(x: Float[Tensor, "... k"], parts: LutParts, spec: LutSpec) -> Float[Tensor, "... n"]:
    """Return x W^T in plain torch: W rounded to the dtype of x, then a matrix product."""
    return x @ decode(parts, spec).to(x.dtype).T


def decode(parts: LutParts, spec: LutSpec) -> Float[Tensor, "n k"]:
    """Return W in float32."""
    codes = packing.unpack(parts.codes, spec.bits, (spec.n, spec.k)).long()
    rows = torch.arange(spec.n, device=codes.device)
    block = rows // (spec.table_rows or spec.n)
    table = (parts.table.float() - spec.zero) * torch.tensor(spec.unit)
    columns = torch.arange(spec.k, device=codes.device) // (spec.group or spec.k)
    return table.flatten()[codes + block[:, None] * 2**spec.bits] * parts.scale.float()[:, columns]


def onnx_attributes(spec: LutSpec, dtype: int) -> dict[str, int | float | str | list[int]]:
    """Return the attributes of a node; `dtype` is the ONNX element type of W (and of x and y).

    `place` and `divisor` tell the portable body what each byte and each code of a word count; kernels use `bits`.
    """
    size, per_word = packing.word(spec.bits)
    return {
        "n": spec.n,
        "k": spec.k,
        "bits": spec.bits,
        "group": spec.group,
        "table_rows": spec.table_rows,
        "zero": spec.zero,
        "unit": spec.unit,
        "layout": "rows",
        "dtype": dtype,
        "levels": 2**spec.bits,
        "place": [256**byte for byte in range(size)],
        "divisor": [2 ** (spec.bits * code) for code in range(per_word)],
    }


def onnx_function(op: OnnxOp, opset: int) -> onnx.FunctionProto:
    """Return the portable body of an operator; one body serves every width, group and table through its attributes."""
    import onnx.parser

    inputs, outputs, tail = {
        "LutDecode": ("codes, table, scale", "W", ""),
        "LutLinear": ("x, codes, table, scale", "y", _PRODUCT),
    }[op]
    names = ", ".join(onnx_attributes(LutSpec(n=1, k=1, bits=1), 1))
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{op} <{names}> ({inputs}) => ({outputs}) {{'
    return onnx.parser.parse_function(text + _DECODE + tail + "}")


# What a byte adds to each code of its word is looked up (`parts`: 256 rows for each byte of a word, from the attributes
# alone) and the bytes of a word are added: no shifts or masks, which TensorRT has not, and few passes over the weights,
# because onnxruntime folds the body at load and keeps each pass in memory (4096 x 4096 at 4 bits: 2.6 s and 855 MB;
# dividing and subtracting code by code took 4.0 s and 1110 MB). int32: onnxruntime 1.31 sums int64 in double.
_DECODE = """
    minus_one = Constant <value_ints = [-1]> ()
    zero_1d = Constant <value_ints = [0]> ()
    one_1d = Constant <value_ints = [1]> ()
    last_two = Constant <value_ints = [1, 2]> ()
    outer_two = Constant <value_ints = [0, 2]> ()
    zero_0d = Constant <value_int = 0> ()
    one_0d = Constant <value_int = 1> ()
    bytes = Constant <value_int = 256> ()
    n = Constant <value_int: int = @n> ()
    k = Constant <value_int: int = @k> ()
    levels = Constant <value_int: int = @levels> ()
    place = Constant <value_ints: ints = @place> ()
    divisor = Constant <value_ints: ints = @divisor> ()

    place_column = Unsqueeze (place, last_two)
    byte_values = Range (zero_0d, bytes, one_0d)
    byte_row = Unsqueeze (byte_values, outer_two)
    placed = Mul (place_column, byte_row)
    shifted = Div (placed, divisor)
    above = Div (shifted, levels)
    above_part = Mul (above, levels)
    parts_64 = Sub (shifted, above_part)
    parts_32 = Cast <to = 6> (parts_64)
    per_word = Shape (divisor)
    parts_shape = Concat <axis = 0> (minus_one, per_word)
    parts = Reshape (parts_32, parts_shape)

    word_bytes = Shape (place)
    words_shape = Concat <axis = 0> (minus_one, word_bytes)
    bytes_32 = Cast <to = 6> (codes)
    words = Reshape (bytes_32, words_shape)
    word_bytes_0d = Squeeze (word_bytes)
    position = Range (zero_0d, word_bytes_0d, one_0d)
    position_64 = Mul (position, bytes)
    position_32 = Cast <to = 6> (position_64)
    part = Add (words, position_32)
    added = Gather <axis = 0> (parts, part)
    digits = ReduceSum <keepdims = 0> (added, one_1d)
    stream = Reshape (digits, minus_one)
    count = Mul (n, k)
    count_1d = Reshape (count, one_1d)
    taken = Slice (stream, zero_1d, count_1d)
    n_1d = Reshape (n, one_1d)
    k_1d = Reshape (k, one_1d)
    shape = Concat <axis = 0> (n_1d, k_1d)
    code = Reshape (taken, shape)

    table_rows = Constant <value_int: int = @table_rows> ()
    one_table = Equal (table_rows, zero_0d)
    block_rows = Where (one_table, n, table_rows)
    row = Range (zero_0d, n, one_0d)
    block = Div (row, block_rows)
    offset_64 = Mul (block, levels)
    offset_1d = Cast <to = 6> (offset_64)
    offset = Unsqueeze (offset_1d, one_1d)
    index = Add (code, offset)
    zero = Constant <value_float: float = @zero> ()
    unit = Constant <value_float: float = @unit> ()
    table_float = Cast <to = 1> (table)
    table_centred = Sub (table_float, zero)
    table_values = Mul (table_centred, unit)
    table_flat = Reshape (table_values, minus_one)
    values = Gather <axis = 0> (table_flat, index)

    group = Constant <value_int: int = @group> ()
    one_group = Equal (group, zero_0d)
    group_columns = Where (one_group, k, group)
    column = Range (zero_0d, k, one_0d)
    column_group = Div (column, group_columns)
    scale_float = Cast <to = 1> (scale)
    scales = Gather <axis = 1> (scale_float, column_group)
    W_float = Mul (values, scales)
    W = Cast <to: int = @dtype> (W_float)
"""
_PRODUCT = """
    W_t = Transpose <perm = [1, 0]> (W)
    y = MatMul (x, W_t)
"""

_SCHEMA = (
    "lut_linear(Tensor x, Tensor codes, Tensor table, Tensor scale, int n, int k, int bits, int group, int table_rows, "
    "float zero, float unit) -> Tensor"
)


def _run(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, *numbers: Any) -> Tensor:
    parts, spec = LutParts(codes=codes, table=table, scale=scale), _spec(*numbers)
    _check(x, parts, spec)
    return reference(x, parts, spec)


def _fake(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, *numbers: Any) -> Tensor:
    parts, spec = LutParts(codes=codes, table=table, scale=scale), _spec(*numbers)
    _check(x, parts, spec)
    return x.new_empty((*x.shape[:-1], spec.n))


def _spec(n: int, k: int, bits: int, group: int, table_rows: int, zero: float, unit: float) -> LutSpec:
    return LutSpec(n=n, k=k, bits=bits, group=group, table_rows=table_rows, zero=zero, unit=unit)


def _check(x: Shaped[Tensor, "..."], parts: LutParts, spec: LutSpec) -> None:
    if reason := supports(spec, x.dtype):
        raise ValueError(f"lut_linear: {reason}")
    if x.shape[-1] != spec.k:
        raise ValueError(f"lut_linear: x has {x.shape[-1]} columns, the weight ({spec.n}, {spec.k}) takes {spec.k}")
    wanted: tuple[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]], ...] = (
        ("codes", parts.codes, (packing.packed_bytes(spec.n * spec.k, spec.bits),), (torch.uint8,)),
        ("table", parts.table, spec.table_shape, (torch.uint8, torch.float16)),
        ("scale", parts.scale, spec.scale_shape, (torch.float16, torch.bfloat16, torch.float32)),
    )
    for name, tensor, shape, dtypes in wanted:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            have = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"lut_linear: {name} is {have}, must be {' or '.join(map(str, dtypes))} {shape}")


_LIBRARY: Any = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("lut_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake(f"{DOMAIN}::lut_linear", _fake, lib=_LIBRARY)
