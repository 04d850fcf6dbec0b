"""The AVX-VNNI kernel where the processor has that instruction in its AVX-512 form only: the same code, other bytes.

The compiler's text is assembled with `vpdpbusd` of AVX-512VL in place of the one of AVX-VNNI; operands and sums are the
same. Where the processor has AVX-VNNI itself, test_cpu.py runs the library as it is.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from paredown.kernels.build import FLAGS, ISAS, KERNELS

from . import conv_cases
from .cpu_cases import INT8, grid, isas, misses, run

pytestmark = pytest.mark.slow

HARNESSES = [Path(__file__).with_name(f"{name}_harness.cpp") for name in ("cpu", "conv")]
SETS = ("avxvnni", "avx2", "portable")
ASKED = "bit(leaf(7, 1).a, 4)"
"""How dispatch.cpp asks for AVX-VNNI."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the harnesses of products and convolutions, with AVX-VNNI, AVX2 and the portable code."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("AVX-VNNI kernel not compiled: no C++ compiler for x86-64")
    if not {"avx512vl", "avx512_vnni"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("AVX-VNNI kernel not run: this processor has no AVX-512VL with VNNI")
    return built(compiler, tmp_path_factory.mktemp("avxvnni"))


def built(compiler: str, folder: Path) -> tuple[Path, Path]:
    cpu = KERNELS / "cpu"
    (folder / "dispatch.cpp").write_text(replaced((cpu / "dispatch.cpp").read_text(), ASKED, "true"))
    rest = [path for path in sorted(cpu.glob("*.cpp")) if not path.stem.startswith("isa_") and path.stem != "dispatch"]
    units = [(cpu / f"isa_{name}.cpp", ISAS[name][1]) for name in SETS] + [(path, ()) for path in rest]
    have = [f"-DPAREDOWN_HAVE_{name.upper()}" for name in SETS]
    common = [compiler, *FLAGS, "-O1", *have, f"-I{KERNELS}", f"-I{cpu}"]
    made = []
    for source, flags in [*units, (folder / "dispatch.cpp", ()), *((path, ()) for path in HARNESSES)]:
        made.append(folder / f"{source.stem}.s")
        subprocess.run([*common, *flags, "-S", str(source), "-o", str(made[-1])], check=True)
    text = made[0].read_text()
    made[0].write_text(replaced(text, "{vex} vpdpbusd", "vpdpbusd"))
    *kernels, linear, conv = made
    for main in (linear, conv):
        given = [*map(str, kernels), str(main), "-pthread", "-o", str(main.with_suffix(""))]
        subprocess.run([compiler, *given], check=True)
    return linear.with_suffix(""), conv.with_suffix("")


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"{old} is not written so any more"
    return text.replace(old, new)


def test_avxvnni_is_preferred_to_avx2(programs: tuple[Path, Path]) -> None:
    assert isas([str(programs[0])]) == list(SETS)


def test_products_are_within_the_bound_of_float64(programs: tuple[Path, Path], tmp_path: Path) -> None:
    cases = grid()
    found = run([str(programs[0])], cases, tmp_path)
    assert list(misses(cases, found)) == []
    for case, avxvnni, avx2 in zip(cases, found["avxvnni"], found["avx2"], strict=True):
        assert case.mode != INT8 or np.array_equal(avxvnni, avx2), (
            f"sums are exact, and are scaled in one order: {case}"
        )


def test_convolutions_are_within_the_bound_of_float64(programs: tuple[Path, Path], tmp_path: Path) -> None:
    cases = conv_cases.grid()
    found = conv_cases.run([str(programs[1])], cases, tmp_path)
    assert list(conv_cases.misses(cases, found)) == []
    for avxvnni, avx2 in zip(found["avxvnni"], found["avx2"], strict=True):
        assert np.array_equal(avxvnni, avx2)
