"""Compile CUDA source to a cubin or PTX with NVRTC, by ctypes: no driver, GPU, toolkit or host compiler is needed.

The library comes with torch's CUDA wheels, with `nvidia-cuda-nvrtc` (`nvidia-cuda-nvrtc-cu12` for CUDA 12) and with a
CUDA toolkit. Several may be there: a driver of CUDA 12 does not load what NVRTC 13 makes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAJORS = (13, 12)
"""Versions of CUDA that we look for, newest first."""
NAME = "libnvrtc.so"
_SUCCESS = 0


class NvrtcError(RuntimeError):
    """NVRTC refused; the message holds its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A translation unit and the texts that it includes, by the name in `#include`."""

    name: str
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """One NVRTC library: its path (or its name, for the dynamic linker) and its version, (13, 0)."""

    path: str
    version: tuple[int, int]


@functools.cache
def compilers() -> tuple[Compiler, ...]:
    """Return every NVRTC that is here and answers, one of each major version, newest first."""
    found = [compiler for major in MAJORS if (compiler := _first(major)) is not None]
    return tuple(sorted(found, key=lambda compiler: compiler.version, reverse=True))


def compile_cubin(source: Source, architecture: str, flags: Sequence[str], compiler: Compiler) -> bytes:
    """Compile for a real architecture, "sm_90a"; NvrtcError holds the compiler's log."""
    return _compile(source, architecture, flags, compiler, "CUBIN")


def compile_ptx(source: Source, architecture: str, flags: Sequence[str], compiler: Compiler) -> bytes:
    """Compile for a virtual architecture, "compute_80"."""
    return _compile(source, architecture, flags, compiler, "PTX").rstrip(b"\0")


def library_folders() -> list[Path]:
    """Return where NVRTC may be: beside the CUDA wheels of this Python, then in the toolkit."""
    wheels = [path for entry in sys.path for path in sorted(Path(entry or ".", "nvidia").glob("*/lib"))]
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return wheels + [Path(home, lib) for home in homes if home for lib in ("lib64", "lib")]


def _first(major: int) -> Compiler | None:
    name = f"{NAME}.{major}"
    there = [str(folder / name) for folder in library_folders() if (folder / name).exists()]
    for path in (*there, name):
        try:
            return Compiler(path=path, version=_version(_library(path)))
        except OSError:  # absent, or made for another machine
            continue
    return None


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    """Load NVRTC, and first its built-ins: it opens them by name at the first compilation, from no folder of ours."""
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else []:
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(path)


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def _compile(source: Source, architecture: str, flags: Sequence[str], compiler: Compiler, result: str) -> bytes:
    library = _library(compiler.path)
    options = [f"--gpu-architecture={architecture}", *flags]
    program = _create(library, source)
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), arguments)
        if status != _SUCCESS:
            log = _text(library, program, "ProgramLog").rstrip(b"\0\n").decode(errors="replace")
            said = log or _message(library, status)
            version = ".".join(map(str, compiler.version))
            raise NvrtcError(f"NVRTC {version} does not compile {source.name} for {architecture}:\n{said}")
        return _text(library, program, result)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _create(library: ctypes.CDLL, source: Source) -> ctypes.c_void_p:
    program, count = ctypes.c_void_p(), len(source.headers)
    strings = ctypes.c_char_p * count
    status = library.nvrtcCreateProgram(
        ctypes.byref(program),
        source.text.encode(),
        source.name.encode(),
        count,
        strings(*(text.encode() for text in source.headers.values())),
        strings(*(name.encode() for name in source.headers)),
    )
    _check(library, status, "nvrtcCreateProgram")
    return program


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer), f"nvrtcGet{what}")
    return buffer.raw


def _check(library: ctypes.CDLL, status: int, what: str) -> None:
    if status != _SUCCESS:
        raise NvrtcError(f"{what}: {_message(library, status)}")


def _message(library: ctypes.CDLL, status: int) -> str:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return str(library.nvrtcGetErrorString(status).decode())
