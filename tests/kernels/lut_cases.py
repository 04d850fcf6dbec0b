"""Weights of every form for the tests of operators, and what their products are, in numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from paredown.kernels import layout
from paredown.kernels.lut_spec import LutParts, LutSpec

Float64 = NDArray[np.float64]
BYTES = (128.0, 1 / 127)
"""`zero` and `unit` of a table of signed bytes."""

SPECS = [
    LutSpec(n=7, k=13, bits=3, zero=128.0, unit=1 / 127),
    LutSpec(n=33, k=30, bits=4, group=8, table_rows=16),
    LutSpec(n=5, k=300, bits=8, group=150, zero=100.0, unit=1 / 100),
    LutSpec(n=40, k=70, bits=2, group=32, table_rows=32, zero=128.0, unit=1 / 127),
    LutSpec(n=50, k=260, bits=3, group=0, table_rows=16, zero=128.0, unit=1 / 127),
    LutSpec(n=1, k=1, bits=4),
    LutSpec(n=6, k=3, bits=1, zero=128.0, unit=1 / 127),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One weight: its parts, its codes and W as numpy decodes it, in float32."""

    spec: LutSpec
    parts: LutParts
    codes: torch.Tensor
    weight: NDArray[np.float32]


@st.composite
def specs(draw: st.DrawFn, bits: tuple[int, ...] = (1, 2, 3, 4, 8)) -> LutSpec:
    n, k = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    group, table_rows = draw(st.integers(0, k)), draw(st.sampled_from([0, 16, 32]))
    zero, unit = draw(st.sampled_from([BYTES, (0.0, 1.0), (7.0, 1.0)]))
    return LutSpec(n=n, k=k, bits=draw(st.sampled_from(bits)), group=group, table_rows=table_rows, zero=zero, unit=unit)


def case(spec: LutSpec, seed: int = 0) -> Case:
    """Return a weight with a table of bytes if `zero` is not 0, else of float16."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=generator, dtype=torch.uint8)
    table = torch.randn(spec.table_shape, generator=generator).half()
    if spec.zero:
        table = torch.randint(0, 256, spec.table_shape, generator=generator, dtype=torch.uint8)
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    scale = torch.randn(spec.scale_shape, generator=generator).to(dtype)
    parts = LutParts(codes=layout.pack(codes, spec), table=table, scale=layout.pack_scale(scale, spec))
    return Case(spec=spec, parts=parts, codes=codes, weight=_decode(spec, codes.numpy(), table, scale))


def _decode(spec: LutSpec, codes: NDArray[np.uint8], table: torch.Tensor, scale: torch.Tensor) -> NDArray[np.float32]:
    rows, columns = np.arange(spec.n)[:, None], np.arange(spec.k)
    of_row = rows // spec.table_rows if spec.table_rows else rows * 0
    of_column = columns // spec.group if spec.group else columns * 0
    entries = table.float().numpy()[of_row, codes]
    return (entries - np.float32(spec.zero)) * np.float32(spec.unit) * scale.float().numpy()[rows, of_column]


def rounded(x: NDArray[np.float32], spec: LutSpec) -> NDArray[np.float32]:
    """Return x (m, k) rounded to signed bytes and back, run by run."""
    f, out = np.float32, np.zeros_like(x)
    width = spec.group or spec.k
    for group in range(0, spec.k, width):
        end = min(group + width, spec.k)
        for start in range(group, end, 128):
            run = x[:, start : min(start + 128, end)]
            for row, values in enumerate(run):
                most = np.abs(values).max()
                with np.errstate(over="ignore", divide="ignore"):
                    factor = f(127) / most
                if np.isfinite(factor):
                    whole = np.rint(values * factor)
                    out[row, start : start + len(values)] = whole * (most / f(127))
    return out


def activate(y: Float64, activation: str) -> Float64:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    match activation:
        case "relu":
            return np.maximum(y, 0)
        case "gelu":
            return y * (1 + erf(y / math.sqrt(2))) / 2
        case "gelu_tanh":
            return y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
        case "silu":
            return y * (1 + np.tanh(y / 2)) / 2
        case _:
            return y
