"""How fast are the CUDA kernels? Beside cuBLAS and other low-bit kernels, from DRAM, by replaying CUDA graphs.

Every candidate multiplies by copies of one weight in turn, together at least 4 x the L2 cache, so that each is read
from DRAM; one graph holds a round of them. Rounds of all candidates alternate, and the median is reported. The ceiling
is what a copy moves in the same run, bytes read and written. "In L2" is the same with one copy, over and over.
"""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.cuda import call, launch
from ..kernels.lut_spec import LutParts, LutSpec, Mode

SHAPES = (
    *((8192, 28672), (57344, 8192), (28672, 4096), (4096, 14336)),
    *((8192, 8192), (6144, 4096), (4096, 4096), (3072, 768), (768, 768)),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
GROUP = 128
ROUNDS, LEAST_CALLS = 15, 16
OVER_L2 = 4
SECONDS = 240.0
"""After so long no further batch is begun, which leaves time for compute-sanitizer in 10 minutes."""
MOST_ERROR = 1e-2
"""What products by our kernels may be off, |y - x W^T| / |x W^T|; those of bytes are furthest off."""
BARS = {4: 70.0, 3: 60.0, 2: 50.0}
"""Percent of the ceiling wanted at 8192 x 28672 for batches up to 16, by bits."""

Product: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One candidate at one shape: products by copies of a weight, the bytes of one, and W as it means it."""

    name: str
    dtype: torch.dtype
    products: Sequence[Product]
    bytes: int
    dense: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Microseconds of one product: the median of the rounds with their quartiles, and of one copy in L2."""

    n: int
    k: int
    m: int
    column: str
    us: float
    us_low: float
    us_high: float
    us_warm: float
    gb_per_s: float
    percent: float
    ratio: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All rows, the ceiling in bytes per second, and the candidates that could not be had."""

    rows: tuple[Row, ...]
    ceiling: float
    absent: Mapping[str, str]

    def document(self) -> dict[str, object]:
        return {
            "ceiling_bytes_per_s": self.ceiling,
            "absent": dict(self.absent),
            "rows": [{name: _finite(value) for name, value in asdict(row).items()} for row in self.rows],
        }


def measure(until: float = math.inf) -> Table:
    """Measure every candidate at every shape and batch, those that matter most first; `until` is of time.monotonic.

    What is measured is returned even if the GPU fails on the way: `absent` then says at what.
    """
    ceiling = copy_bandwidth()
    absent: dict[str, str] = {}
    rows: list[Row] = []
    until = min(until, time.monotonic() + SECONDS)
    for n, k in SHAPES:
        try:
            for row in _shape((n, k), until, ceiling, absent):
                rows.append(row)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            absent[f"ours and all others from {n} x {k} on"] = _reason(error)
            break
    return Table(rows=tuple(rows), ceiling=ceiling, absent=absent)


def _shape(sizes: tuple[int, int], until: float, ceiling: float, absent: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of one shape."""
    n, k = sizes
    columns: list[Column] = []
    for name, make in candidates().items() if time.monotonic() < until else ():
        try:
            columns.append(make(n, k))
        except Exception as error:  # others' code raises what it likes, and ours is reported as a failure
            absent.setdefault(name, _reason(error))
    for m in ROWS:
        if time.monotonic() < until:
            yield from _batch(columns, (n, k, m), ceiling, absent)
        else:
            absent[f"{n} x {k}, m = {m}"] = "not begun for want of time"


def candidates() -> dict[str, Callable[[int, int], Column]]:
    """Return what makes each column; baselines first."""
    found: dict[str, Callable[[int, int], Column]] = {
        "cuBLAS float16": lambda n, k: _cublas(n, k, torch.float16),
        "cuBLAS bfloat16": lambda n, k: _cublas(n, k, torch.bfloat16),
        "torch int4pack": _int4pack,
        "bitsandbytes NF4": _bitsandbytes,
        "GemLite 4 bits": _gemlite,
    }
    for bits in (4, 3, 2):
        found |= {
            f"ours {bits} bits float16": _ours_maker(bits, torch.float16, "exact"),
            f"ours {bits} bits bfloat16": _ours_maker(bits, torch.bfloat16, "exact"),
            f"ours {bits} bits int8": _ours_maker(bits, torch.float16, "int8"),
        }
    return found | {
        "ours 4 bits float16, table of halves": _ours_maker(4, torch.float16, "exact", halves=True),
        "ours 4 bits float16, rank 32": _ours_maker(4, torch.float16, "exact", rank=32),
    }


def copy_bandwidth() -> float:
    """Return bytes per second, read and written, of the fastest of 10 copies of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = [_seconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.numel() / min(seconds)


def line(row: Row) -> str:
    """Return a row as text."""
    sizes = f"{row.n} x {row.k}, m = {row.m}".ljust(24)
    spread = f"{row.us:9.2f} us ({row.us_low:.2f} to {row.us_high:.2f}, in L2 {row.us_warm:.2f})"
    limits = f"{row.gb_per_s:6.0f} GB/s = {row.percent:3.0f} %"
    return f"{sizes} {row.column:36} {spread}  {limits}  {row.ratio:5.2f} x cuBLAS  error {row.error:.1e}"


def verdicts(table: Table) -> Iterator[str]:
    """Hold the figures against what is wanted of them; a line for each."""
    yield f"ceiling: a copy moves {table.ceiling / 1e9:.0f} GB/s"
    large = {(row.column, row.m): row for row in table.rows if (row.n, row.k) == SHAPES[0]}
    for bits, bar in BARS.items():
        for kind in ("float16", "int8"):
            found = [row for (name, m), row in large.items() if name == f"ours {bits} bits {kind}" and m <= 16]
            if found:
                least = min(found, key=lambda row: row.percent)
                yield _held(
                    f"{bits} bits {kind}, m up to 16: {least.percent:.0f} % at m = {least.m}", bar, least.percent
                )
    for kind, bar in (("float16", 2.8), ("int8", 3.2)):
        row = large.get((f"ours 4 bits {kind}", 1))
        if row is not None:
            yield _held(f"4 bits {kind}, m = 1: {row.ratio:.2f} x cuBLAS float16", bar, row.ratio)
    found = [row for (name, m), row in large.items() if name == "ours 4 bits float16" and m <= 64]
    if found:
        least = min(found, key=lambda row: row.ratio)
        yield _held(f"4 bits float16, m up to 64: {least.ratio:.2f} x cuBLAS at m = {least.m}", 0.98, least.ratio)


def _finite(value: object) -> object:
    """Return null for a float that JSON has not: a ratio to cuBLAS where that was not measured."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: Exception) -> str:
    """Return the kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"


def _held(said: str, bar: float, value: float) -> str:
    return f"{'reached' if value >= bar else 'NOT reached'} ({bar:g} wanted): {said}"


def _batch(columns: Sequence[Column], sizes: tuple[int, int, int], ceiling: float, absent: dict[str, str]) -> list[Row]:
    """Measure one batch of all candidates, alternating."""
    n, k, m = sizes
    rng = torch.Generator("cuda").manual_seed(m)
    x = torch.randn(m, k, generator=rng, device="cuda")
    replays: dict[str, tuple[Column, Callable[[], float], Callable[[], float], float]] = {}
    for column in columns:
        given = x.to(column.dtype)
        try:
            error = _error(column, given)
            cold, warm = _graph(column.products, given), _graph([column.products[0]] * LEAST_CALLS, given)
        except Exception as failure:
            absent[f"{column.name}, {n} x {k}, m = {m}"] = _reason(failure)
            continue
        replays[column.name] = (column, cold, warm, error)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in replays}
    for _ in range(ROUNDS):
        for name, (_, cold, warm, _) in replays.items():
            times[name].append((cold(), warm()))
    base = median(cold for cold, _ in times["cuBLAS float16"]) if "cuBLAS float16" in times else math.nan
    return [
        _row(sizes, replays[name][0], [c for c, _ in found], median(w for _, w in found), (base, ceiling), error)
        for name, found in times.items()
        for error in [replays[name][3]]
    ]


def _row(
    sizes: tuple[int, int, int],
    column: Column,
    cold: Sequence[float],
    warm: float,
    against: tuple[float, float],
    error: float,
) -> Row:
    ordered, (base, ceiling) = sorted(cold), against
    middle = median(cold)
    rate = column.bytes / middle
    return Row(
        n=sizes[0],
        k=sizes[1],
        m=sizes[2],
        column=column.name,
        us=1e6 * middle,
        us_low=1e6 * ordered[len(ordered) // 4],
        us_high=1e6 * ordered[-1 - len(ordered) // 4],
        us_warm=1e6 * warm,
        gb_per_s=rate / 1e9,
        percent=100 * rate / ceiling,
        ratio=base / middle,
        error=error,
    )


def _graph(products: Sequence[Product], x: Tensor) -> Callable[[], float]:
    """Capture one product by each copy, and return what replays them and gives the seconds of one."""
    for product in (products[0], products[0]):
        product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    return lambda: _seconds(graph.replay) / len(products)


def _seconds(run: Callable[[], object]) -> float:
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _error(column: Column, x: Tensor) -> float:
    """Return |y - x W^T| / |x W^T| in float64, with the W that the candidate holds."""
    wanted = x.double() @ column.dense.double().T
    return float((column.products[0](x).double() - wanted).norm() / wanted.norm())


def _copies(size: int) -> int:
    """Return how many copies of a weight exceed the L2 cache OVER_L2 times."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, LEAST_CALLS // 4, math.ceil(OVER_L2 * cache / size))


def _cublas(n: int, k: int, dtype: torch.dtype) -> Column:
    dense = _normal(n, k).to(dtype)
    weights = [dense.clone() for _ in range(_copies(2 * n * k))]
    products = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]
    name = f"cuBLAS {str(dtype).removeprefix('torch.')}"
    return Column(name=name, dtype=dtype, products=products, bytes=2 * n * k, dense=dense)


def _int4pack(n: int, k: int) -> Column:
    """torch's own: uniform 4 bits, bfloat16, a scale and a zero for each group."""
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int32)
    scales = torch.rand(k // GROUP, n, device="cuda", dtype=torch.bfloat16) * 0.01 + 0.01
    both = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
    dense = (codes.double() - 8) * scales.double().T.repeat_interleave(GROUP, 1)
    octets = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(octets, 8)
    size = n * k // 2 + both.numel() * 2
    held = [(packed.clone(), both.clone()) for _ in range(_copies(size))]
    products = [lambda x, w=w, s=s: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, s) for w, s in held]
    return Column(name="torch int4pack", dtype=torch.bfloat16, products=products, bytes=size, dense=dense.bfloat16())


def _bitsandbytes(n: int, k: int) -> Column:
    """NF4 in blocks of 64: a fixed table, float32 scales."""
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    matmul: Any = importlib.import_module("bitsandbytes").matmul_4bit
    weight = _normal(n, k).half()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    dense = bnb.dequantize_4bit(packed, state)
    size = n * k // 2 + n * k // 64 * 4
    held = [packed.clone() for _ in range(_copies(size))]
    products = [lambda x, w=w: matmul(x, w.t(), quant_state=state) for w in held]
    return Column(name="bitsandbytes NF4", dtype=torch.float16, products=products, bytes=size, dense=dense)


def _gemlite(n: int, k: int) -> Column:
    """Uniform 4 bits, float16, a scale and a zero for each group; each size is tuned at its first call."""
    if (n, k) != SHAPES[0]:
        raise ValueError(f"measured at {SHAPES[0][0]} x {SHAPES[0][1]} alone, since tuning takes its time")
    helper: Any = importlib.import_module("gemlite.helper")
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    scales = torch.rand(n, k // GROUP, device="cuda").half() * 0.01 + 0.01
    zeros = torch.full_like(scales, 8)
    layer = helper.A16Wn(device="cuda").from_weights(codes, scales, zeros, 4, GROUP)
    dense = (codes.half() - 8) * scales.repeat_interleave(GROUP, 1)
    size = n * k // 2 + 2 * scales.numel() * 2
    products = [copy.deepcopy(layer) for _ in range(_copies(size))]
    return Column(name="GemLite 4 bits", dtype=torch.float16, products=products, bytes=size, dense=dense)


def _ours_maker(
    bits: int, dtype: torch.dtype, mode: Mode, *, halves: bool = False, rank: int = 0
) -> Callable[[int, int], Column]:
    def make(n: int, k: int) -> Column:
        spec = LutSpec(n=n, k=k, bits=bits, group=GROUP, zero=0.0 if halves else 128.0, unit=0.01)
        parts, dense = _drawn(spec, halves)
        kind = launch.kind_of(spec, parts.table.dtype, dtype, mode)
        if kind is None:
            raise ValueError("no kernel")
        low = _normal(n, rank).to(dtype) if rank else None
        weight = call.pack(parts, spec, kind, low)
        size = weight.codes.numel() + 2 * weight.scale.numel() + (0 if low is None else 2 * low.numel())
        held = [_copy(weight) for _ in range(_copies(size))]
        products = [lambda x, w=w: call.linear(x, w, low_x=x[:, :rank] if rank else None) for w in held]
        if low is not None:  # the right factor takes the first inputs, so that the table shows the kernel alone
            dense[:, :rank] += low.to(dense.dtype)
        extra = ", table of halves" * halves + f", rank {rank}" * bool(rank)
        kind_name = "int8" if mode == "int8" else str(dtype).removeprefix("torch.")
        name = f"ours {bits} bits {kind_name}{extra}"
        return Column(name=name, dtype=dtype, products=products, bytes=size, dense=dense)

    return make


def _copy(weight: call.DeviceWeight) -> call.DeviceWeight:
    low = None if weight.low is None else weight.low.clone()
    return replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone(), low=low)


def _drawn(spec: LutSpec, halves: bool) -> tuple[LutParts, Tensor]:
    codes = torch.randint(0, 2**spec.bits, (spec.n, spec.k), device="cuda", dtype=torch.uint8)
    octets = torch.randint(0, 256, spec.table_shape, device="cuda", dtype=torch.uint8)
    table = torch.randn(spec.table_shape, device="cuda").half() if halves else octets
    scale = torch.rand(spec.scale_shape, device="cuda").half() * 0.01 + 0.01
    values = ((table.float() - spec.zero) * spec.unit).flatten()[codes.int()]
    dense = values * scale.float().repeat_interleave(GROUP, 1)
    return LutParts(codes=layout.pack(codes, spec), table=table, scale=layout.pack_scale(scale, spec)), dense


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda") * 0.02
