"""What `optimize doctor` says of the kernels, built or not, whole or broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from paredown.kernels import build, native
from paredown.optimizer import doctor
from paredown.optimizer.errors import RuntimeMissingError

RECORD = {"compiler": "c++ 99", "machine": "x86_64", "isas": ["portable", "avx2"], "left_out": {}, "sources": "now"}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that there is a library that fits, of a record that a test may change."""
    path = tmp_path / "libparedown.so"
    path.write_bytes(b"")
    path.with_suffix(".json").write_text(json.dumps(RECORD))
    monkeypatch.setattr(native, "LIBRARY", path)
    monkeypatch.setattr(native, "problem", lambda: "")
    monkeypatch.setattr(native, "isas", lambda: ("avx2", "portable"))
    monkeypatch.setattr(native, "isa", lambda: "avx2")
    monkeypatch.setattr(build, "sources_digest", lambda: "now")
    return path


def said(about: str, register: Callable[[Path], object] = lambda _: None) -> list[str]:
    return [line for line in doctor.examine(register) if about in line]


def test_kernels_that_were_built_are_named(library: Path) -> None:
    registered: list[Path] = []
    lines = said("CPU kernels", registered.append)
    assert registered == [library]
    assert lines[:2] == [
        "ok  CPU kernels: portable, avx2 for x86_64, by c++ 99",
        "ok  CPU kernels on this processor: avx2 in use, of avx2, portable",
    ]
    assert lines[2].startswith("ok  CPU kernels in onnxruntime ")
    assert len(lines) == 3


def test_what_the_compiler_could_not_is_named(library: Path) -> None:
    library.with_suffix(".json").write_text(json.dumps({**RECORD, "left_out": {"amx": "unrecognized option"}}))
    assert "--  CPU kernels without amx: unrecognized option" in said("CPU kernels")


def test_a_stale_library_is_told(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "sources_digest", lambda: "later")
    assert said("sources have changed")[0].startswith("--  CPU kernels: the sources have changed since; pip install it")
    library.with_suffix(".json").unlink()
    assert said("no record")[0].startswith("--  CPU kernels: libparedown.so has no record of its making; pip install")


def test_a_library_that_does_not_load_is_told(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise RuntimeMissingError("onnxruntime 1.0 does not load it: no", where=path.name, fix="build it again")

    monkeypatch.setattr(native, "problem", lambda: "libparedown.so has interface 0, this version needs 1")
    assert said("CPU kernels", refuse)[1:] == [
        "--  CPU kernels: libparedown.so has interface 0, this version needs 1",
        "--  CPU kernels in onnxruntime: libparedown.so: onnxruntime 1.0 does not load it: no; build it again",
    ]


def test_a_library_that_lacks_a_function_is_told(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise AttributeError("undefined symbol: paredown_isa")

    monkeypatch.setattr(native, "isa", absent)
    assert said("undefined symbol")[0].startswith("--  CPU kernels: undefined symbol: paredown_isa; pip install it")


@pytest.mark.parametrize(
    ("compiler", "starts"), [("c++", "pip install it again"), ("", "install a C++ compiler, then pip install it again")]
)
def test_without_a_library_it_says_what_to_do(
    compiler: str, starts: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(path: Path) -> None:
        raise AssertionError("there is nothing to load")

    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    library.unlink()
    (line,) = said("CPU kernels", never)
    assert line.startswith("--  CPU kernels: not built, so that all runs on the reference, slowly and in more memory; ")
    assert line.partition("; ")[2].startswith(starts)


def test_the_compiler_is_named_or_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = build.Toolchain(command=("c++",), version="c++ 99", machine="riscv64")
    monkeypatch.setattr(build, "toolchain", lambda _: tools)
    assert said("C++ compiler: ") == ["ok  C++ compiler: c++ 99, for riscv64"]
    monkeypatch.undo()
    monkeypatch.setattr(build, "find_compiler", lambda: "")
    assert said("--  C++ compiler: ") == [
        "--  C++ compiler: there is no C++ compiler; install one (g++ or clang++), or name one in CXX"
    ]


def test_kernels_never_run_are_called_so() -> None:
    assert len(said("never executed on a GPU")) == 1
