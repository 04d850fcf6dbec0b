"""The library's C interface from Python: found beside the package, checked once, and its absence said clearly."""

from __future__ import annotations

import ctypes
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest

from paredown import kernels
from paredown.exporters.onnx_session import session_options
from paredown.kernels import elf, native
from paredown.kernels.lut_spec import ACTIVATIONS, MODES
from paredown.optimizer.errors import RuntimeMissingError

HEADER = Path(native.__file__).parent / "cpu" / "paredown.h"
C_TYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float, "size_t": ctypes.c_size_t}
built = pytest.mark.skipif(not native.available(), reason="the CPU kernels were not built")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was found, before and after."""
    for found in (native.problem, native.library):
        found.cache_clear()
    yield
    for found in (native.problem, native.library):
        found.cache_clear()


def struct(name: str) -> list[tuple[str, str]]:
    """Return (name, type) of each member of a struct of the header; pointers are "void *"."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    (body,) = re.findall(r"typedef struct \{([^}]*)\} " + name + ";", text)
    members = []
    for line in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.match(r"((?:const )?\w+)\s+(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        members += [(part.strip(" *"), "void *" if "*" in line else kind) for part in names.split(",")]
    return members


@pytest.mark.parametrize("made", [native.Weight, native.Linear])
def test_structs_are_those_of_the_header(made: type[ctypes.Structure]) -> None:
    members = struct(f"paredown_{made.__name__.lower()}")
    assert [name for name, _ in members] == [field[0] for field in made._fields_]
    for (name, kind), field in zip(members, made._fields_, strict=True):
        assert C_TYPES.get(kind, ctypes.c_void_p) == field[1] or kind in ("void *", "paredown_parallel"), name
        assert ctypes.sizeof(C_TYPES.get(kind, ctypes.c_void_p)) == ctypes.sizeof(field[1]), name


def test_numbers_are_those_of_the_header() -> None:
    constants = {name: int(value) for name, value in re.findall(r"PAREDOWN_(\w+) = (\d+)", HEADER.read_text())}
    assert constants["ABI"] == native.ABI
    types = native.U8, native.F16, native.BF16, native.F32
    assert [constants[name] for name in ("U8", "F16", "BF16", "F32")] == [*types]
    assert [constants[mode.upper()] for mode in MODES] == [0, 1]
    assert [constants[name.upper() or "NONE"] for name in ACTIVATIONS] == [*range(5)]


def test_importing_loads_nothing() -> None:
    code = (
        "import paredown.kernels, paredown.kernels.native as n, paredown.kernels.lut_linear, sys\n"
        "assert n.problem.cache_info().currsize == 0 and n.library.cache_info().currsize == 0\n"
        "assert 'onnx' not in sys.modules and 'libparedown' not in open('/proc/self/maps').read()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("fresh")
def test_a_library_that_was_not_built_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libparedown.so")
    assert not native.available()
    text = "the CPU kernels were not built: install a C\\+\\+ compiler and run pip install again, see optimize doctor"
    for ask in (kernels.ort_library, native.library, native.isas):
        with pytest.raises(native.LibraryError, match=text):
            ask()


@pytest.mark.usefixtures("fresh")
def test_a_file_that_is_no_library_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libparedown.so")
    native.LIBRARY.write_bytes(b"no library")
    assert native.problem() == "libparedown.so is no 64-bit little-endian ELF file; run pip install again"
    native.problem.cache_clear()
    native.LIBRARY.write_bytes(elf_header(platform.machine()))
    assert re.fullmatch(r"libparedown.so cannot be loaded: .*; run pip install again", native.problem())


def elf_header(machine: str) -> bytes:
    """Return the header of an ELF file without sections."""
    (number,) = [number for number, name in elf.MACHINES.items() if name == machine]
    return b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + pack("<HHI", 3, number, 1) + bytes(40)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("recorded", ["size", "no size", "no record", "no json"])
@built
def test_a_library_that_lacks_its_end_is_never_loaded(
    recorded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = native.LIBRARY.read_bytes()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libparedown.so")
    record = {"size": json.dumps({"size": len(whole)}), "no size": "{}", "no json": '{"size": 1'}
    if recorded in record:
        native.LIBRARY.with_suffix(".json").write_text(record[recorded])
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("it was loaded"))
    for size in (len(whole) - 1, len(whole) // 2, 5000):
        native.LIBRARY.write_bytes(whole[:size])
        native.problem.cache_clear()
        why = f"libparedown.so is incomplete, {size:,} of {len(whole):,} bytes; run pip install again"
        assert native.problem() == why
        with pytest.raises(RuntimeMissingError, match=f"{re.escape(why)}; or run without kernels"):
            session_options(library=native.LIBRARY)


@pytest.mark.usefixtures("fresh")
@built
def test_the_record_says_the_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = native.LIBRARY.stat().st_size
    monkeypatch.setattr(native, "LIBRARY", Path(shutil.copy(native.LIBRARY, tmp_path)))
    native.LIBRARY.with_suffix(".json").write_text(json.dumps({"size": size}))
    assert native.problem() == ""
    native.problem.cache_clear()
    native.LIBRARY.with_suffix(".json").write_text(json.dumps({"size": size + 1}))
    assert native.problem() == f"libparedown.so is incomplete, {size:,} of {size + 1:,} bytes; run pip install again"


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_machine_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = platform.machine()
    other = next(name for name in elf.MACHINES.values() if name != here)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libparedown.so")
    native.LIBRARY.write_bytes(elf_header(other))
    assert native.problem() == f"libparedown.so is for {other}, this machine is {here}; run pip install again"


@pytest.mark.usefixtures("fresh")
@built
def test_a_library_that_lacks_functions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FUNCTIONS", (*native.FUNCTIONS, ("hum", ctypes.c_int32, [])))
    monkeypatch.setattr(native, "REGISTER", "RegisterNothing")
    assert native.problem() == "libparedown.so lacks paredown_hum, RegisterNothing; run pip install again"


@pytest.mark.usefixtures("fresh")
@built
def test_another_interface_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert native.problem() == "libparedown.so has interface 1, this version needs 2; run pip install again"


@built
def test_instruction_sets_are_listed_and_chosen() -> None:
    before = native.isa()
    assert before == native.isas()[0]
    assert native.isas()[-1] == "portable"
    try:
        for name in native.isas():
            native.use_isa(name)
            assert native.isa() == name
        with pytest.raises(ValueError, match=r"mmx is none of the instruction sets that run here: .*portable"):
            native.use_isa("mmx")
    finally:
        native.use_isa(before)


@built
def test_a_refusal_says_why() -> None:
    with pytest.raises(native.LibraryError, match="the CPU kernels refuse: layout c16 or this mode does not allow"):
        native.check(1)
    native.check(0)
    assert kernels.ort_library() == native.LIBRARY
