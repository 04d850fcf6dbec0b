"""The int8 convolution: every instruction set that runs here or in an emulator, against float64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from paredown.kernels.build import KERNELS, build

from . import cpu_cases
from .conv_cases import Conv, grid, misses, run

HARNESS = Path(__file__).with_name("conv_harness.cpp")
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS / 'cpu'}"]


@pytest.fixture(scope="module")
def harness(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of a program that runs files of convolutions, with the installed library."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("kernels not checked: no C++ compiler")
    program = tmp_path_factory.mktemp("harness") / "harness"
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    subprocess.run([compiler, *FLAGS, str(HARNESS), *link], check=True)
    return [str(program)]


def check(program: list[str], cases: list[Conv], folder: Path) -> None:
    found = run(program, cases, folder)
    assert list(misses(cases, found)) == []
    best, *others = found.values()
    for other in others[:-1]:  # but the portable code, whose compiler may not fuse what the vectors fuse
        assert all(np.array_equal(a, b) for a, b in zip(best, other, strict=True))


def test_every_instruction_set_is_within_the_bound_of_float64(harness: list[str], tmp_path: Path) -> None:
    check(harness, grid(), tmp_path)


def test_a_value_that_rounds_to_nothing_gives_the_bias(harness: list[str], tmp_path: Path) -> None:
    case = Conv(n=3, channels=1, kernel=(1, 1), pad=(0, 0, 0, 0), size=(2, 2))
    for results in run(harness, [case], tmp_path).values():
        assert results[0].shape == (1, 3, 2, 2)
        assert np.isfinite(results[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["max", "cortex-a76", "cortex-a72"])
def test_arm_processors_give_the_same(processor: str, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("ARM kernels not run: no aarch64-linux-gnu-g++ or qemu-aarch64-static")
    objects = KERNELS.parent / "build" / "kernels"
    library = build(tmp_path / "libparedown.so", compiler=compiler, target="aarch64", objects=objects)
    program = tmp_path / "harness"
    link = [str(library), "-Wl,-rpath,$ORIGIN", "-o", str(program)]
    subprocess.run([compiler, *FLAGS, str(HARNESS), *link], check=True)
    found = subprocess.run([compiler, "-print-file-name=libc.so.6"], check=True, capture_output=True, text=True)
    root = Path(found.stdout.strip()).resolve().parents[1]
    command = [emulator, "-cpu", processor, "-L", str(root), str(program)]
    assert cpu_cases.isas(command)[-2:] == ["neon", "portable"]
    check(command, grid(), tmp_path)
