"""CUDA kernels on a CPU: g++ compiles their source against emulated.h, and every thread runs as a coroutine."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from paredown.kernels.cuda import units
from paredown.kernels.cuda.launch import ARGUMENTS, POINTERS, Launch

HERE = Path(__file__).resolve().parent


class EmulationError(AssertionError):
    """The kernel did what no GPU would forgive."""


@dataclass(frozen=True, slots=True)
class Emulator:
    """Compiles units into a folder when they are first used; with `bulk` as for Hopper."""

    folder: Path
    bulk: bool = False
    seed: int = 0

    def run(self, start: Launch, values: Mapping[str, Tensor | int]) -> None:
        """Run a kernel with arguments by name; EmulationError says what went wrong."""
        library = self._library(start.unit)
        names = ARGUMENTS.get(start.name.removeprefix("paredown_"), ARGUMENTS["linear"])
        assert set(values) == set(names), set(values) ^ set(names)
        arguments = [_number(name, values[name]) for name in names]
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        buffers = [number for tensor in tensors for number in (tensor.data_ptr(), tensor.untyped_storage().nbytes())]
        sizes = (*start.grid, start.block[0], start.shared)
        error = library.emulate(
            ctypes.cast(getattr(library, start.name), ctypes.c_void_p),
            (ctypes.c_int64 * len(arguments))(*arguments),
            len(arguments),
            (ctypes.c_int64 * 5)(*sizes),
            (ctypes.c_int64 * len(buffers))(*buffers),
            len(tensors),
            self.seed,
        )
        if error:
            raise EmulationError(f"{start.name}: {error.decode()}")

    def _library(self, unit: str) -> ctypes.CDLL:
        made = self.folder / f"{unit}.{int(self.bulk)}.so"
        if not made.exists():
            _compile(unit, made, self.bulk)
        library = ctypes.CDLL(str(made))
        library.emulate.restype = ctypes.c_char_p
        return library


def _compile(unit: str, made: Path, bulk: bool) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("CUDA kernels not emulated: there is no g++")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    defines = ["-DPAREDOWN_EMULATED", f"-DPD_BULK={int(bulk)}", f"-I{HERE}"]
    command = [compiler, *flags, *defines, "-x", "c++", "-o", str(made), str(units.FOLDER / unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _number(name: str, value: Tensor | int) -> int:
    assert isinstance(value, Tensor) == (name in POINTERS), name
    return value.data_ptr() if isinstance(value, Tensor) else value


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory in which an element that was not written shows: not a number, or -86 in bytes."""
    return torch.full(shape, -86, dtype=dtype) if dtype == torch.int8 else torch.full(shape, torch.nan, dtype=dtype)
