#!/usr/bin/env python3
"""Compile the CPU kernels to one shared library. setup.py calls this; `python kernels/build.py` builds in place.

One object per source file, each `cpu/isa_<name>.cpp` with the flags of its instruction set: which of them a processor
has is asked at run time, so a library made here runs on any processor of its family. A compiler that does not know the
flags of a set leaves that set out, and the record beside the library says so. Objects are named by what they were made
of, so that a second build compiles what has changed only. This file imports nothing of the package: setup.py loads it
before the package is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
LIBRARY = "libparedown.so"
FOLDERS = ("cpu", "ort")
"""Where the sources are: the kernels, and their operators for onnxruntime."""

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    # Every instruction set computes the same: no fused operation that the source does not ask for.
    *("-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-pthread"),
)
LINK = (
    *("-shared", "-pthread", "-Wl,--no-undefined", "-Wl,-z,relro,-z,now,-z,noexecstack", "-Wl,--gc-sections", "-s"),
    # dlopen, which looks for a CUDA driver, is in a library of its own before glibc 2.34.
    "-ldl",
    # onnxruntime closes the library with the last session that uses it; its threads and operators must stay.
    "-Wl,-z,nodelete",
)

EXPORTED = "{ local: _Z*; };\n"
"""The linker's version script: templates of the standard library are visible whatever flags the compiler has."""

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni")
ISAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "portable": ("", ()),
    "avx2": ("x86_64", AVX2),
    "avxvnni": ("x86_64", (*AVX2, "-mavxvnni")),
    "avx512vnni": ("x86_64", AVX512),
    "amx": ("x86_64", (*AVX512, "-mamx-tile", "-mamx-int8")),
    "neon": ("aarch64", ()),
    "dotprod": ("aarch64", ("-march=armv8.2-a+dotprod",)),
    "i8mm": ("aarch64", ("-march=armv8.2-a+dotprod+i8mm",)),
}
"""Instruction set -> machine ("" = all) and flags of `cpu/isa_<name>.cpp`.

The other files are told by -DPAREDOWN_HAVE_<NAME> which of these there are."""

JOBS = min(2, os.cpu_count() or 1)
KEPT = 7 * 24 * 3600.0
"""Seconds after which an object that nothing used is removed from the folder of objects."""


class BuildError(RuntimeError):
    """The library cannot be built; the message says what to do, or what the compiler said."""


@dataclass(frozen=True)
class Record:
    """What a library was made of, as written beside it; `size` is its own, in bytes (0: by an older version)."""

    compiler: str
    machine: str
    isas: tuple[str, ...]
    left_out: dict[str, str]
    sources: str
    size: int = 0


@dataclass(frozen=True)
class Toolchain:
    """A compiler that answers: its command, the line in which it names itself, and the machine it compiles for."""

    command: tuple[str, ...]
    version: str
    machine: str


@dataclass(frozen=True)
class Unit:
    """One source file with the flags that are its own."""

    source: Path
    flags: tuple[str, ...]


def build(out: Path, *, compiler: str | None = None, target: str | None = None, objects: Path | None = None) -> Path:
    """Compile the library to `out`, with its record beside it, and return `out`.

    `compiler` is a command, by default $CXX or the first of `COMPILERS`; `target` the machine that it must compile for
    ("aarch64"), by default whatever it compiles for; `objects` a folder to keep objects in from one build to the next.
    Raise BuildError where there is no compiler, or where it refuses the sources.
    """
    tools = toolchain(compiler or find_compiler(target), target)
    if objects is None:
        with tempfile.TemporaryDirectory() as folder:
            return _build(out, tools, Path(folder))
    return _build(out, tools, objects)


def find_compiler(target: str | None = None) -> str:
    """Return the command of a C++ compiler for `target` ("" = none): $CXX, or the first that is on the path."""
    names = COMPILERS if target in (None, platform.machine()) else (f"{target}-linux-gnu-g++",)
    return os.environ.get("CXX", "") or next((name for name in names if shutil.which(name)), "")


def toolchain(compiler: str, target: str | None = None) -> Toolchain:
    """Ask a compiler for its name and its machine; raise BuildError if it does not answer or is for another target."""
    if sys.platform != "linux":
        raise BuildError(f"the kernels are built on Linux only, not on {sys.platform}; all runs on the reference")
    if not compiler:
        raise BuildError("there is no C++ compiler; install one (g++ or clang++), or name one in CXX")
    command = tuple(shlex.split(compiler))
    version = _answer([*command, "--version"]).partition("\n")[0]
    machine = _answer([*command, "-dumpmachine"]).partition("-")[0].strip()
    if target is not None and machine != target:
        raise BuildError(f"{compiler} compiles for {machine}, not for {target}; name another compiler in CXX")
    return Toolchain(command=command, version=version, machine=machine)


def record(library: Path) -> Record | None:
    """Read the record of a library; None where there is no library or no record."""
    path = library.with_suffix(".json")
    if not (library.exists() and path.exists()):
        return None
    found = json.loads(path.read_text())
    return Record(**{**found, "isas": tuple(found["isas"])})


def sources_digest() -> str:
    """Return a hash of all files that the library is made of, to tell a stale library by."""
    named = [(path.relative_to(KERNELS).as_posix(), path.read_bytes()) for path in source_files()]
    return _hash(*(part for name, data in named for part in (name.encode(), data)))


def _build(out: Path, tools: Toolchain, objects: Path) -> Path:
    objects.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = sources_digest()
    isas, left_out = _instruction_sets(tools)
    with ThreadPoolExecutor(JOBS) as pool:
        made = list(pool.map(lambda unit: _compile(unit, tools, objects), _units(tools, isas)))
    _drop_unused(objects)
    _link(made, tools, out)
    made_of = Record(
        compiler=tools.version,
        machine=tools.machine,
        isas=isas,
        left_out=left_out,
        sources=digest,
        size=out.stat().st_size,
    )
    _replace(out.with_suffix(".json"), lambda path: path.write_text(json.dumps(asdict(made_of), indent=1) + "\n"))
    return out


def _instruction_sets(tools: Toolchain) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the sets to build for this machine, and those that the compiler cannot, with the reason."""
    present = [path.stem[len("isa_") :] for path in sorted((KERNELS / "cpu").glob("isa_*.cpp"))]
    unknown = [name for name in present if name not in ISAS]
    if unknown:
        raise BuildError(f"cpu/isa_{unknown[0]}.cpp has no flags; name it in ISAS of kernels/build.py")
    ours = [name for name in ISAS if name in present and ISAS[name][0] in ("", tools.machine)]
    refusals = {name: _refusal(tools, ISAS[name][1]) for name in ours}
    return tuple(n for n in ours if not refusals[n]), {name: why for name, why in refusals.items() if why}


def _refusal(tools: Toolchain, flags: tuple[str, ...]) -> str:
    """Return "" if the compiler and its assembler take the flags, else what it said."""
    if not flags:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("int empty;\n")
        done = _run([*tools.command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))])
    said = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (said[0] if said else f"exit {done.returncode}").replace(str(source), "")


def _units(tools: Toolchain, isas: Sequence[str]) -> list[Unit]:
    """Return what to compile, instruction sets first: they take longest."""
    have = tuple(f"-DPAREDOWN_HAVE_{name.upper()}" for name in isas)
    units = [Unit(source=KERNELS / f"cpu/isa_{name}.cpp", flags=(*FLAGS, *ISAS[name][1])) for name in isas]
    rest = [path for folder in FOLDERS for path in sorted((KERNELS / folder).glob("*.cpp")) if path.stem[:4] != "isa_"]
    if not units and not rest:
        raise BuildError(f"there are no sources in {KERNELS}; this installation lacks files")
    return units + [Unit(source=path, flags=(*FLAGS, *have)) for path in rest]


def _compile(unit: Unit, tools: Toolchain, objects: Path) -> Path:
    """Compile a file to an object, unless there is one of the same compiler, flags, source and headers."""
    texts = [path.read_bytes() for path in _includes(unit.source)]
    key = _hash("\0".join((*tools.command, tools.version, *unit.flags)).encode(), *texts)
    made = objects / f"{tools.machine}-{unit.source.stem}-{key[:24]}.o"
    if made.exists():
        os.utime(made)
        return made
    command = [*tools.command, *unit.flags, f"-I{KERNELS}", f"-I{KERNELS / 'cpu'}", "-c", str(unit.source), "-o"]
    _replace(made, lambda path: _checked([*command, str(path)]))
    return made


def _link(objects: list[Path], tools: Toolchain, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "exported")
        script.write_text(EXPORTED)
        names = (f"-Wl,-soname,{LIBRARY}", f"-Wl,--version-script={script}")
        command = [*tools.command, *map(str, objects), *LINK, *names, "-o"]
        _replace(out, lambda path: _checked([*command, str(path)]))


def _includes(source: Path) -> list[Path]:
    """Return the file and all that it includes of ours, in the order met; a directive in #if 0 counts too."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        places = ([folder / name for folder in (path.parent, KERNELS, KERNELS / "cpu")] for name in names)
        waiting += [existing[0].resolve() for options in places if (existing := [p for p in options if p.exists()])]
    return found


def source_files() -> list[Path]:
    """Return the .cpp files of all machines and what they include, sorted."""
    sources = [path for folder in FOLDERS for path in (KERNELS / folder).glob("*.cpp")]
    return sorted({path for source in sources for path in _includes(source)})


def _drop_unused(objects: Path) -> None:
    for path in objects.glob("*.o"):
        if time.time() - path.stat().st_mtime > KEPT:
            path.unlink(missing_ok=True)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then move it there: nobody sees half of it, who has it open keeps the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _checked(command: list[str]) -> None:
    done = _run(command)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip() or f'exit {done.returncode}'}")


def _answer(command: list[str]) -> str:
    done = _run(command)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} does not answer: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler; one that cannot be started has exit status 127, as in a shell."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _hash(*parts: bytes) -> str:
    sizes = b",".join(b"%d" % len(part) for part in parts)
    return hashlib.sha256(b"\0".join((sizes, *parts))).hexdigest()


if __name__ == "__main__":
    started = time.monotonic()
    try:
        library = build(KERNELS / LIBRARY, objects=KERNELS.parent / "build" / "kernels")
    except BuildError as error:
        sys.exit(f"kernels not built: {error}")
    made_of = record(library)
    assert made_of is not None
    print(f"{library.name} with {', '.join(made_of.isas)} in {time.monotonic() - started:.1f} s")
    for name, why in made_of.left_out.items():
        print(f"without {name}: {why}")
