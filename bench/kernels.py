"""Time the low-bit kernels beside onnxruntime's own operators, in one process: `python -m paredown.bench.kernels`.

    --quick     4096 x 4096, one thread, a few batch sizes
    --out DIR   where kernels.json goes; without it nothing is written

A layer is one ONNX node in a session. Every row alternates with the others of its cell (`measure.sample`); GB/s is the
bytes of codes and scales over the best time. `share` is the median over the rounds of those bytes a second over what
this machine reads in the same round from a buffer of that size (warm), or of more than the caches hold, as the layers
are together (cold): neighbours on a shared machine leave more or less of its memory from one second to the next.

Beside our forms stand the limits that were measured in the same rounds (`kernel_limits.py`), in microseconds a layer:
`bytes_us` (reading; cold: the file of these weights, mapped as onnxruntime maps it, whose pages are smaller than those
of the buffer), `kernel_us` (the kernel's instructions, on rows that stay in the first cache; one token),
`products_us` (int8: its byte products at the rate that registers give), and `call_us` (running a session of 16 rows and
128 inputs, which any layer pays). `limit_us` is the largest of the first three and the last. Several threads are taken
to be as many times as fast. In exact mode with more than one token reading alone is known.
Convolutions: `kernel_convs.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ..exporters.onnx_session import session_options
from ..kernels import native
from ..kernels.lut_reference import decode
from . import kernel_convs, kernel_limits
from . import kernel_models as models
from .environment import fingerprint
from .kernel_limits import Timed
from .kernel_models import Chain, Form
from .measure import Call, Samples, Sampling, Seconds, sample

SHAPES = ((1024, 1024), (4096, 4096))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BITS = (4, 3, 2)
COLD = (4096, 8192)
"""Rows and inputs of cold layers: 8192 inputs and the weights of a block do not fit in a first cache together."""
COLD_BYTES = 320 << 20
"""What the layers of a cold chain hold at least; ten times the last cache of the machines tried."""
EMPTY_CALLS = 200
"""At once, a millisecond or more: the clock and the rounds need that."""

DENSE = Form(name="fp32", op="MatMul")
NBITS = Form(name="MatMulNBits 4b b128", op="MatMulNBits", bits=4)
OTHERS = (
    Form(name="MatMulNBits 4b b32", op="MatMulNBits", bits=4, group=32),
    Form(name="MatMulNBits 4b b128 fp32", op="MatMulNBits", bits=4, accuracy=0),
    Form(name="MatMulNBits 2b b128", op="MatMulNBits", bits=2),
    Form(name="MatMulNBits 2b b64 lut", op="MatMulNBits", bits=2, group=64, session=(("mlas.use_lut_gemm", "1"),)),
    Form(name="MatMulNBits 8b b128", op="MatMulNBits", bits=8),
    Form(name="MatMulBnb4 b64", op="MatMulBnb4", bits=4, group=64),
    Form(name="DynamicQuantizeMatMul", op="DynamicQuantizeMatMul", bits=8),
)
OURS = tuple(Form(name=f"ours {bits}b int8", op="LutLinear", bits=bits, mode="int8") for bits in BITS) + tuple(
    Form(name=f"ours {bits}b exact", op="LutLinear", bits=bits) for bits in BITS
)
COLD_FORMS = (NBITS, *OURS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is measured together: a shape, rows of activations and a thread count; `layers` > 1 = a cold chain."""

    n: int
    k: int
    m: int
    threads: int
    layers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Seconds that one weight takes at one token, by form; one product of bytes; one call; one thread each.

    And with the threads of the cell, at best in each round: one byte of a buffer, by its bytes, and one of the file of
    a form (cold only).
    """

    kernel: Mapping[Form, float]
    product: float
    call: float
    buffer: Mapping[int, Seconds]
    file: Mapping[Form, Seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options().parse_args(arguments)
    shapes = ((4096, 4096),) if options.quick else SHAPES
    tokens = (1, 8, 64) if options.quick else TOKENS
    cold = (4096,) if options.quick else COLD
    threads = (1,) if options.quick else (1, 2)
    rows: list[dict[str, Any]] = []
    for cell in [*_cells(shapes, tokens, threads), *_cold_cells(cold, threads)]:
        found = list(measured(cell, cell_forms(cell), options.seconds))
        rows += found
        _show(cell, found)
    document = {
        "schema": "paredown.kernels/1",
        "environment": fingerprint() | {"kernels": {"isa": native.isa(), "isas": list(native.isas())}},
        "errors": errors(),
        "bars": bars(rows),
        "rows": rows,
        "convolutions": kernel_convs.rows(threads, options.seconds),
    }
    _show_bars(document)
    if options.out:
        path = Path(options.out) / "kernels.json"
        path.write_text(json.dumps(document, indent=1) + "\n")


def cell_forms(cell: Cell) -> tuple[Form, ...]:
    """Return what is compared in a cell: everything at one token, the nearest rivals at more."""
    if cell.layers > 1:
        return COLD_FORMS
    return (DENSE, NBITS, *OTHERS, *OURS) if cell.m == 1 else (DENSE, NBITS, *OURS)


def measured(cell: Cell, forms: Sequence[Form], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row per form: microseconds per layer, and GB/s of weight bytes beside the machine's."""
    x = np.random.default_rng(0).standard_normal((cell.m, cell.k), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(n=cell.n, k=cell.k, layers=cell.layers)
        paths = [models.write(form, chain, Path(folder)) for form in forms]
        calls = [_call(form, path, cell.threads, x) for form, path in zip(forms, paths, strict=True)]
        ours = {form: path for form, path in zip(forms, paths, strict=True) if form.ours}
        sizes = {_buffer_bytes(form, cell) for form in forms}
        samples, rates = _sample(calls, cell, ours, sizes, seconds)
    for form, times in zip(forms, samples.seconds, strict=False):
        size = models.weight_bytes(form, cell.n, cell.k)
        best, middle = float(times.min()) / cell.layers, float(np.median(times)) / cell.layers
        buffer = rates.buffer[_buffer_bytes(form, cell)]
        yield (
            asdict(cell)
            | {
                "form": form.name,
                "bits": form.bits,
                "min_us": best * 1e6,
                "median_us": middle * 1e6,
                "runs": int(times.size),
                "weight_bytes": size,
                "gb_per_s": size / best / 1e9,
                "read_gb_per_s": 1e-9 / float(buffer.min()),
                "share": float(np.median(buffer * size * cell.layers / times.min(axis=1))),
                "file_share": float(np.median(buffer / rates.file.get(form, buffer))),
                "waited": samples.waited,
            }
            | (_limits(form, cell, rates) if form.ours else {})
        )


def _sample(
    calls: Sequence[Call], cell: Cell, ours: Mapping[Form, Path], sizes: Set[int], seconds: float
) -> tuple[Samples, Rates]:
    """Time the calls of a cell, and in the same rounds what limits them."""
    kernel = {form: kernel_limits.resident(form, cell.k) for form in ours if cell.m == 1}
    buffer = {size: kernel_limits.buffer(size, cell.threads) for size in sizes}
    cold = ours if cell.layers > 1 else {}
    file = {form: kernel_limits.mapped(models.data_of(path), cell.threads) for form, path in cold.items()}
    timed = [*kernel.values(), *buffer.values(), *file.values(), kernel_limits.multiplied(), _empty_call(cell)]
    rounds = 30 if cold else 8
    limits = Sampling(
        min_seconds=seconds, min_count=10, max_seconds=20 * seconds, min_rounds=rounds, warmup_seconds=seconds
    )
    samples = sample([*calls, *(call for call, _ in timed)], limits)
    each = iter(times.min(axis=1) for times in samples.seconds[len(calls) :])
    return samples, Rates(
        kernel={form: float(next(each).min()) / count for form, (_, count) in kernel.items()},
        buffer={size: next(each) / count for size, (_, count) in buffer.items()},
        file={form: next(each) / count for form, (_, count) in file.items()},
        product=float(next(each).min()) / timed[-2][1],
        call=float(next(each).min()) / timed[-1][1],
    )


def _buffer_bytes(form: Form, cell: Cell) -> int:
    return models.weight_bytes(form, cell.n, cell.k) if cell.layers == 1 else COLD_BYTES


def _limits(form: Form, cell: Cell, rates: Rates) -> dict[str, float | None]:
    """Return the microseconds that a layer takes at least, by what limits it; None = was not measured here."""
    work = cell.n * cell.k * 1e6 / cell.threads
    byte = rates.file.get(form, rates.buffer[_buffer_bytes(form, cell)])
    bytes_us = models.weight_bytes(form, cell.n, cell.k) * float(byte.min()) * 1e6
    kernel = work * rates.kernel[form] if form in rates.kernel else None
    products = work * cell.m * rates.product if form.mode == "int8" else None
    known = [limit for limit in (bytes_us, kernel, products) if limit is not None]
    call = rates.call * 1e6 / cell.layers
    found = {"bytes_us": bytes_us, "kernel_us": kernel, "products_us": products, "call_us": call}
    return found | {"limit_us": max(known) + call}


def read_gb_per_s(size: int, threads: int) -> float:
    """Return how fast this machine reads a buffer of this size again and again, at best."""
    call, count = kernel_limits.buffer(size, threads)
    times = sample([call], Sampling(min_seconds=0.02, min_count=8, min_rounds=4, warmup_seconds=0.05)).seconds
    return count / float(times[0].min()) / 1e9


def errors() -> list[dict[str, Any]]:
    """Return the error of each of our forms against float64, relative to the norm of the products."""
    rng = np.random.default_rng(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for form in OURS:
            chain = Chain(n=1024, k=1024)
            session = _session(form, models.write(form, chain, Path(folder)), 1)
            parts, spec = models.lut_weight(form.bits, chain.n, chain.k, np.random.default_rng(chain.seed))
            x = rng.standard_normal((16, chain.k), dtype=np.float32)
            wanted = x.astype(np.float64) @ decode(parts, spec).double().numpy().T
            (have,) = session.run(None, {"x": x})
            error = np.linalg.norm(have - wanted) / np.linalg.norm(wanted)
            found.append({"form": form.name, "relative_error": float(error)})
    return found


BARS: tuple[tuple[str, int, int, str, str, float], ...] = (
    ("ours 4b int8", 4096, 1, "MatMulNBits 4b b128", "<=", 0.95),
    ("ours 4b int8", 4096, 1, "MatMulNBits 4b b32", "<=", 0.75),
    ("ours 2b int8", 4096, 1, "MatMulNBits 4b b128", "<=", 0.60),
    ("ours 3b int8", 4096, 1, "MatMulNBits 4b b128", "<=", 0.90),
    ("ours 4b int8", 1024, 1, "MatMulNBits 4b b128", "<=", 1.05),
    ("ours 4b int8", 4096, 64, "MatMulNBits 4b b128", "<=", 0.30),
    *((form.name, size, m, "fp32", "<=", 1.02) for form in OURS for size in (1024, 4096) for m in TOKENS),
)
"""Ratios of the best times, one layer at one thread count: ours, n = k, m, the rival, the bar."""


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each bar with the value measured, by threads, and `limit`: the value that the measured limits leave.

    Ratios of the best times, and the share of the bandwidth in the same rounds at one token. Where `limit` misses the
    bar too, no change but to the instructions of the kernel could reach it here; where `law` does, none could: it
    leaves those out.
    """
    return [*_ratios(rows), *_shares(rows)]


def _ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for threads in sorted({row["threads"] for row in rows}):
        found = {
            (row["form"], row["n"], row["m"]): row
            for row in rows
            if row["threads"] == threads and row["n"] == row["k"] and row["layers"] == 1
        }
        for ours, size, m, rival, _, bar in BARS:
            if (ours, size, m) not in found or (rival, size, m) not in found:
                continue
            row, other = found[ours, size, m], found[rival, size, m]["min_us"]
            value = row["min_us"] / other
            what = f"{ours} / {rival}, {size} x {size}, m = {m}"
            limits = {"limit": row["limit_us"] / other, "law": _law(row) / other}
            yield {"what": what, "threads": threads, "value": value, "bar": bar, "met": value <= bar} | limits


def _shares(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["form"].startswith("ours") and row["form"].endswith("int8") and row["m"] == 1 and row["n"] >= 4096:
            share, kind = row["share"], "cold" if row["layers"] > 1 else "warm"
            what = f"{row['form']} bytes/s of the bandwidth, {row['n']} x {row['k']}, {kind}"
            least = row["file_share"] * row["bytes_us"]
            limits = {"limit": least / row["limit_us"], "law": least / _law(row)}
            yield {"what": what, "threads": row["threads"], "value": share, "bar": 0.9, "met": share >= 0.9} | limits


def _law(row: dict[str, Any]) -> float:
    return float(max(row["bytes_us"], row["products_us"] or 0.0) + row["call_us"])


def _cells(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], threads: Sequence[int]) -> Iterator[Cell]:
    for count, (n, k) in itertools.product(threads, shapes):
        yield from (Cell(n=n, k=k, m=m, threads=count) for m in tokens)


def _cold_cells(sizes: Sequence[int], threads: Sequence[int]) -> Iterator[Cell]:
    for count, size in itertools.product(threads, sizes):
        layers = -(-COLD_BYTES // models.weight_bytes(OURS[len(BITS) - 1], size, size))
        yield Cell(n=size, k=size, m=1, threads=count, layers=layers)


def _call(form: Form, path: Path, threads: int, x: np.ndarray) -> Call:
    session = _session(form, path, threads)
    return lambda: session.run(None, {"x": x})


def _empty_call(cell: Cell) -> Timed:
    """Return calls of the least layer that there is, 16 x 128, with as many rows of activations, and their number."""
    with tempfile.TemporaryDirectory() as folder:
        path = models.write(OURS[0], Chain(n=kernel_limits.ROWS, k=models.GROUP), Path(folder))
        once = _call(OURS[0], path, cell.threads, np.zeros((cell.m, models.GROUP), np.float32))
    return lambda: [once() for _ in range(EMPTY_CALLS)], float(EMPTY_CALLS)


def _session(form: Form, path: Path, threads: int) -> onnxruntime.InferenceSession:
    settings = session_options(threads=threads, library=native.ort_library() if form.ours else None)
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in form.session:
        settings.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def _show(cell: Cell, rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    kind = f", {cell.layers} layers (cold)" if cell.layers > 1 else ""
    table = Table(title=f"{cell.n} x {cell.k}, m = {cell.m}, {cell.threads} thread(s){kind}", title_justify="left")
    table.add_column("form")
    for name in ("min us", "median us", "x fp32", "GB/s", "of the bandwidth", "limit us"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = f"{row['min_us'] / rows[0]['min_us']:.3f}" if rows[0]["form"] == DENSE.name else "-"
        share = f"{100 * row['share']:.0f} %"
        times = [f"{row['min_us']:.1f}", f"{row['median_us']:.1f}", ratio, f"{row['gb_per_s']:.1f}", share]
        table.add_row(row["form"], *times, f"{row['limit_us']:.1f}" if "limit_us" in row else "")
    Console(width=110).print(table)


def _show_bars(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=140, highlight=False)
    for row in document["errors"]:
        console.print(f"{row['form']}: relative error {row['relative_error']:.2e}")
    for row in document["bars"]:
        word = "met" if row["met"] else "NOT"
        limits = f"limit {row['limit']:.3f}, without instructions {row['law']:.3f}"
        value = f"{row['value']:.3f} (bar {row['bar']}; {limits})"
        console.print(f"{word} {value} {row['what']}, {row['threads']} thread(s)")
    for row in document["convolutions"]:
        console.print(f"{row['what']}, {row['threads']} thread(s), {row['form']}: {row['min_us']:.1f} us")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4096 x 4096, one thread, a few batch sizes")
    parser.add_argument("--seconds", type=float, default=0.3, help="least time for each form of a cell")
    parser.add_argument("--out", default="", help="folder that kernels.json is written to")
    return parser


if __name__ == "__main__":
    main()
