"""What a linear layer cannot be faster than on this machine, measured: for `bench/kernels.py`.

Three limits of one product, each alone: its bytes at the rate that memory is read; the instructions of the kernel
itself, timed on a block of rows that stays in the first cache; and the products of bytes at the rate that the
instruction set multiplies operands in registers. The kernel's own instructions are no law: another
kernel could have fewer. The other two are.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import pointer
from pathlib import Path

import numpy as np

from ..kernels import native
from .kernel_models import GROUP, Form, lut_weight

ROWS = 16
"""Of a block: what one call multiplies by."""
CACHE_BYTES = 28 << 10
"""Of codes, scales and inputs that are multiplied again and again: within a first cache of 32 KiB."""
PRODUCTS = 1 << 26
"""Of bytes in one call: about 0.3 ms where vpdpbusd multiplies 64 pairs a cycle."""
READ_BYTES = 64 << 20
"""That one call reads at least: about a millisecond from a cache."""

Timed = tuple[Callable[[], object], float]
"""A call, and how much it does: weights, products, bytes."""


def buffer(size: int, threads: int) -> Timed:
    """Return a call that reads a buffer of this size, 64 KiB at least, again and again, and the bytes it reads."""
    held = np.ones(max(size, 1 << 16), np.uint8)
    times = -(-READ_BYTES // held.nbytes)
    return lambda: [native.read(held.ctypes.data, held.nbytes, threads) for _ in range(times)], times * held.nbytes


def mapped(path: Path, threads: int) -> Timed:
    """Return a call that reads a file, mapped, and its bytes."""
    held = np.memmap(path, np.uint8, "r")
    return lambda: native.read(held.ctypes.data, held.nbytes, threads), float(held.nbytes)


def resident(form: Form, k: int) -> Timed:
    """Return a call that multiplies one token by the same 16 rows again and again, and its number of weights.

    The inputs are rounded once a call; a row has k inputs or as many as leave all of it in the first cache.
    """
    per_input = ROWS * (form.bits / 8 + 2 / GROUP) + (1 if form.mode == "int8" else 4)
    k = min(k, int(CACHE_BYTES / per_input) // GROUP * GROUP)
    parts, spec = lut_weight(form.bits, ROWS, k, np.random.default_rng(0))
    weight = native.Weight(
        n=spec.n, k=k, group=GROUP, bits=spec.bits, table_type=native.U8, scale_type=native.F16,
        zero=spec.zero, unit=spec.unit,
        codes=parts.codes.data_ptr(), table=parts.table.data_ptr(), scale=parts.scale.data_ptr(),
    )  # fmt: skip
    x = np.random.default_rng(1).standard_normal((1, k), dtype=np.float32)
    y = np.empty((1, spec.n), np.float32)
    call = native.Linear(
        weight=pointer(weight), x=x.ctypes.data, y=y.ctypes.data, m=1, x_stride=k, y_stride=spec.n,
        type=native.F32, mode=int(form.mode == "int8"), threads=1,
    )  # fmt: skip
    size = native.library().paredown_scratch(call)
    scratch = np.empty(size + 64, np.uint8)
    call.scratch, call.scratch_bytes = -(-scratch.ctypes.data // 64) * 64, size
    times = max(1, (1 << 24) // (spec.n * k))
    held = (parts, x, y, scratch, weight)  # the call has their addresses only

    def run() -> object:
        native.repeat_linear(call, times)
        return held

    return run, float(times * spec.n * k)


def multiplied() -> Timed:
    """Return a call that multiplies bytes in registers, and how many products that is."""
    return lambda: native.multiply_bytes(PRODUCTS), float(native.multiply_bytes(PRODUCTS))
