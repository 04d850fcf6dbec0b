"""What one weight stored as codes into a table is: its sizes, its tensors, and how its products are computed.

    W[r, c] = (table[r // table_rows, code[r, c]] - zero) * unit * scale[r, c // group]

computed in float32, in this order. A table is uint8 or float16: TensorRT takes no int8 constant that is not dequantized
(TensorRT-RTX 1.7.1), so entries -127..127 are stored with 128 added and `zero` = 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Mode: TypeAlias = Literal["exact", "int8"]
"""exact: sums in float32. int8: inputs rounded to signed bytes at run time, sums of a run in int32."""

Activation: TypeAlias = Literal["", "relu", "gelu", "gelu_tanh", "silu"]
MODES: tuple[Mode, ...] = ("exact", "int8")
ACTIVATIONS: tuple[Activation, ...] = ("", "relu", "gelu", "gelu_tanh", "silu")

BLOCK, STEP, RUN = 16, 32, 128
"""Rows of a block, inputs of a step, and the most inputs that share a scale in int8 mode (cpu/paredown.h)."""

MOST = 1 << 40
"""Sizes above this could overflow a count of bytes (cpu/weight.cpp)."""

LEAST = 3.73219479e-37
"""A run whose largest input is smaller counts as zeros: 127 divided by it is no float32."""


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
        if min(self.n, self.k) < 1 or min(self.group, self.table_rows) < 0 or self.table_rows > MOST:
            raise ValueError(f"({self.n}, {self.k}), group={self.group}, table_rows={self.table_rows} is no weight")

    @property
    def table_shape(self) -> tuple[int, int]:
        return math.ceil(self.n / self.table_rows) if self.table_rows else 1, 2**self.bits

    @property
    def scale_shape(self) -> tuple[int, int]:
        return self.n, math.ceil(self.k / self.group) if self.group else 1

    @property
    def group_columns(self) -> int:
        """Inputs of a full group."""
        return self.group or self.k


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LutParts:
    """The tensors of one weight in layout "c16"."""

    codes: UInt8[Tensor, "bytes"]
    table: UInt8[Tensor, "tables levels"] | Float[Tensor, "tables levels"]
    scale: Float[Tensor, "blocks groups 16"]


def refusal(spec: LutSpec, mode: Mode, table: torch.dtype) -> str:
    """Return "" if a weight with such a table can be multiplied in this mode, else the reason."""
    if spec.table_rows % BLOCK:
        return f"each table serves {spec.table_rows} rows, kernels take multiples of {BLOCK}"
    if mode == "int8" and table != torch.uint8:
        return f"int8 products need a table of bytes, this one is {table}".replace("torch.", "")
    if mode == "int8" and spec.zero not in range(256):
        return f"int8 products need a whole zero point of 0 to 255, this one is {spec.zero:g}"
    return ""
