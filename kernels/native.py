"""The CPU kernels that were compiled when the package was installed, called by their C interface (cpu/paredown.h)."""

from __future__ import annotations

import ctypes
import functools
import json
import platform
import struct
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

from .elf import MACHINES

ABI = 1
LIBRARY = Path(__file__).with_name("libparedown.so")
MISSING = (
    "the CPU kernels were not built: install a C++ compiler and run pip install again, see optimize doctor; "
    "until then everything runs on the reference"
)

HEADER = 64
"""Bytes of the header of a 64-bit ELF file."""

U8, F16, BF16, F32 = range(4)
"""paredown_type."""


class LibraryError(RuntimeError):
    """There is no library of kernels that fits this version, or it refused a call; the message says what to do."""


class Weight(Structure):
    """paredown_weight."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "k", "group", "table_rows")),
        *((name, c_int32) for name in ("bits", "table_type", "scale_type")),
        *((name, c_float) for name in ("zero", "unit")),
        *((name, c_void_p) for name in ("codes", "table", "scale")),
    )


class Linear(Structure):
    """paredown_linear; `parallel` is left null, so that the library's own threads run."""

    _fields_ = (
        ("weight", POINTER(Weight)),
        *((name, c_void_p) for name in ("x", "y")),
        *((name, c_int64) for name in ("m", "x_stride", "y_stride")),
        *((name, c_int32) for name in ("type", "mode", "activation")),
        ("bias", c_void_p),
        ("low", POINTER(Weight)),
        ("low_x", c_void_p),
        ("low_stride", c_int64),
        ("scratch", c_void_p),
        ("scratch_bytes", c_size_t),
        ("threads", c_int32),
        *((name, c_void_p) for name in ("parallel", "parallel_context")),
    )


FUNCTIONS: tuple[tuple[str, type[object], list[type[object]]], ...] = (
    ("message", c_char_p, [c_int32]),
    ("codes_bytes", c_size_t, [POINTER(Weight)]),
    ("scale_count", c_size_t, [POINTER(Weight)]),
    ("scratch", c_size_t, [POINTER(Linear)]),
    ("run_linear", c_int32, [POINTER(Linear)]),
    ("gather", c_int32, [POINTER(Weight), c_void_p, c_int64, c_void_p, c_int32]),
    ("isas", c_char_p, []),
    ("isa", c_char_p, []),
    ("use_isa", c_int32, [c_char_p]),
    ("read", c_uint64, [c_void_p, c_size_t, c_int32]),
    ("repeat_linear", c_int32, [POINTER(Linear), c_int64]),
    ("multiply_bytes", c_int64, [c_int64]),
)
"""Name after paredown_, result and arguments of each function that is called from Python."""
REGISTER = "RegisterCustomOps"
"""The function that onnxruntime calls."""


@functools.cache
def problem() -> str:
    """Return why there are no kernels, "" where there are; nothing is loaded before the first call."""
    if not LIBRARY.exists():
        return MISSING
    if reason := _misfit():
        return f"{LIBRARY.name} {reason}; run pip install again"
    try:
        found = ctypes.CDLL(str(LIBRARY))
        interface = int(found.paredown_abi())
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} cannot be loaded: {error}; run pip install again"
    if interface != ABI:
        return f"{LIBRARY.name} has interface {interface}, this version needs {ABI}; run pip install again"
    names = [*(f"paredown_{name}" for name, _, _ in FUNCTIONS), REGISTER]
    absent = [name for name in names if not hasattr(found, name)]
    return f"{LIBRARY.name} lacks {', '.join(absent)}; run pip install again" if absent else ""


def available() -> bool:
    """Return whether the kernels were built and fit."""
    return not problem()


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library with its functions declared; LibraryError where it is missing or does not fit."""
    if reason := problem():
        raise LibraryError(reason)
    found = ctypes.CDLL(str(LIBRARY))
    for name, result, arguments in FUNCTIONS:
        function = getattr(found, f"paredown_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def ort_library() -> Path:
    """Return the library that onnxruntime's `register_custom_ops_library` takes: the same file."""
    if reason := problem():
        raise LibraryError(reason)
    return LIBRARY


def isas() -> tuple[str, ...]:
    """Return the instruction sets that were built in and that this processor has, best first."""
    return tuple(library().paredown_isas().decode().split(","))


def isa() -> str:
    """Return the instruction set in use."""
    return str(library().paredown_isa().decode())


def use_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; for tests and benchmarks."""
    if library().paredown_use_isa(name.encode()):
        raise ValueError(f"{name} is none of the instruction sets that run here: {', '.join(isas())}")


def read(address: int, count: int, threads: int) -> int:
    """Read memory as fast as the machine can, for benchmarks, and return its parity."""
    return int(library().paredown_read(address, count, threads))


def repeat_linear(call: Linear, times: int) -> None:
    """Round (or copy) a call's inputs once, then multiply by its weight `times` times; for benchmarks."""
    check(library().paredown_repeat_linear(ctypes.byref(call), times))


def multiply_bytes(count: int) -> int:
    """Multiply at least so many pairs of bytes in registers, on one thread, and return how many; for benchmarks."""
    return int(library().paredown_multiply_bytes(count))


def check(status: int) -> None:
    """Raise LibraryError where a call of the library did not succeed."""
    if status:
        raise LibraryError(f"the CPU kernels refuse: {library().paredown_message(status).decode()}")


def _misfit() -> str:
    """Return what keeps the library from being loaded, "" = nothing: one that lacks its end can end the process."""
    size, recorded = LIBRARY.stat().st_size, _recorded_size()
    if size < recorded:
        return f"is incomplete, {size:,} of {recorded:,} bytes"
    with LIBRARY.open("rb") as file:
        header = file.read(HEADER)
    if len(header) < HEADER or header[:6] != b"\x7fELF\x02\x01":
        return "is no 64-bit little-endian ELF file"
    (machine,) = struct.unpack_from("<H", header, 18)
    if (built := MACHINES.get(machine, f"machine {machine}")) != platform.machine():
        return f"is for {built}, this machine is {platform.machine()}"
    (sections,), (each, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    end = sections + each * count
    return f"is incomplete, {size:,} of {end:,} bytes" if size < end else ""


def _recorded_size() -> int:
    """Return the size that build.py wrote down, 0 where the record does not say it."""
    try:
        found = json.loads(LIBRARY.with_suffix(".json").read_text())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return found if isinstance(found, int) else 0
