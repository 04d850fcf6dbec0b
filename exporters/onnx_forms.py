"""How coded weights stand in an ONNX graph: as inputs of our operators (`Portable`), or as a target wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from ..kernels.lut_spec import Activation, LutParts, Mode
from ..kernels.onnx_ops import DECODE, GATHERS, linear_op, onnx_attributes
from ..kernels.pack import pack as pack_rows
from ..optimizer import packed
from ..optimizer.packed import Coded
from .onnx_place import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class LowTerm:
    """A low rank that an operator adds: R x, and the left factor."""

    inner: ir.Value
    left: Coded
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product by codes as one operator: what it multiplies, and what follows it."""

    x: ir.Value
    weight: Coded
    name: str
    mode: Mode
    bias: ir.Value | None = None
    activation: Activation = ""
    low: LowTerm | None = None


class Forms(Protocol):
    """What stands in a graph for a coded weight.

    refusal: why no operator multiplies by its codes, "" where one does; likewise lookup_refusal of looking rows up.
    multiplied: the result of such an operator. decoded: the matrix (out, in) as floats. looked_up: the rows of it that
    `rows` numbers.
    """

    def refusal(self, weight: Coded, mode: Mode) -> str: ...

    def lookup_refusal(self, weight: Coded) -> str: ...

    def multiplied(self, place: Place, product: Product) -> ir.Value: ...

    def decoded(self, place: Place, weight: Coded, name: str) -> ir.Value: ...

    def looked_up(self, place: Place, weight: Coded, name: str, rows: ir.Value) -> ir.Value: ...


class Portable:
    """The operators of `kernels/onnx_ops.py`, whose bodies any runtime runs."""

    def refusal(self, weight: Coded, mode: Mode) -> str:
        return packed.refusal(weight, mode)

    def lookup_refusal(self, weight: Coded) -> str:
        return packed.lookup_refusal(weight)

    def multiplied(self, place: Place, product: Product) -> ir.Value:
        weight, low = product.weight, product.low
        spec, left = packed.lut_spec(weight), None if low is None else packed.lut_spec(low.left)
        op = linear_op(spec, mode=product.mode, activation=product.activation, left=left)
        bias = no_bias(place, weight.dtype) if product.bias is None else product.bias
        inputs = [product.x, *parts(place, weight, product.name), bias]
        if low is not None:
            inputs += [low.inner, *parts(place, low.left, low.name)]
        attributes = onnx_attributes(op.name, spec, int(from_torch_dtype(weight.dtype)), left)
        return place.add(op.name, inputs, weight.dtype, attributes)

    def decoded(self, place: Place, weight: Coded, name: str) -> ir.Value:
        """Return the matrix by `LutDecode`, which any runtime folds to floats when it loads the file."""
        codes = place.initializer(f"{name}.codes", pack_rows(weight.codes, weight.code_bits))
        table = place.initializer(f"{name}.table", packed.lut_table(weight))
        scale = place.initializer(f"{name}.scale", weight.scale)
        attributes = onnx_attributes(DECODE, packed.lut_spec(weight), int(from_torch_dtype(weight.dtype)))
        return place.add(DECODE, [codes, table, scale], weight.dtype, attributes)

    def looked_up(self, place: Place, weight: Coded, name: str, rows: ir.Value) -> ir.Value:
        inputs = [place.cast(rows, torch.int64), *parts(place, weight, name)]
        dtype = int(from_torch_dtype(weight.dtype))
        attributes = onnx_attributes(GATHERS[dtype], packed.lut_spec(weight), dtype)
        return place.add(GATHERS[dtype], inputs, weight.dtype, attributes)


def parts(place: Place, weight: Coded, name: str) -> list[ir.Value]:
    """Return codes, table and scale as kernels use them in place; made once for all that reads them."""
    return held(place, name, lambda: packed.lut_parts(weight))


def held(place: Place, name: str, make: Callable[[], LutParts]) -> list[ir.Value]:
    """Return the initializers of a weight that kernels use in place; made once for all that reads them."""
    names = c16_names(name)
    if names[0] not in place.root.initializers:
        return [place.initializer(*item) for item in named(name, make()).items()]
    return [place.root.initializers[known] for known in names]


def c16_names(name: str) -> tuple[str, str, str]:
    return f"{name}.c16.codes", f"{name}.table", f"{name}.c16.scale"


def named(name: str, made: LutParts) -> dict[str, Tensor]:
    """Return the tensors that kernels use in place, by their names in a file."""
    return dict(zip(c16_names(name), (made.codes, made.table, made.scale), strict=True))


def no_bias(place: Place, dtype: torch.dtype) -> ir.Value:
    return place.initializer(f"no_bias.{str(dtype).removeprefix('torch.')}", torch.zeros(1, dtype=dtype))
