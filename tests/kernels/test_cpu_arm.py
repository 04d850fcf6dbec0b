"""The kernels for 64-bit ARM, compiled by a cross compiler and run in an emulator of processors old and new.

Speed is not measured: an emulator's says nothing of a processor's.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from paredown.kernels.build import KERNELS, build

from .cpu_cases import INT8, grid, isas, misses, run

pytestmark = pytest.mark.slow

HARNESS = Path(__file__).with_name("cpu_harness.cpp")
NATIVE = platform.machine() == "aarch64"
PROCESSORS = {
    "max": ("i8mm", "dotprod", "neon", "portable"),
    "cortex-a76": ("dotprod", "neon", "portable"),
    "cortex-a72": ("neon", "portable"),
}
"""What QEMU calls a processor, and the instruction sets that must be found on it."""


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the program, linked with the library as wheels have it, and the root of its system libraries."""
    compiler = shutil.which("aarch64-linux-gnu-g++") or (shutil.which("g++") if NATIVE else None)
    if compiler is None:
        pytest.skip("ARM kernels not compiled: no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
    folder = tmp_path_factory.mktemp("arm")
    objects = KERNELS.parent / "build" / "kernels"
    library = build(folder / "libparedown.so", compiler=compiler, target="aarch64", objects=objects)
    program = folder / "harness"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS / 'cpu'}"]
    link = [str(library), "-Wl,-rpath,$ORIGIN", "-o", str(program)]
    subprocess.run([compiler, *flags, str(HARNESS), *link], check=True)
    found = subprocess.run([compiler, "-print-file-name=libc.so.6"], check=True, capture_output=True, text=True)
    return program, Path(found.stdout.strip()).resolve().parents[1]


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, harness: tuple[Path, Path]) -> tuple[str, list[str]]:
    """Return the name of a processor and the command that runs the harness on it."""
    program, root = harness
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if NATIVE and request.param == "max":
        return request.param, [str(program)]
    if emulator is None:
        pytest.skip("ARM kernels not run: no qemu-aarch64-static (Debian: qemu-user-static)")
    return request.param, [emulator, "-cpu", request.param, "-L", str(root), str(program)]


def test_each_processor_runs_the_instruction_sets_that_it_has(processor: tuple[str, list[str]]) -> None:
    name, command = processor
    if NATIVE and name == "max":
        assert isas(command)[-2:] == ["neon", "portable"]
    else:
        assert tuple(isas(command)) == PROCESSORS[name]


def test_every_instruction_set_is_within_the_bound_of_float64(processor: tuple[str, list[str]], tmp_path: Path) -> None:
    cases = grid()
    found = run(processor[1], cases, tmp_path)
    assert list(misses(cases, found)) == []
    best, *others = found.values()
    for other in others[:-1]:  # but the portable code, whose compiler may not fuse what the vectors fuse
        different = [
            c for c, a, b in zip(cases, best, other, strict=True) if c.mode == INT8 and not np.array_equal(a, b)
        ]
        assert different == [], "int8 sums are exact, and are scaled in one order"
