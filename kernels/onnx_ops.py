"""The ONNX operators of domain "paredown": their names, and the attributes that describe a weight.

    LutDecode(codes, table, scale) -> W               layout "rows", the stream of pack.py; never in our library
    LutGather[Float16|Bfloat16](indices, codes, table, scale) -> W[indices]                    layout "c16"
    LutLinear(x, codes, table, scale, bias[, t, left_codes, left_table, left_scale]) -> y      layout "c16"
    Lut[Planes]ConvInt8[Relu](x, codes, table, scale, bias) -> y              layout "c16" of the matrix of lut_conv.py

y = act(x W^T + t L^T + bias). Each form of LutLinear is an operator of its own, because a function body cannot switch
on a string: `Lut[Planes]Linear[Int8][LowRank][Relu|Gelu|GeluTanh|Silu]`, Planes for codes of 3 bits. x, bias, t and y
have one type of float; bias is (n) or one 0. A file carries every operator that it uses as a function of standard
operators (onnx_bodies.py), so that it runs in any runtime; a runtime that has our library uses a kernel instead.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeAlias

import torch

from . import layout
from .lut_conv import ConvSpec
from .lut_spec import ACTIVATIONS, BLOCK, MODES, RUN, STEP, Activation, LutSpec, Mode, refusal
from .pack import word

DOMAIN, VERSION = "paredown", 1
DECODE, GATHER = "LutDecode", "LutGather"
GATHERS = {1: GATHER, 10: f"{GATHER}Float16", 16: f"{GATHER}Bfloat16"}
"""ONNX element type of W -> name: onnxruntime infers an output's type from those of inputs, and no input has W's."""

Attributes: TypeAlias = dict[str, int | float | str | list[int]]

ONE_PLANE = (1, 2, 4, 8)
_SUFFIX: dict[Activation, str] = {"": "", "relu": "Relu", "gelu": "Gelu", "gelu_tanh": "GeluTanh", "silu": "Silu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearOp:
    """One form of LutLinear; `planes` = codes of 3 bits, in a plane of 2 and one of 1."""

    mode: Mode = "exact"
    activation: Activation = ""
    low_rank: bool = False
    planes: bool = False

    @property
    def name(self) -> str:
        parts = ("Planes", self.planes), ("Linear", True), ("Int8", self.mode == "int8"), ("LowRank", self.low_rank)
        return "Lut" + "".join(part for part, held in parts if held) + _SUFFIX[self.activation]

    @property
    def inputs(self) -> tuple[str, ...]:
        left = ("t", "left_codes", "left_table", "left_scale") if self.low_rank else ()
        return ("x", "codes", "table", "scale", "bias", *left)


LINEAR_OPS: dict[str, LinearOp] = {
    op.name: op
    for mode, activation, low_rank, planes in itertools.product(MODES, ACTIVATIONS, (False, True), (False, True))
    for op in (LinearOp(mode=mode, activation=activation, low_rank=low_rank, planes=planes),)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvOp:
    """One form of LutConvInt8; `planes` = codes of 3 bits, in a plane of 2 and one of 1."""

    relu: bool = False
    planes: bool = False

    @property
    def name(self) -> str:
        return f"Lut{'Planes' if self.planes else ''}ConvInt8{'Relu' if self.relu else ''}"


CONV_OPS: dict[str, ConvOp] = {
    op.name: op
    for relu, planes in itertools.product((False, True), (False, True))
    for op in (ConvOp(relu=relu, planes=planes),)
}
ONNX_OPS: tuple[str, ...] = (DECODE, *GATHERS.values(), *LINEAR_OPS, *CONV_OPS)


def linear_op(
    spec: LutSpec, *, mode: Mode = "exact", activation: Activation = "", left: LutSpec | None = None
) -> LinearOp:
    """Return the form of LutLinear for a weight, with `left` for the left factor of its low-rank term."""
    if left is not None and left.bits not in ONE_PLANE:
        raise ValueError(f"a left factor of {left.bits} bits has no operator; use 1, 2, 4 or 8")
    if spec.bits not in (*ONE_PLANE, 3):
        raise ValueError(f"{spec.bits} bits have no operator; use 1, 2, 3, 4 or 8")
    return LinearOp(mode=mode, activation=activation, low_rank=left is not None, planes=spec.bits == 3)


def supports(spec: LutSpec, mode: Mode, table: torch.dtype) -> str:
    """Return "" if a linear layer with this weight, of tables of this type, can be a LutLinear, else the reason."""
    if spec.bits not in (*ONE_PLANE, 3):
        return f"{spec.bits} bits have no operator"
    return refusal(spec, mode, table)


def supports_left(spec: LutSpec, table: torch.dtype) -> str:
    """Return "" if this weight can be the left factor of a LutLinear...LowRank, else the reason."""
    if spec.bits not in ONE_PLANE:
        return f"a left factor of {spec.bits} bits has no operator"
    return refusal(spec, "exact", table)


def onnx_attributes(op: str, spec: LutSpec, dtype: int, left: LutSpec | None = None) -> Attributes:
    """Return the attributes of a node; `dtype` is the ONNX element type of x and y (of W where there is no x).

    Kernels read what names the weight and its layout; the rest saves the portable body arithmetic on shapes.
    """
    if op == DECODE:
        return _weight(spec) | {"layout": "rows", "dtype": dtype} | _rows(spec)
    if op in GATHERS.values():
        return _weight(spec) | {"layout": "c16", "dtype": dtype} | _blocks(spec) | _one_row(spec) | _parts(spec)
    form = LINEAR_OPS[op]
    if form.low_rank != (left is not None) or form.planes != (spec.bits == 3):
        raise ValueError(f"{op} is not the operator of a weight of {spec.bits} bits and left factor {left}")
    found = _weight(spec) | {"layout": "c16", "dtype": dtype} | _blocks(spec) | _fields(spec)
    if form.mode == "int8":
        found |= _runs(spec)
    if left is not None:
        found |= {f"left_{key}": value for key, value in (_weight(left) | _blocks(left) | _fields(left)).items()}
        found["rank"] = left.k
    return found


def conv_attributes(spec: LutSpec, dtype: int, conv: ConvSpec) -> Attributes:
    """Return the attributes of a LutConvInt8; `spec` describes the matrix that the kernel multiplies by."""
    (height, width), (top, left, bottom, right) = conv.kernel, conv.pads
    found = _weight(spec) | {"layout": "c16", "dtype": dtype} | _blocks(spec) | _fields(spec)
    found |= {"channels": conv.channels, "kernel_h": height, "kernel_w": width}
    found |= {"stride_h": conv.stride[0], "stride_w": conv.stride[1]}
    found |= {"dilation_h": conv.dilation[0], "dilation_w": conv.dilation[1]}
    found |= {"pad_top": top, "pad_left": left, "pad_bottom": bottom, "pad_right": right}
    of_body = {"strides": list(conv.stride), "dilations": list(conv.dilation), "pads": list(conv.pads)}
    return found | of_body | {"taps": [height, width, conv.filled_channels, spec.n]}


def _weight(spec: LutSpec) -> Attributes:
    return {
        "n": spec.n,
        "k": spec.k,
        "bits": spec.bits,
        "group": spec.group,
        "table_rows": spec.table_rows,
        "zero": spec.zero,
        "unit": spec.unit,
    }


def _rows(spec: LutSpec) -> Attributes:
    """What each byte and each code of a word of the canonical stream count."""
    size, per_word = word(spec.bits)
    place = [256**byte for byte in range(size)]
    return {"levels": 2**spec.bits, "place": place, "divisor": [2 ** (spec.bits * code) for code in range(per_word)]}


def _blocks(spec: LutSpec) -> Attributes:
    """The shape of the codes and of what they decode to, and what a group and a table take of it."""
    rows, steps = layout.blocks(spec), layout.steps(spec)
    return {
        "blocks": rows,
        "steps": steps,
        "units": [rows, steps, spec.bits, BLOCK, 4],
        "group_columns": spec.group_columns,
        "group_steps": layout.group_steps(spec),
        "group_padding": layout.group_steps(spec) * STEP - spec.group_columns,
        "table_blocks": spec.table_rows // BLOCK or rows,
    }


def _one_row(spec: LutSpec) -> Attributes:
    """The shapes of the bytes, scales and codes of rows, one after another."""
    rows, steps = layout.blocks(spec) * BLOCK, layout.steps(spec)
    return {
        "row_bytes": [rows, steps * spec.bits * 4],
        "row_units": [-1, steps, spec.bits, 4],
        "row_codes": [-1, steps * STEP],
        "row_groups": [rows, spec.scale_shape[1]],
    }


def _fields(spec: LutSpec) -> Attributes:
    """By what to divide a byte to get each of its codes; codes of 3 bits have it in their body."""
    filled = [layout.steps(spec) * STEP, layout.blocks(spec) * BLOCK]
    if spec.bits == 3:
        return {"filled": filled}
    return {"filled": filled, "levels": 2**spec.bits, "divisor": [2**below for below in range(0, 8, spec.bits)]}


def _runs(spec: LutSpec) -> Attributes:
    """The runs of inputs that share a scale in int8 mode."""
    run = min(RUN, spec.group_columns)
    full, rest = divmod(spec.k, spec.group_columns)
    of_group = -(-spec.group_columns // run)
    return {"run_length": run, "group_runs": of_group, "runs": full * of_group + -(-rest // run)}


def _parts(spec: LutSpec) -> Attributes:
    """What each unit of a step adds to the 8 codes of a byte's column: value // divisor % modulus * place."""
    divisor, modulus, place, below = [], [], [], 0
    for width in layout.planes(spec.bits):
        fields = 8 // width
        for unit in range(width):
            mine = range(unit * fields, (unit + 1) * fields)
            divisor += [2 ** (width * (j - mine.start)) if j in mine else 1 for j in range(8)]
            modulus += [2**width] * 8
            place += [2**below if j in mine else 0 for j in range(8)]
        below += width
    return {"levels": 2**spec.bits, "divisor": divisor, "modulus": modulus, "place": place}
