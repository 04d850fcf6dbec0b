"""What kernels take of a weight: its parts as they want them, and the reason where they do not take it.

A kernel multiplies by one matrix of codes, and adds a low rank to that product: a `Uniform`, a `Codebook`, or a `Sum`
of one of these and a `LowRank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from ..kernels import layout as kernel_layout
from ..kernels import lut_conv, onnx_ops
from ..kernels.lut_conv import ConvSpec
from ..kernels.lut_spec import BLOCK, STEP, LutParts, LutSpec, Mode
from ..kernels.lut_spec import refusal as lut_spec_refusal
from .weight import Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight

Coded: TypeAlias = Uniform | Codebook

INT8_ZERO = 128
"""Added to the entries of an int8 table: TensorRT takes no int8 constant that is not dequantized."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Terms:
    """A weight as a kernel computes it: codes, and a low rank or none."""

    base: Coded
    low: LowRank | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A standard operator of an exported file that reads floats of a weight; `part`: of some of its rows only."""

    op: str
    part: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """How a weight computes in an exported file, and the operators that read floats of it, decoded at load."""

    mode: str
    decoded_for: tuple[Reader, ...] = ()


def terms(weight: Weight) -> Terms | None:
    """Return the terms of a weight, None where it is not of that form."""
    match weight:
        case Uniform() | Codebook():
            return Terms(base=weight)
        case Sum(terms=(Uniform() | Codebook() as base, LowRank() as low)):
            return Terms(base=base, low=low)
        case _:
            return None


def lut_spec(weight: Coded) -> LutSpec:
    """Return the shape and meaning of a weight's codes."""
    n, k = weight.shape
    zero, unit, rows = 0, 1.0, 0
    match weight:
        case Uniform():
            zero = weight.zero
        case Codebook():
            unit, rows = weight.unit, weight.table_rows
            zero = INT8_ZERO if weight.table.dtype == torch.int8 else 0
        case _:
            assert_never(weight)
    bits, group = weight.code_bits, weight.group
    return LutSpec(n=n, k=k, bits=bits, group=group, table_rows=rows, zero=float(zero), unit=unit)


def lut_table(weight: Coded) -> Tensor:
    """Return the table as an operator takes it: uint8 with `zero` added, or float16."""
    if isinstance(weight, Uniform):
        return torch.arange(2**weight.code_bits).to(torch.uint8)[None]
    if weight.table.dtype == torch.int8:
        return (weight.table.to(torch.int16) + INT8_ZERO).to(torch.uint8)
    return weight.table


def lut_parts(weight: Coded) -> LutParts:
    """Return the tensors that kernels use in place."""
    spec = lut_spec(weight)
    codes, scale = kernel_layout.pack(weight.codes, spec), kernel_layout.pack_scale(weight.scale, spec)
    return LutParts(codes=codes, table=lut_table(weight), scale=scale)


def refusal(weight: Coded, mode: Mode = "exact") -> str:
    """Return why no operator of a file multiplies by a weight in a mode, "" where one does."""
    return _dtype_refusal(weight) or onnx_ops.supports(lut_spec(weight), mode, lut_table(weight).dtype)


def lookup_refusal(weight: Coded) -> str:
    """Return why no operator of a file looks rows of a weight up, "" where one does."""
    return _dtype_refusal(weight) or lut_spec_refusal(lut_spec(weight), "exact", lut_table(weight).dtype)


def int8_refusal(weight: Weight) -> str:
    """Return why a layer of this weight cannot take inputs that are rounded to int8, "" where it can."""
    match weight:
        case Dense():
            return "its weights are floats"
        case LowRank():
            return "a product of two factors is computed exactly"
        case _:
            found = terms(weight)
            return "a sum of this form has no kernel" if found is None else refusal(found.base, "int8")


def conv_parts(weight: Coded, conv: ConvSpec) -> LutParts:
    """Return the tensors that the kernel of a convolution uses in place."""
    spec = lut_conv.tap_spec(lut_spec(weight), conv)
    codes = kernel_layout.pack(lut_conv.tap_codes(weight.codes, conv), spec)
    return LutParts(codes=codes, table=lut_table(weight), scale=kernel_layout.pack_scale(weight.scale, spec))


def dynamic_refusal(weight: Weight, layout: Layout) -> str:
    """Return why a layer, a convolution too, cannot take inputs that are rounded to int8, "" where it can."""
    if layout.kind != "conv":
        return int8_refusal(weight)
    if reason := conv_shape_refusal(layout):
        return reason
    match weight:
        case Uniform() | Codebook():
            _, channels, height, width = layout.shape
            conv = ConvSpec(channels=channels, kernel=(height, width))
            return lut_conv.refusal(lut_spec(weight), conv) or refusal(weight, "int8")
        case Dense():
            return "its weights are floats"
        case _:
            return "a sum or a product of weights is not convolved in int8"


def filled(weight: Weight, layout: Layout, *, rounds: bool) -> tuple[int, int]:
    """Return rows and inputs as kernels hold the codes of a weight, whose own they are where no kernel does.

    rounds: its inputs are rounded to int8, as a convolution that a kernel takes must.
    """
    found = terms(weight)
    if found is None or layout.kind not in ("matrix", "matrix_t", "conv") or (layout.kind == "conv" and not rounds):
        return weight.shape
    spec = lut_spec(found.base)
    if layout.kind == "conv":
        _, channels, height, width = layout.shape
        spec = lut_conv.tap_spec(spec, ConvSpec(channels=channels, kernel=(height, width)))
    return kernel_layout.blocks(spec) * BLOCK, kernel_layout.steps(spec) * STEP


def conv_shape_refusal(layout: Layout) -> str:
    """Return why no weight of this layout is convolved in int8, "" where one is."""
    if layout.groups != 1:
        return f"a convolution of {layout.groups} groups has no int8 kernel"
    return "" if len(layout.shape) == 4 else f"a convolution in {len(layout.shape) - 2} dimensions has no int8 kernel"


def low_refusal(low: LowRank) -> str:
    """Return why a kernel cannot add a low rank itself, "" where it can."""
    left = low.left
    if not isinstance(left, Uniform | Codebook):
        return "the left factor is no table of codes"
    return _dtype_refusal(left) or onnx_ops.supports_left(lut_spec(left), lut_table(left).dtype)


def decoded_because(weight: Weight, layout: Layout, readers: Sequence[Reader]) -> str:
    """Return why operators of a file read a weight as floats, which are decoded when the file is loaded."""
    return "; ".join(dict.fromkeys(_because(weight, layout, reader) for reader in readers)) or "nothing reads it packed"


def _because(weight: Weight, layout: Layout, reader: Reader) -> str:
    match reader.op:
        case "ConvTranspose":
            return "transposed convolutions have no kernel"
        case "Conv" if layout.kind == "conv_transpose":  # the left factor of a product, which is 1x1
            return "transposed convolutions have no kernel"
        case "Conv":
            return dynamic_refusal(weight, layout) or "exact convolutions have no kernel, activations: dynamic has one"
        case "GRU" | "LSTM" | "RNN":
            return "recurrent layers have no kernel"
        case _ if reader.part:
            return f"{reader.op} reads a part of it"
        case "Gather":
            if not isinstance(weight, Uniform | Codebook):
                return "rows of a sum or a product have no kernel"
            return lookup_refusal(weight) or "what looks it up is no embedding"
        case "MatMul" | "Gemm":
            reasons = [reason for coded in _coded(weight) if (reason := refusal(coded))]
            return reasons[0] if reasons else "what multiplies it is no linear layer"
        case _:
            return f"{reader.op} reads it, which has no kernel"


def _dtype_refusal(weight: Coded) -> str:
    return "" if weight.dtype in DTYPES else f"{str(weight.dtype).removeprefix('torch.')} has no kernel"


def _coded(weight: Weight) -> list[Coded]:
    match weight:
        case Dense():
            return []
        case Uniform() | Codebook():
            return [weight]
        case LowRank():
            return [*_coded(weight.left), *_coded(weight.right)]
        case Sum():
            return [part for term in weight.terms for part in _coded(term)]
        case _:
            assert_never(weight)
