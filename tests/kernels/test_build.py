"""Building the library, on sources of a few lines in a folder of their own; and what elf.py reads out of the result."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from paredown.kernels import build, elf

COMPILER = build.find_compiler()
NATIVE = platform.machine()
CROSS = "aarch64-linux-gnu-g++"
REAL = Path(build.__file__).parent
needs_compiler = pytest.mark.skipif(not COMPILER, reason="kernels not built: there is no C++ compiler")

DISPATCH = """
#include "toy.h"
#include <thread>
TOY_API int answer() {
  int found = 0;
  std::thread([&] { found = ANSWER; }).join();
  return found;
}
TOY_API const char *sets() {
  return ""
#ifdef PAREDOWN_HAVE_AVX2
         "avx2 "
#endif
#ifdef PAREDOWN_HAVE_NEON
         "neon "
#endif
#ifdef PAREDOWN_HAVE_PORTABLE
         "portable";
#endif
}
"""
HEADER = """
#define TOY_API extern "C" __attribute__((visibility("default")))
#define ANSWER 42
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of kernels with a few sources, which the build then takes for ours."""
    kernels = tmp_path / "kernels"
    files = {
        "cpu/dispatch.cpp": DISPATCH,
        "cpu/toy.h": HEADER,
        "cpu/isa_portable.cpp": "int portable() { return 1; }\n",
        "cpu/isa_avx2.cpp": "#include <immintrin.h>\n__m256i avx2(__m256i x) { return _mm256_abs_epi8(x); }\n",
        "cpu/isa_neon.cpp": "#include <arm_neon.h>\nuint8x16_t neon(uint8x16_t x) { return vaddq_u8(x, x); }\n",
        "ort/register.cpp": '#include "cpu/toy.h"\nTOY_API int RegisterCustomOps() { return 0; }\n',
    }
    for name, text in files.items():
        (kernels / name).parent.mkdir(parents=True, exist_ok=True)
        (kernels / name).write_text(text)
    monkeypatch.setattr(build, "KERNELS", kernels)
    monkeypatch.delenv("CXX", raising=False)
    return kernels


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are compiled from now on."""
    names: list[str] = []
    true_run = build._run

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        if "-c" in command and Path(command[command.index("-c") + 1]).is_relative_to(build.KERNELS):
            names.append(Path(command[command.index("-c") + 1]).name)
        return true_run(command)

    monkeypatch.setattr(build, "_run", run)
    return names


def native_sets() -> tuple[str, ...]:
    return ("portable", {"x86_64": "avx2", "aarch64": "neon"}[NATIVE])


def newest_built(path: Path) -> ctypes.CDLL:
    """Load a library from a file of its own: what is loaded once under a name is not loaded again."""
    with tempfile.NamedTemporaryFile(suffix=".so", dir=path.parent, delete=False) as copy:
        copy.write(path.read_bytes())
    return ctypes.CDLL(copy.name)


@needs_compiler
def test_the_library_holds_each_set_that_the_compiler_knows(toy: Path, tmp_path: Path) -> None:
    out = build.build(tmp_path / "new/lib.so")
    library = newest_built(out)
    assert library.answer() == 42
    library.sets.restype = ctypes.c_char_p
    assert set(library.sets().decode().split()) == set(native_sets())
    made_of = build.record(out)
    assert made_of is not None
    assert (made_of.machine, made_of.isas, made_of.left_out) == (NATIVE, native_sets(), {})
    assert (made_of.sources, made_of.size) == (build.sources_digest(), out.stat().st_size)
    assert sorted(path.name for path in out.parent.glob("lib.*")) == ["lib.json", "lib.so"]
    assert not list(out.parent.glob(".*"))


@needs_compiler
def test_only_marked_symbols_are_visible(toy: Path, tmp_path: Path) -> None:
    library = elf.read(build.build(tmp_path / "lib.so"))
    assert library.exported == {"answer", "sets", "RegisterCustomOps"}
    assert library.machine == NATIVE
    assert {name.partition(".so")[0] for name in library.needed} <= {"libc", "libm", "libstdc++", "libgcc_s"}


@needs_compiler
def test_a_second_build_compiles_what_has_changed_only(toy: Path, tmp_path: Path, compiled: list[str]) -> None:
    objects, out = tmp_path / "objects", tmp_path / "lib.so"
    build.build(out, objects=objects)
    assert sorted(compiled) == sorted(["dispatch.cpp", "register.cpp", *(f"isa_{name}.cpp" for name in native_sets())])
    compiled.clear()
    build.build(out, objects=objects)
    assert compiled == []
    (toy / "cpu/toy.h").write_text(HEADER.replace("42", "43"))
    stale = build.record(out)
    assert stale is not None
    assert stale.sources != build.sources_digest()
    build.build(out, objects=objects)
    assert sorted(compiled) == ["dispatch.cpp", "register.cpp"]
    assert newest_built(out).answer() == 43
    compiled.clear()
    (toy / "cpu/isa_portable.cpp").write_text("int portable() { return 2; }\n")
    build.build(out, objects=objects)
    assert compiled == ["isa_portable.cpp"]


@needs_compiler
def test_two_builds_give_the_same_bytes(toy: Path, tmp_path: Path) -> None:
    first, second = (build.build(tmp_path / name / "lib.so").read_bytes() for name in ("a", "b"))
    assert first == second


@needs_compiler
def test_objects_that_nothing_used_are_removed(toy: Path, tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    old, new = objects / "old.o", objects / "new.o"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    build.build(tmp_path / "lib.so", objects=objects)
    assert (old.exists(), new.exists()) == (False, True)


@needs_compiler
@pytest.mark.skipif(NATIVE != "x86_64", reason="the set that is refused here is one of x86")
def test_flags_that_the_compiler_refuses_leave_a_set_out(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build.ISAS, "avx2", ("x86_64", ("-mno-such-set",)))
    made_of = build.record(build.build(tmp_path / "lib.so"))
    assert made_of is not None
    assert made_of.isas == ("portable",)
    assert "-mno-such-set" in made_of.left_out["avx2"]


@needs_compiler
def test_a_compiler_may_be_a_command_with_arguments(toy: Path, tmp_path: Path) -> None:
    assert newest_built(build.build(tmp_path / "lib.so", compiler=f"env A=1 {COMPILER}")).answer() == 42


@pytest.mark.skipif(not shutil.which(CROSS), reason=f"not compiled for another machine: {CROSS} is not installed")
def test_a_cross_compiler_builds_for_its_machine(toy: Path, tmp_path: Path) -> None:
    out = build.build(tmp_path / "lib.so", target="aarch64", compiler=CROSS)
    made_of, library = build.record(out), elf.read(out)
    assert made_of is not None
    assert (made_of.machine, made_of.isas) == ("aarch64", ("portable", "neon"))
    assert library.machine == "aarch64"
    assert re.fullmatch(r"manylinux_2_\d+_aarch64", elf.platform_tag(library))


# --- what goes wrong is told


def test_without_a_compiler_the_error_says_what_to_do(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() == ""
    with pytest.raises(build.BuildError, match=r"^there is no C\+\+ compiler; install one \(g\+\+ or clang\+\+\), or"):
        build.build(tmp_path / "lib.so")
    assert list(tmp_path.glob("*lib*")) == []


def test_a_compiler_that_does_not_answer_is_named(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"^no-such-compiler --version does not answer: .*No such file"):
        build.build(tmp_path / "lib.so")


@needs_compiler
def test_a_compiler_for_another_machine_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=rf" compiles for {NATIVE}, not for riscv64; name another compiler"):
        build.build(tmp_path / "lib.so", compiler=COMPILER, target="riscv64")


@needs_compiler
def test_what_the_compiler_says_is_in_the_error_and_the_old_library_stays(toy: Path, tmp_path: Path) -> None:
    out = build.build(tmp_path / "lib.so")
    before = out.read_bytes()
    (toy / "ort/register.cpp").write_text("no_such_type x;\n")
    with pytest.raises(build.BuildError, match=r"(?s)register\.cpp.*no_such_type"):
        build.build(out)
    (toy / "ort/register.cpp").write_text('#include "cpu/toy.h"\nvoid absent();\nTOY_API void call() { absent(); }\n')
    with pytest.raises(build.BuildError, match="absent"):  # a symbol that no library has is an error here, not at load
        build.build(out)
    assert out.read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))


@needs_compiler
def test_a_set_without_flags_is_an_error_of_ours(toy: Path, tmp_path: Path) -> None:
    (toy / "cpu/isa_sve.cpp").write_text("")
    with pytest.raises(build.BuildError, match=r"^cpu/isa_sve\.cpp has no flags; name it in ISAS"):
        build.build(tmp_path / "lib.so")


@needs_compiler
def test_a_folder_without_sources_is_told(toy: Path, tmp_path: Path) -> None:
    shutil.rmtree(toy)
    with pytest.raises(build.BuildError, match="there are no sources in"):
        build.build(tmp_path / "lib.so")


def test_kernels_are_for_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(build.BuildError, match="built on Linux only, not on plan9; all runs on the reference"):
        build.toolchain("c++")


def test_no_record_without_a_library(tmp_path: Path) -> None:
    (tmp_path / "lib.json").write_text("{}")
    assert build.record(tmp_path / "lib.so") is None


# --- the true sources


def test_every_include_of_ours_is_found() -> None:
    """A header that the scan misses would leave stale objects: all it names exist, and all there are are named."""
    files = build.source_files()
    for path in files:
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), flags=re.MULTILINE):
            places = (path.parent, REAL, REAL / "cpu")
            assert any((folder / name).resolve() in files for folder in places), f"{path.name} includes {name}"


@needs_compiler
def test_the_script_builds_in_place(toy: Path) -> None:
    shutil.copy(REAL / "build.py", toy)
    done = subprocess.run([sys.executable, "-P", toy / "build.py"], capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"libparedown\.so with {', '.join(native_sets())} in [\d.]+ s\n", done.stdout)
    assert newest_built(toy / build.LIBRARY).answer() == 42
    done = subprocess.run(
        [sys.executable, "-P", toy / "build.py"],
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("kernels not built: no-such-compiler")) == (1, 1)


# --- ELF


@pytest.mark.skipif(not shutil.which("readelf"), reason="ELF not compared: readelf is not installed")
def test_a_library_reads_as_readelf_reads_it() -> None:
    """On the C++ library of this machine, which exports and needs thousands of symbols."""
    import onnxruntime

    path = next(Path(onnxruntime.__file__).parent.glob("capi/onnxruntime_pybind11_state*.so"))
    said = {flag: readelf(flag, path) for flag in ("-hW", "-dW", "--dyn-syms")}
    library = elf.read(path)
    assert tuple(re.findall(r"\(NEEDED\).*\[(.*)\]", said["-dW"])) == library.needed
    rows = re.findall(
        r"^ *\d+: \S+ +\d+ \w+ +(\w+) +\w+ +(\w+)(?: \[.*\])? (\S+)", said["--dyn-syms"], flags=re.MULTILINE
    )
    want = [(name.partition("@")[0], where != "UND", binding == "WEAK") for binding, where, name in rows]
    assert sorted((s.name, s.defined, s.weak) for s in library.symbols) == sorted(want)
    versions = {
        name.partition("@")[0]: name.rpartition("@")[2].split()[0]
        for _, where, name in rows
        if "@" in name and where == "UND"
    }
    assert {s.name: s.version for s in library.symbols if s.version} == versions


def readelf(flag: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", flag, path], capture_output=True, text=True, check=True).stdout


def library(needed: tuple[str, ...], *versions: str) -> elf.SharedLibrary:
    symbols = [elf.Symbol(name=f"s{i}", defined=False, weak=False, version=v) for i, v in enumerate(versions)]
    return elf.SharedLibrary(machine="x86_64", needed=needed, symbols=tuple(symbols))


@pytest.mark.parametrize(
    ("needed", "versions", "tag"),
    [
        ((), (), "manylinux_2_17_x86_64"),
        (("libc.so.6",), ("GLIBC_2.2.5", "GLIBC_2.14"), "manylinux_2_17_x86_64"),
        (("libc.so.6", "libm.so.6"), ("GLIBC_2.29",), "manylinux_2_31_x86_64"),
        (("libc.so.6", "libstdc++.so.6"), ("GLIBC_2.34", "GLIBCXX_3.4.22"), "manylinux_2_34_x86_64"),
        (("libstdc++.so.6",), ("GLIBC_2.17", "GLIBCXX_3.4.30"), "manylinux_2_35_x86_64"),
        (("libgcc_s.so.1",), ("GCC_3.0",), "manylinux_2_17_x86_64"),
        (("libc.so.6",), ("GLIBC_2.99",), "linux_x86_64"),
        (("libc.so.6",), ("GLIBC_PRIVATE",), "linux_x86_64"),
        (("libc.so.6", "libgomp.so.1"), ("GOMP_4.0",), "linux_x86_64"),
        (("libc.so.6",), ("OTHER_1.0",), "linux_x86_64"),
        (("libc.musl-x86_64.so.1",), (), "linux_x86_64"),
    ],
)
def test_the_tag_is_the_oldest_that_allows_all(needed: tuple[str, ...], versions: tuple[str, ...], tag: str) -> None:
    assert elf.platform_tag(library(needed, *versions)) == tag


def test_what_is_no_library_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_text(textwrap.dedent("\x7fELF\x01\x01 of 32 bits"))
    with pytest.raises(ValueError, match=r"^x\.so is no 64-bit little-endian ELF file$"):
        elf.read(path)
