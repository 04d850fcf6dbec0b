"""Calls of the CPU kernels for programs on other processors: layout c16, float64 answers and bounds, all in numpy."""

from __future__ import annotations

import math
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

U8, F16, BF16, F32 = range(4)
EXACT, INT8 = range(2)
NONE, RELU, GELU, GELU_TANH, SILU = range(5)
HALF_ULP = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24}
SIZE = {U8: 1, F16: 2, BF16: 2, F32: 4}
RUN = 128
"""The most inputs that share a scale in int8 mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One weight; the names are those of `paredown_weight`."""

    n: int
    k: int
    bits: int
    group: int = 0
    table_rows: int = 0
    table_type: int = U8
    scale_type: int = F16
    zero: float = 128.0
    unit: float = 1 / 128
    uniform: bool = False
    """Whether entry i of the table is i."""

    @property
    def groups(self) -> list[slice]:
        width = self.group or self.k
        return [slice(start, min(start + width, self.k)) for start in range(0, self.k, width)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call; `rank` 0 = no low-rank term; `gather` = rows of W, not a product; `identity`: x is one, y is W^T."""

    weight: Sizes
    m: int = 1
    type: int = F32
    mode: int = EXACT
    activation: int = NONE
    bias: bool = False
    rank: int = 0
    gap: int = 0
    threads: int = 1
    gather: bool = False
    identity: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call must give: y and the largest error of each element, both (m, n) float64."""

    y: NDArray[np.float64]
    bound: NDArray[np.float64]


def run(program: Sequence[str], cases: Sequence[Case], folder: Path) -> dict[str, list[NDArray[np.float64]]]:
    """Return what the harness, started by `program`, gives for each case with each instruction set it has."""
    names = isas(program)
    made = [build(case) for case in cases]
    (folder / "calls").write_bytes(b"".join(call for call, _ in made))
    subprocess.run([*program, folder / "calls", folder / "results", *names], check=True, timeout=1200)
    stream = memoryview((folder / "results").read_bytes())
    out: dict[str, list[NDArray[np.float64]]] = {}
    for name in names:
        out[name] = []
        for case in cases:
            size = y_bytes(case)
            (status,) = struct.unpack_from("<i", stream)
            assert status == 0, (name, case, status)
            out[name].append(_read_y(bytes(stream[4 : 4 + size]), case))
            stream = stream[4 + size :]
    assert len(stream) == 0
    return out


def isas(program: Sequence[str]) -> list[str]:
    listed = subprocess.run(program, check=True, capture_output=True, text=True, timeout=60)
    return listed.stdout.strip().split(",")


def misses(cases: Sequence[Case], found: dict[str, list[NDArray[np.float64]]]) -> Iterator[str]:
    """Describe each case whose result is out of bounds for an instruction set."""
    for i, case in enumerate(cases):
        _, answer = build(case)
        for name, results in found.items():
            error = np.abs(results[i] - answer.y)
            if not (error <= answer.bound).all():
                worst = np.nanmax(error / np.maximum(answer.bound, 1e-300))
                yield f"{name}: {worst:.3g} times the bound: {case}"


def build(case: Case) -> tuple[bytes, Answer]:
    """Return a case as the harness reads it, and its answer."""
    rng = np.random.default_rng(case.seed)
    weight, w = random_weight(case.weight, rng)
    if case.gather:
        rows = rng.integers(0, case.weight.n, case.m)
        call = (1, weight, _no_weight(), rows.astype("<i8").tobytes(), b"", b"")
        y = w[rows]
        return _call(case, *call), Answer(y, np.abs(y) * (HALF_ULP[case.type] + 4 * HALF_ULP[F32]) + 1e-30)
    x = nearest(rng.standard_normal((case.m, case.weight.k + case.gap)), case.type)
    if case.identity:
        x = np.eye(case.m, case.weight.k + case.gap)
    bias = nearest(rng.standard_normal(case.weight.n), case.type) if case.bias else None
    low, left = _no_weight(), np.zeros((case.weight.n, 0))
    if case.rank:
        sizes = Sizes(n=case.weight.n, k=case.rank, bits=8, zero=128.0, unit=1 / 128)
        low, left = random_weight(sizes, rng)
    t = nearest(rng.standard_normal((case.m, case.rank)), case.type)
    cut = x.size - case.gap if case.m else 0
    call = (
        0,
        weight,
        low,
        packed_values(x.ravel()[:cut], case.type),
        packed_values(bias, case.type),
        packed_values(t, case.type),
    )
    parts = (x[:, : case.weight.k], w, bias, t @ left.T, np.abs(t) @ np.abs(left.T))
    answer = Answer(w.T, np.zeros(w.T.shape)) if case.identity else _answer(case, *parts)
    return _call(case, *call), answer


def y_bytes(case: Case) -> int:
    row = case.weight.k if case.gather else case.weight.n
    gap = 0 if case.gather else case.gap
    return ((case.m - 1) * (row + gap) + row) * SIZE[case.type] if case.m else 0


def c16(codes: NDArray[np.uint8], sizes: Sizes) -> bytes:
    """Return codes (n, k) in the layout that paredown.h describes, one field at a time."""
    rows = -(-sizes.n // 16) * 16
    groups = []
    for columns in sizes.groups:
        part = codes[:, columns].astype(np.uint32)
        steps = -(-part.shape[1] // 32)
        part = np.pad(part, ((0, rows - sizes.n), (0, 32 * steps - part.shape[1])))
        groups.append(_units(part.reshape(rows // 16, 16, steps, 32), sizes.bits).reshape(rows // 16, -1))
    return np.concatenate(groups, axis=1).astype("<u4").tobytes()


def _units(codes: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Return codes (blocks, 16, steps, 32) as units (blocks, steps, bits, 16)."""
    units, below = [], 0
    for w in (8, 4, 2, 1):
        if not bits & w:
            continue
        plane = codes >> below & 2**w - 1
        below += w
        word = np.zeros((*codes.shape[:3], w), np.uint32)
        for f in range(8 // w):
            for b in range(4):
                word |= plane[..., 4 * f + b :: 32 // w] << np.uint32(8 * b + w * f)
        units.append(word)
    return np.concatenate(units, axis=3).transpose(0, 2, 3, 1)


def random_weight(sizes: Sizes, rng: np.random.Generator) -> tuple[bytes, NDArray[np.float64]]:
    """Return a random weight as the harness reads it, and W in float64."""
    codes = rng.integers(0, 2**sizes.bits, (sizes.n, sizes.k), dtype=np.uint8)
    blocks = -(-sizes.n // sizes.table_rows) if sizes.table_rows else 1
    shape = (blocks, 2**sizes.bits)
    if sizes.uniform:
        table = np.tile(np.arange(2.0**sizes.bits), (blocks, 1))
    elif sizes.table_type == U8:
        table = rng.integers(0, 256, shape).astype(np.float64)
    else:
        table = nearest(sizes.zero + 128 * rng.standard_normal(shape), F16)
    scale = nearest(rng.uniform(0.5, 2.0, (-(-sizes.n // 16) * 16, len(sizes.groups))), sizes.scale_type)
    column_group = np.concatenate([np.full(s.stop - s.start, i) for i, s in enumerate(sizes.groups)])
    block = np.arange(sizes.n) // (sizes.table_rows or sizes.n)
    w = (table[block[:, None], codes] - sizes.zero) * np.float32(sizes.unit) * scale[: sizes.n, column_group]
    ordered = scale.reshape(-1, 16, len(sizes.groups)).transpose(0, 2, 1)
    numbers = (sizes.n, sizes.k, sizes.group, sizes.table_rows, sizes.bits, sizes.table_type, sizes.scale_type)
    head = struct.pack("<7q2d", *numbers, sizes.zero, sizes.unit)
    parts = (c16(codes, sizes), packed_values(table, sizes.table_type), packed_values(ordered, sizes.scale_type))
    return head + b"".join(blob(part) for part in parts), w


def _no_weight() -> bytes:
    return struct.pack("<7q2d", *[0] * 9) + 3 * blob(b"")


def _call(case: Case, kind: int, weight: bytes, low: bytes, x: bytes, bias: bytes, low_x: bytes) -> bytes:
    strides = (case.weight.k + case.gap, case.weight.n + case.gap)
    numbers = (case.m, *strides, case.type, case.mode, case.activation, case.threads, y_bytes(case))
    head = struct.pack("<8q", *numbers)
    return struct.pack("<q", kind) + weight + low + head + b"".join(blob(part) for part in (x, bias, low_x))


def _answer(
    case: Case,
    x: NDArray[np.float64],
    w: NDArray[np.float64],
    bias: NDArray[np.float64] | None,
    low: NDArray[np.float64],
    low_size: NDArray[np.float64],
) -> Answer:
    """Return the product and its bound: float32 sums of k terms (exact) or of the runs' exact sums (int8)."""
    u = HALF_ULP[F32]
    if case.mode == EXACT:
        y, size, terms = x @ w.T, np.abs(x) @ np.abs(w.T), case.weight.k
    else:
        sums = np.stack([rounded(x[:, run]) @ w[:, run].T for run in _runs(case.weight)])
        y, size, terms = sums.sum(0), np.abs(sums).sum(0), len(sums)
    added = np.zeros(case.weight.n) if bias is None else bias
    y = y + low + added
    bound = u * ((terms + 8) * size + (case.rank + 8) * low_size + 4 * np.abs(added) + 4 * np.abs(y))
    return Answer(active(y, case.activation), _after(y, bound, case))


def _after(y: NDArray[np.float64], bound: NDArray[np.float64], case: Case) -> NDArray[np.float64]:
    """Return the bound behind the activation (slope <= 1.13) and the rounding to the type of y."""
    z = active(y, case.activation)
    if case.activation > RELU:
        bound = 1.13 * bound + 16 * HALF_ULP[F32] * np.maximum(np.abs(z), 0.1 * np.abs(y))
    smallest = {F16: 2.0**-25, BF16: 1e-38, F32: 1e-38}[case.type]
    return bound + HALF_ULP[case.type] * (np.abs(z) + bound) + smallest


def _runs(sizes: Sizes) -> list[slice]:
    return [slice(at, min(at + RUN, s.stop)) for s in sizes.groups for at in range(s.start, s.stop, RUN)]


def rounded(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the inputs of one run (m, inputs) rounded to int8 as paredown.h says."""
    single = x.astype(np.float32)
    largest = np.abs(single).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(largest > 0, np.rint(single * (np.float32(127) / largest)), 0)
    return q.astype(np.float64) * (largest / np.float32(127)).astype(np.float64)


def active(y: NDArray[np.float64], activation: int) -> NDArray[np.float64]:
    if activation == RELU:
        return np.maximum(y, 0)
    if activation == GELU:
        return y * (1 + erf(y / math.sqrt(2))) / 2
    if activation == GELU_TANH:
        return y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
    return y / (1 + np.exp(-y)) if activation == SILU else y


def nearest(values: NDArray[np.float64], kind: int) -> NDArray[np.float64]:
    """Return the nearest values of a type, in float64."""
    if kind == BF16:
        word = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        word = word + 0x7FFF + (word >> 16 & 1) & 0xFFFF0000
        return word.astype(np.uint32).view(np.float32).astype(np.float64)
    return values.astype(np.float16 if kind == F16 else np.float32).astype(np.float64)


def packed_values(values: NDArray[np.float64] | None, kind: int) -> bytes:
    if values is None:
        return b""
    if kind == BF16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({U8: "u1", F16: "<f2", F32: "<f4"}[kind]).tobytes()


def blob(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


def _read_y(data: bytes, case: Case) -> NDArray[np.float64]:
    """Return y without the gaps between its rows, which must be as the harness left them."""
    row, gap = (case.weight.k, 0) if case.gather else (case.weight.n, case.gap)
    size = SIZE[case.type]
    padded = np.frombuffer(data + b"\xff" * (gap * size if case.m else 0), np.uint8).reshape(case.m, row + gap, size)
    assert (padded[:, row:] == 255).all(), f"the gap between rows of y was written: {case}"
    used = np.ascontiguousarray(padded[:, :row])
    if case.type == BF16:
        return (used.view("<u2")[..., 0].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return used.view("<f2" if case.type == F16 else "<f4")[..., 0].astype(np.float64)


def grid() -> list[Case]:
    """Return calls over bits, modes, types, tables, groups and row counts, each dimension against several others."""
    out: list[Case] = []
    for bits in range(1, 9):
        weight = Sizes(n=40, k=300, bits=bits, group=128)
        for mode in (EXACT, INT8):
            base = Case(weight=weight, mode=mode, seed=bits)
            out += [replace(base, m=m, type=m % 3 + 1, seed=m) for m in (1, 2, 3, 5, 16, 17, 33)]
            out += [replace(base, weight=replace(weight, scale_type=scale), m=6) for scale in (BF16, F32)]
            out += _shapes(base)
        coded = Sizes(n=48, k=160, bits=bits, group=32, table_type=F16, table_rows=16, zero=0.5)
        out += [Case(weight=coded, m=m, type=m % 3 + 1, seed=m) for m in (1, 2, 9, 18)]
        out.append(Case(weight=coded, m=5, gather=True, type=bits % 3 + 1))
        out.append(Case(weight=Sizes(n=33, k=70, bits=bits, group=25), m=40, gather=True))
        out += [Case(weight=Sizes(n=33, k=k, bits=bits, group=25), m=k, identity=True) for k in (1, 3, 70)]
    return out + _uniform() + _many_tokens() + _epilogues()


def _shapes(base: Case) -> list[Case]:
    """Return odd sizes, with gaps between the rows of x and y, tables for blocks of rows, and zeros other than 128."""
    sizes = [(1, 1, 0), (16, 32, 0), (17, 33, 0), (50, 257, 0), (48, 90, 0), (33, 200, 40), (64, 256, 64), (20, 70, 1)]
    out = []
    for n, k, group in sizes:
        weight = replace(base.weight, n=n, k=k, group=group, table_rows=16 * (n % 2), zero=float(n))
        out += [replace(base, weight=weight, m=m, gap=n % 3, seed=n) for m in (1, 4, 19)]
    return out


def _uniform() -> list[Case]:
    """Return weights of 8 bits that need no table."""
    weight = Sizes(n=40, k=300, bits=8, group=128, uniform=True)
    return [Case(weight=weight, m=m, mode=mode, type=m % 3 + 1, seed=m) for mode in (0, 1) for m in (1, 2, 4, 7, 35)]


def _many_tokens() -> list[Case]:
    """Return calls whose tokens do not fit one task, and calls cut for threads."""
    weight = Sizes(n=70, k=200, bits=4, group=96)
    large = Sizes(n=600, k=512, bits=3)
    return [
        *(Case(weight=weight, m=m, mode=mode, rank=9, seed=m) for mode in (0, 1) for m in (193, 300, 401)),
        *(Case(weight=large, m=m, mode=mode, threads=3, seed=m) for mode in (0, 1) for m in (1, 21)),
    ]


def _epilogues() -> list[Case]:
    weight = Sizes(n=40, k=96, bits=4, group=32)
    ends = [(activation, bias, rank) for activation in range(5) for bias in (False, True) for rank in (0, 7, 32)]
    return [
        Case(weight=weight, mode=mode, m=m, activation=a, bias=b, rank=r, type=(a + r + m) % 3 + 1, gap=2)
        for mode in (EXACT, INT8)
        for m in (1, 20)
        for a, b, r in ends
    ]
