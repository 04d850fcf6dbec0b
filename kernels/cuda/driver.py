"""The CUDA driver, by ctypes: load compiled kernels and launch them. Nothing is linked, so that all imports anywhere.

Every function that takes `device` (the index that torch uses) works in the primary context of that device, which torch
and onnxruntime use too. None allocates memory or waits for the GPU; loading a module may do both, launching never.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"
STATIC_SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory per block that a kernel may have without asking (CUDA programming guide)."""
_ALL_BITS = 2**64 - 1
_MAX_DYNAMIC_SHARED = 8
_MAJOR, _MINOR = 75, 76
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES; CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


class CudaError(RuntimeError):
    """A call of the driver failed; the message names it and what the driver said."""


class NoDriverError(CudaError):
    """There is no CUDA driver on this machine, or no GPU that it drives."""


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel of a loaded module, and the bytes of dynamic shared memory of its blocks; it is never unloaded."""

    name: str
    device: int
    handle: int
    shared: int


@dataclass(frozen=True, slots=True)
class Module:
    """Code that was loaded on a device; it is never unloaded, since a captured graph may still launch it."""

    device: int
    handle: int

    def function(self, name: str, shared: int = 0) -> Function:
        """Return a kernel, with leave to use that much dynamic shared memory; CudaError if there is none so named."""
        found = ctypes.c_void_p()
        with _current(self.device):
            module = ctypes.c_void_p(self.handle)
            _call("cuModuleGetFunction", ctypes.byref(found), module, name.encode(), detail=name)
            if shared > STATIC_SHARED_LIMIT:
                _call("cuFuncSetAttribute", found, _MAX_DYNAMIC_SHARED, shared)
        return Function(name, self.device, found.value or 0, shared)


def version() -> tuple[int, int]:
    """Return the newest CUDA that the driver runs, (13, 0)."""
    number = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(number))
    return number.value // 1000, number.value % 1000 // 10


def device_count() -> int:
    """Return how many GPUs there are."""
    number = ctypes.c_int()
    _call("cuDeviceGetCount", ctypes.byref(number))
    return number.value


def device_name(device: int) -> str:
    """Return what the driver calls a GPU."""
    text = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", text, len(text), _handle(device))
    return text.value.decode()


def capability(device: int) -> int:
    """Return the compute capability of a GPU as one number: 87 for an Orin."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    for number, attribute in ((major, _MAJOR), (minor, _MINOR)):
        _call("cuDeviceGetAttribute", ctypes.byref(number), attribute, _handle(device))
    return major.value * 10 + minor.value


def load(image: bytes, device: int) -> Module:
    """Load a cubin, or PTX that the driver compiles; CudaError if it is not for this device or driver."""
    module = ctypes.c_void_p()
    with _current(device):
        _call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
    return Module(device, module.value or 0)


def launch(
    function: Function, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Sequence[int], stream: int
) -> None:
    """Start a kernel on a stream (a CUstream as a number, 0 for the default one) and return at once.

    `arguments` are device pointers and int32: each has 8 bytes here, of which the driver takes as many as it needs.
    """
    count = len(arguments)
    values = (ctypes.c_uint64 * count)(*(value & _ALL_BITS for value in arguments))
    start = ctypes.addressof(values)
    places = (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
    kernel, queue = ctypes.c_void_p(function.handle), ctypes.c_void_p(stream)
    with _current(function.device):
        _call("cuLaunchKernel", kernel, *grid, *block, function.shared, queue, places, None, detail=function.name)


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NoDriverError(f"there is no CUDA driver here: {error}") from None
    status = library.cuInit(0)
    if status:
        raise NoDriverError(f"the CUDA driver does not start: {_message(library, status)}")
    return library


@functools.cache
def _handle(device: int) -> int:
    handle = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), device)
    return handle.value


@functools.cache
def _context(device: int) -> int:
    """Return the primary context, retained for the life of the process: kernels and graphs stay valid."""
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _handle(device))
    return context.value or 0


@contextmanager
def _current(device: int) -> Iterator[None]:
    """Make the context of a device the current one of this thread; where it is already, two calls are saved."""
    wanted, now = _context(device), ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(now))
    if now.value == wanted:
        yield
        return
    _call("cuCtxPushCurrent_v2", ctypes.c_void_p(wanted))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(now))


def _call(name: str, *arguments: object, detail: str = "") -> None:
    library = _driver()
    status = getattr(library, name)(*arguments)
    if status:
        raise CudaError(f"{name}{f' of {detail}' if detail else ''}: {_message(library, status)}")


def _message(library: ctypes.CDLL, status: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    known = not library.cuGetErrorName(status, ctypes.byref(name)) and not library.cuGetErrorString(
        status, ctypes.byref(text)
    )
    return f"{(name.value or b'').decode()}, {(text.value or b'').decode()}" if known else f"status {status}"
