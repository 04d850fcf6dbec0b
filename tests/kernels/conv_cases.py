"""Calls of the int8 convolution for programs on other processors: float64 answers and bounds, all in numpy."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .cpu_cases import BF16, F16, F32, HALF_ULP, SIZE, Answer, Sizes, blob, isas, nearest, packed_values, random_weight

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv:
    """One call; the names are those of `paredown_conv`."""

    n: int = 20
    channels: int = 6
    size: tuple[int, int] = (9, 14)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    bits: int = 4
    batch: int = 1
    type: int = F32
    relu: bool = False
    bias: bool = True
    threads: int = 1
    table_rows: int = 0
    zero: float = 128.0
    seed: int = 0

    @property
    def weight(self) -> Sizes:
        k = self.kernel[0] * self.kernel[1] * (-(-self.channels // 4) * 4)
        return Sizes(n=self.n, k=k, bits=self.bits, table_rows=self.table_rows, zero=self.zero)

    @property
    def outputs(self) -> tuple[int, int]:
        top, left, bottom, right = self.pad
        room = (self.size[0] + top + bottom, self.size[1] + left + right)
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        height, width = ((r - reach[i]) // self.stride[i] + 1 for i, r in enumerate(room))
        return height, width


def run(program: Sequence[str], cases: Sequence[Conv], folder: Path) -> dict[str, list[Floats]]:
    """Return what the harness, started by `program`, gives for each case with each instruction set it has."""
    names = isas(program)
    (folder / "calls").write_bytes(b"".join(build(case)[0] for case in cases))
    subprocess.run([*program, folder / "calls", folder / "results", *names], check=True, timeout=1200)
    stream = memoryview((folder / "results").read_bytes())
    out: dict[str, list[Floats]] = {}
    for name in names:
        out[name] = []
        for case in cases:
            size = case.batch * case.n * case.outputs[0] * case.outputs[1] * SIZE[case.type]
            (status,) = struct.unpack_from("<i", stream)
            assert status == 0, (name, case, status)
            out[name].append(_read(bytes(stream[4 : 4 + size]), case))
            stream = stream[4 + size :]
    assert len(stream) == 0
    return out


def misses(cases: Sequence[Conv], found: dict[str, list[Floats]]) -> Iterator[str]:
    """Describe each case whose result is out of bounds for an instruction set."""
    for i, case in enumerate(cases):
        _, answer = build(case)
        for name, results in found.items():
            error = np.abs(results[i] - answer.y)
            if not (error <= answer.bound).all():
                yield f"{name}: {np.nanmax(error / answer.bound):.3g} times the bound: {case}"


def build(case: Conv) -> tuple[bytes, Answer]:
    """Return a case as the harness reads it, and its answer."""
    rng = np.random.default_rng(case.seed)
    stored, matrix = random_weight(case.weight, rng)
    w = matrix.reshape(case.n, *case.kernel, -1)[..., : case.channels]
    x = nearest(rng.standard_normal((case.batch, case.channels, *case.size)), case.type)
    bias = nearest(rng.standard_normal(case.n), case.type) if case.bias else None
    count = case.batch * case.n * case.outputs[0] * case.outputs[1] * SIZE[case.type]
    sizes = (case.batch, case.channels, *case.size, *case.kernel, *case.stride, *case.dilation, *case.pad)
    head = struct.pack("<18q", *sizes, case.type, int(case.relu), case.threads, count)
    call = stored + head + blob(packed_values(x, case.type)) + blob(packed_values(bias, case.type))
    sums = convolved(rounded(x), w, case)
    added = np.zeros(case.n) if bias is None else bias
    y = sums + added[:, None, None]
    # Sums are exact; they become a float, the three factors are multiplied, and the bias is added.
    bound = HALF_ULP[F32] * (6 * np.abs(sums) + 2 * np.abs(y))
    bound += HALF_ULP[case.type] * (np.abs(y) + bound) + {F16: 2.0**-25, BF16: 1e-38, F32: 1e-38}[case.type]
    return call, Answer(np.maximum(y, 0) if case.relu else y, bound)


def rounded(x: Floats) -> Floats:
    """Return images rounded to int8 as paredown.h says."""
    single = x.astype(np.float32)
    largest = np.abs(single).max(axis=(1, 2, 3), keepdims=True)
    q = np.rint(single * (np.float32(127) / largest))
    return q.astype(np.float64) * (largest / np.float32(127)).astype(np.float64)


def convolved(x: Floats, w: Floats, case: Conv) -> Floats:
    """Return the sums over all taps of a kernel (n, height, width, channels)."""
    (top, left, bottom, right), (height, width) = case.pad, case.outputs
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    y = np.zeros((case.batch, case.n, height, width))
    for u in range(case.kernel[0]):
        for v in range(case.kernel[1]):
            rows = u * case.dilation[0] + np.arange(height) * case.stride[0]
            columns = v * case.dilation[1] + np.arange(width) * case.stride[1]
            y += np.einsum("bchw,nc->bnhw", padded[:, :, rows[:, None], columns], w[:, u, v])
    return y


def _read(data: bytes, case: Conv) -> Floats:
    if case.type == BF16:
        flat = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(data, "<f2" if case.type == F16 else "<f4").astype(np.float32)
    return flat.astype(np.float64).reshape(case.batch, case.n, *case.outputs)


def grid() -> list[Conv]:
    """Return calls over bits, types, strides, dilations, pads and sizes, each dimension against several others."""
    out = [
        Conv(bits=bits, type=bits % 3 + 1, relu=relu, zero=float(zero), seed=bits)
        for bits in range(1, 9)
        for relu, zero in ((False, 128), (True, 0), (True, 77))
    ]
    out += [
        Conv(kernel=kernel, stride=stride, dilation=dilation, size=(13, 37), n=17, channels=5, seed=i)
        for i, (kernel, stride, dilation) in enumerate(
            (kernel, stride, dilation)
            for kernel in ((1, 1), (3, 3), (2, 5), (7, 1))
            for stride in ((1, 1), (2, 2), (3, 1), (1, 4))
            for dilation in ((1, 1), (2, 2), (1, 3))
        )
        if (kernel[1] - 1) * dilation[1] < 37 + 2 and (kernel[0] - 1) * dilation[0] < 13 + 2
    ]
    pads = [(0, 0, 0, 0), (2, 0, 1, 3), (0, 5, 0, 0), (4, 0, 0, 20)]
    out += [Conv(pad=pad, stride=(s, s), size=(5, 6), seed=s) for pad in pads for s in (1, 2)]
    out += [Conv(kernel=(1, 1), pad=(0, 0, 0, 0), size=size, batch=2) for size in ((1, 1), (7, 7), (1, 40), (33, 32))]
    out += [Conv(n=n, channels=c, table_rows=16 * (n % 2), bias=n > 1) for n, c in ((1, 1), (16, 3), (33, 8), (95, 34))]
    out += [
        Conv(size=size, batch=3, n=70, threads=3, type=t) for t, size in enumerate(((4, 200), (40, 7), (16, 80)), 1)
    ]
    return out
