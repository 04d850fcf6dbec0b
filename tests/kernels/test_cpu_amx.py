"""The AMX kernel: in an emulation of its instructions everywhere, and natively where the processor has them.

So far it was run in emulation only. AVX-512 must be real in both, because all but the tile registers is.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paredown.kernels.build import FLAGS, ISAS, KERNELS

from .cpu_cases import INT8, Case, Sizes, grid, isas, misses, run

pytestmark = pytest.mark.slow

HARNESS = Path(__file__).with_name("cpu_harness.cpp")
SETS = ("amx", "avx512vnni", "portable")


@pytest.fixture(scope="module", params=["emulated", "native"])
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of a harness with AMX, AVX-512 and the portable code."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("AMX kernel not compiled: no C++ compiler for x86-64")
    features = set(Path("/proc/cpuinfo").read_text().split())
    if not {"avx512vbmi", "avx512_vnni"} <= features:
        pytest.skip("AMX kernel not run: this processor has no AVX-512 with VNNI and VBMI")
    if request.param == "native" and "amx_int8" not in features:
        pytest.skip("AMX kernel not run natively: this processor has no AMX")
    folder = tmp_path_factory.mktemp(request.param)
    emulated = ["-DPAREDOWN_AMX_EMULATED"] if request.param == "emulated" else []
    return [str(program(compiler, emulated, folder))]


def program(compiler: str, defines: list[str], folder: Path) -> Path:
    have = [f"-DPAREDOWN_HAVE_{name.upper()}" for name in SETS]
    common = [compiler, *FLAGS, "-O1", *have, *defines, f"-I{KERNELS}", f"-I{KERNELS / 'cpu'}"]
    rest = [path for path in sorted((KERNELS / "cpu").glob("*.cpp")) if not path.stem.startswith("isa_")]
    units = [(KERNELS / f"cpu/isa_{name}.cpp", ISAS[name][1]) for name in SETS] + [(path, ()) for path in rest]
    objects = []
    for source, flags in [*units, (HARNESS, ())]:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*common, *flags, "-c", str(source), "-o", objects[-1]], check=True)
    subprocess.run([compiler, *objects, "-pthread", "-o", str(folder / "harness")], check=True)
    return folder / "harness"


def test_amx_is_preferred_where_it_is(command: list[str]) -> None:
    assert isas(command) == list(SETS)


def test_amx_is_within_the_bound_of_float64(command: list[str], tmp_path: Path) -> None:
    cases = [case for case in grid() if case.mode == INT8] + tiles()
    found = run(command, cases, tmp_path)
    assert list(misses(cases, found)) == []
    for case, amx, avx512 in zip(cases, found["amx"], found["avx512vnni"], strict=True):
        assert np.array_equal(amx, avx512), f"sums are exact, and are scaled in one order: {case}"


def tiles() -> list[Case]:
    """Return every width of a tile, alone and beside wider ones, with runs of 1 to 4 steps."""
    weight = Sizes(n=48, k=1, bits=4)
    inputs = (32, 64, 96, 128, 128 + 32, 256 + 96)
    base = Case(weight=weight, mode=INT8)
    return [replace(base, weight=replace(weight, k=k), m=m, seed=m) for k in inputs for m in (*range(1, 35), 65, 100)]
