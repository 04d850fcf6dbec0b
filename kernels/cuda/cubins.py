"""Compile the CUDA kernels ahead of time: cubins for the architectures that we name, and PTX for later ones.

    python -m paredown.kernels.cuda.cubins

Each architecture is compiled by CUDA 12 if such a compiler is here and knows it, else by CUDA 13: a driver of CUDA 12
(JetPack 6) loads only what a compiler of CUDA 12 made, a driver of CUDA 13 loads both. A compiler is nvcc (on the path,
or in $CUDA_HOME) or NVRTC. Like kernels/build.py, this needs nothing but the standard library.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from . import image, nvrtc, units
from .sources import ARCHITECTURES, FLAGS, UNITS

FOLDER = units.FOLDER / "cubin"
MANIFEST = "manifest.json"
VIRTUAL = "compute_80"
"""The architecture of the PTX, which drivers compile for every GPU from 8.0 on that has no cubin."""
FIRST_OF_13 = 100
"""From this capability on CUDA 13 compiles: 12.x called Thor sm_101, and its drivers are of CUDA 13 in any case."""
JOBS = min(2, os.cpu_count() or 1)


class CubinError(RuntimeError):
    """There is no compiler, or it refuses the sources: the message says what to do, or what the compiler said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One file of the folder: what it was made of, for what, and which driver can load it."""

    file: str
    unit: str
    architecture: str
    compiler: str
    generation: int
    driver: tuple[int, int]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvcc:
    """An nvcc: its path and its version, (13, 0)."""

    path: str
    version: tuple[int, int]


def build(out: Path = FOLDER, architectures: Sequence[str] = ARCHITECTURES) -> tuple[Made, ...]:
    """Compile every unit for every architecture, and to PTX, with a manifest; return what was made.

    Files of `out` that the manifest does not name are removed. CubinError where there is no compiler.
    """
    available = compilers()
    if not available:
        raise CubinError(
            "there is no CUDA compiler; put nvcc on the path, or: pip install nvidia-cuda-nvrtc nvidia-cuda-nvrtc-cu12"
        )
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(unit, target) for unit in UNITS for target in (*architectures, VIRTUAL)]
    with ThreadPoolExecutor(JOBS) as pool:
        made = tuple(pool.map(lambda job: _make(job[0], job[1], available, out), jobs))
    (out / MANIFEST).write_text(json.dumps([asdict(entry) for entry in made], indent=1) + "\n")
    for stale in {path.name for path in out.iterdir()} - {MANIFEST, *(entry.file for entry in made)}:
        (out / stale).unlink()
    return made


def manifest(folder: Path) -> tuple[Made, ...]:
    """Return what the folder holds; nothing where it was not built."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return ()
    return tuple(Made(**{**entry, "driver": tuple(entry["driver"])}) for entry in entries)


@functools.cache
def compilers() -> tuple[Nvcc | nvrtc.Compiler, ...]:
    """Return the compilers that are here, CUDA 12 first, nvcc before NVRTC."""
    found: list[Nvcc | nvrtc.Compiler] = [*_nvccs(), *nvrtc.compilers()]
    return tuple(sorted(found, key=lambda compiler: compiler.version[0]))


def compiler_for(target: str, available: Sequence[Nvcc | nvrtc.Compiler]) -> Nvcc | nvrtc.Compiler:
    """Return the compiler for an architecture, the first that suits; CubinError if none does."""
    newer = target != VIRTUAL and image.capability(target) >= FIRST_OF_13
    for compiler in available:
        if not newer or compiler.version[0] >= 13:
            return compiler
    raise CubinError(f"{target} needs a compiler of CUDA 13; pip install nvidia-cuda-nvrtc")


def compile_image(unit: str, target: str, compiler: Nvcc | nvrtc.Compiler) -> bytes:
    """Return a unit compiled to a cubin, or to PTX for `VIRTUAL`; CubinError if it is refused."""
    if isinstance(compiler, Nvcc):
        return _run_nvcc(unit, target, compiler)
    make = nvrtc.compile_ptx if target == VIRTUAL else nvrtc.compile_cubin
    try:
        return make(units.read(unit), target, FLAGS, compiler)
    except nvrtc.NvrtcError as error:
        raise CubinError(str(error)) from error


def _make(unit: str, target: str, available: Sequence[Nvcc | nvrtc.Compiler], out: Path) -> Made:
    compiler = compiler_for(target, available)
    data = compile_image(unit, target, compiler)
    name = f"{Path(unit).stem}.{target}.{'ptx' if target == VIRTUAL else 'cubin'}"
    (out / name).write_bytes(data)
    major, minor = compiler.version
    generation = major if target == VIRTUAL else image.read_header(data).generation
    return Made(
        file=name,
        unit=unit,
        architecture=target,
        compiler=f"{'nvcc' if isinstance(compiler, Nvcc) else 'NVRTC'} {major}.{minor}",
        generation=generation,
        # A driver runs the cubins of its major version, but compiles PTX only up to its own minor one.
        driver=(major, minor) if target == VIRTUAL else (generation, 0),
        digest=units.digest(units.read(unit)),
    )


def _run_nvcc(unit: str, target: str, compiler: Nvcc) -> bytes:
    kind = "-ptx" if target == VIRTUAL else "-cubin"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "out")
        command = [compiler.path, kind, f"-arch={target}", *FLAGS, f"-I{units.FOLDER}", f"-I{units.FOLDER.parent}"]
        done = subprocess.run(
            [*command, "-o", str(made), str(units.FOLDER / unit)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CubinError(f"nvcc does not compile {unit} for {target}:\n{(done.stderr or done.stdout).strip()}")
        return made.read_bytes()


def _nvccs() -> list[Nvcc]:
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    paths = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    found = {
        version: Nvcc(path=path, version=version) for path in reversed(paths) if path and (version := _asked(path))
    }
    return list(found.values())


def _asked(nvcc: str) -> tuple[int, int] | None:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


if __name__ == "__main__":
    try:
        for entry in build():
            print(f"{entry.file}: {entry.compiler}, for drivers of CUDA {'.'.join(map(str, entry.driver))} on")
    except CubinError as error:
        raise SystemExit(f"cubins not built: {error}") from None
