"""Wheels: they hold what the repository holds and the kernels, and work in an environment of their own."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from paredown.kernels import build, elf
from paredown.kernels.cuda import sources

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("optimizer", "kernels", "exporters", "bench")
NOT_SHIPPED = "bench/results/"
"""Measured figures: part of the repository, not of the program."""

LIBRARY, RECORD = BUILT = ("kernels/libparedown.so", "kernels/libparedown.json")
"""What is built into the package where there is a compiler."""
COMPILER = build.find_compiler()
CROSS = "aarch64-linux-gnu-g++"
LOADER = {"x86_64": "ld-linux-x86-64", "aarch64": "ld-linux-aarch64"}.get(platform.machine(), "")

needs_compiler = pytest.mark.skipif(not COMPILER, reason="kernels not built: there is no C++ compiler")
pytestmark = pytest.mark.slow


def tracked() -> list[str]:
    """Return the files of the repository: in git or about to be; a skip where there is no git."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("wheel not built: git or its repository is absent")
    return [name for name in found if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository, so that nothing that lies about gets in."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this machine."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def build_wheel(source: Path, out: Path, **environment: str) -> Path:
    """Build a wheel as a user would; a compiler that is here and fails is an error."""
    command = [sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, source]
    run(command, PAREDOWN_KERNELS="required" if COMPILER else "auto", **environment)
    (built,) = out.glob("paredown-*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a fresh environment; what it depends on comes from the environment of the tests.

    A path in a .pth file adds that folder's modules but not its own .pth files, so the editable install stays out.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    binaries = folder / "bin"
    run([sys.executable, "-P", "-m", "pip", "--python", binaries / "python", "install", "-q", "--no-deps", wheel])
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


def run(command: list[str | Path], cwd: Path | None = None, **environment: str) -> str:
    """Run a command without what would lead it back to this checkout; return its output."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean["PAREDOWN_OBJECTS"] = str(ROOT / "build" / "kernels")  # named by their contents: compiled once for all builds
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def contents(wheel: Path) -> list[str]:
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


def expected(*built: str) -> list[str]:
    """Return what a wheel must hold: our files, and of what is built these."""
    ours = [name for name in tracked() if name.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    return sorted(f"paredown/{name}" for name in (*ours, *built) if not name.startswith(NOT_SHIPPED))


def dist_info(wheel: Path, name: str) -> str:
    (found,) = (entry for entry in zipfile.ZipFile(wheel).namelist() if entry.endswith(f".dist-info/{name}"))
    return found


def library_of(wheel: Path, folder: Path) -> elf.SharedLibrary:
    return elf.read(Path(zipfile.ZipFile(wheel).extract(f"paredown/{LIBRARY}", folder)))


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    assert contents(wheel) == expected(*(BUILT if COMPILER else ()))


@needs_compiler
def test_the_wheel_is_named_by_what_its_library_needs(
    wheel: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Any Python 3; the platform follows from the versions of symbols, and this machine can install it."""
    library = library_of(wheel, tmp_path)
    record_property("newest symbols", library.newest)
    assert wheel.stem.split("-")[2:] == ["py3", "none", elf.platform_tag(library)]
    assert library.machine == platform.machine()
    assert "Root-Is-Purelib: false" in zipfile.ZipFile(wheel).read(dist_info(wheel, "WHEEL")).decode()
    _, ours = platform.libc_ver()
    assert library.newest["GLIBC"] <= tuple(map(int, ours.split("."))), library.newest


@needs_compiler
def test_the_library_needs_only_c_and_c_plus_plus(wheel: Path, tmp_path: Path) -> None:
    """Whatever it does not define comes, by name and version, from the libraries that every onnxruntime needs too."""
    library = library_of(wheel, tmp_path)
    assert {name.partition(".so")[0] for name in library.needed} <= {"libc", "libm", "libstdc++", "libgcc_s", LOADER}
    families = {name: version.partition("_")[0] for name, version in library.undefined.items()}
    assert {name for name, family in families.items() if family not in ("GLIBC", "GLIBCXX", "CXXABI", "GCC")} == set()
    header = (ROOT / "kernels/cpu/paredown.h").read_text()
    declared = set(re.findall(r"^PAREDOWN_API .*?(paredown_\w+)\(", header, flags=re.MULTILINE))
    assert library.exported == declared | {"RegisterCustomOps"}


@pytest.mark.skipif(not shutil.which(CROSS), reason=f"no wheel for aarch64 built: {CROSS} is not installed")
def test_a_wheel_for_aarch64_is_built_by_a_cross_compiler(source: Path, tmp_path: Path) -> None:
    built = build_wheel(source, tmp_path / "wheel", CXX=CROSS)
    library = library_of(built, tmp_path)
    assert library.machine == "aarch64"
    assert contents(built) == expected(*BUILT)
    assert re.fullmatch(r"paredown-[\d.]+-py3-none-manylinux_2_\d+_aarch64", built.stem)
    made_of = json.loads(zipfile.ZipFile(built).read(f"paredown/{RECORD}"))
    assert {"portable", "neon", "dotprod", "i8mm"} <= set(made_of["isas"])
    assert made_of["left_out"] == {}


@needs_compiler
def test_the_platform_may_be_named_by_hand(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path]
    run([*command, "-C--build-option=--plat-name=linux_x86_64", source])
    assert [path.stem.split("-")[2:] for path in tmp_path.glob("*.whl")] == [["py3", "none", "linux_x86_64"]]


NVCC = """#!{python}
import pathlib, sys
if "--version" in sys.argv:
    print("release 13.0, V13.0.0")
else:
    head = bytearray(64)
    head[:8] = b"\\x7fELF\\x02\\x01\\x01\\x41"
    head[8], head[18] = 8, 190
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(head)
"""
"""A compiler of CUDA 13 that answers with the head of a cubin."""


def test_cubins_are_in_the_wheel_that_asks_for_them(source: Path, tmp_path: Path) -> None:
    (tmp_path / "nvcc").write_text(NVCC.format(python=sys.executable))
    (tmp_path / "nvcc").chmod(0o755)
    places = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CUDA_HOME": "", "CUDA_PATH": ""}
    built = build_wheel(source, tmp_path / "wheel", PAREDOWN_CUBINS="1", **places)
    made = json.loads(zipfile.ZipFile(built).read("paredown/kernels/cuda/cubin/manifest.json"))
    assert {entry["unit"] for entry in made} == set(sources.UNITS)
    assert {entry["architecture"] for entry in made} > set(sources.ARCHITECTURES)
    cubins = [f"kernels/cuda/cubin/{name}" for name in ("manifest.json", *(entry["file"] for entry in made))]
    assert contents(built) == expected(*(BUILT if COMPILER else ()), *cubins)


def test_a_source_distribution_gives_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    run([sys.executable, "-P", "-c", code], source)
    (archive,) = tmp_path.glob("paredown-*.tar.gz")
    again = build_wheel(archive, tmp_path / "wheel")
    assert (again.name, contents(again)) == (wheel.name, contents(wheel))


# --- without a compiler


def test_without_a_compiler_it_installs_and_the_doctor_says_so(source: Path, tmp_path: Path) -> None:
    """For any platform. The reference does the work of the kernels, and what to do about it is said."""
    out = tmp_path / "wheel"
    command = [sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, source]
    run(command, CXX="no-such-compiler")
    (built,) = out.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    assert contents(built) == expected()
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    start = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
    code = "from paredown.optimizer import cli; sys.argv[1:] = ['doctor']; cli.main()"
    said = run([sys.executable, "-P", "-I", "-c", start + code], tmp_path)
    assert "--  CPU kernels: not built, so that all runs on the reference" in said
    assert "pip install it again" in said
    code = "from paredown.kernels import native; print(native.__file__, native.available())"
    said = run([sys.executable, "-P", "-I", "-c", start + code], tmp_path)
    assert said.split() == [str(tmp_path / "site/paredown/kernels/native.py"), "False"]


def test_kernels_that_are_required_are_an_error(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "setup.py", "-q", "build_kernels", f"--build-lib={tmp_path}"]
    env = {**os.environ, "CXX": "no-such-compiler", "PAREDOWN_KERNELS": "required"}
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, "kernels not built: no-such-compiler --version" in done.stderr) == (1, True)
    done = subprocess.run(
        command, cwd=source, env={**env, "PAREDOWN_KERNELS": "of"}, capture_output=True, text=True, check=False
    )
    assert 'PAREDOWN_KERNELS=of is none of "auto", "required", "off"' in done.stderr


@needs_compiler
def test_an_editable_install_builds_in_place(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-P", "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation"]
    run([*pip, "-e", folder])
    assert [(folder / name).exists() for name in BUILT] == [True, True]
    code = "from paredown.kernels import native; print(native.__file__, native.available())"
    assert run([python, "-c", code], tmp_path).split() == [str(folder / "kernels/native.py"), "True"]


# --- the installed program


def test_the_wheel_carries_its_licence_and_both_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        texts = {Path(name).name: file.read(name).decode() for name in file.namelist() if ".dist-info/" in name}
    assert "Apache License" in texts["LICENSE"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert {"optimize = paredown.optimizer.cli:main", "paredown = paredown.optimizer.cli:main"} <= set(
        texts["entry_points.txt"].splitlines()
    )


@needs_compiler
def test_the_installed_kernels_run(bin_folder: Path, tmp_path: Path) -> None:
    said = run([bin_folder / "optimize", "doctor"], tmp_path)
    assert re.search(r"^ok  CPU kernels: portable, .* for \w+, by ", said, flags=re.MULTILINE)
    assert re.search(r"^ok  CPU kernels on this processor: (\w+) in use, of \1", said, flags=re.MULTILINE)
    assert re.search(r"^ok  CPU kernels in onnxruntime [\d.]+: their operators load$", said, flags=re.MULTILINE)


def test_the_installed_program_is_the_wheel_s(bin_folder: Path, tmp_path: Path) -> None:
    code = "import paredown.optimizer as o, paredown.bench as b; print(o.__file__, b.__file__)"
    for path in run([bin_folder / "python", "-c", code], tmp_path).split():
        assert Path(path).is_relative_to(bin_folder.parent)
    assert run([bin_folder / "optimize", "--version"], tmp_path) == run(
        [bin_folder / "paredown", "--version"], tmp_path
    )


def test_the_demo_runs_in_an_empty_folder(bin_folder: Path, tmp_path: Path) -> None:
    said = run([bin_folder / "optimize", "demo"], tmp_path)
    out = tmp_path / "paredown-demo"
    assert "report: paredown-demo/report.html" in said
    assert [path.name for path in tmp_path.iterdir()] == ["paredown-demo"]
    assert {
        "model.safetensors",
        "model.json",
        "model.onnx",
        "plan.yaml",
        "recipe.yaml",
        "report.json",
        "report.html",
    } <= {path.name for path in out.iterdir()}
    report = json.loads((out / "report.json").read_text())
    assert report["final"]["size_bytes"] < report["baseline"]["size_bytes"] / 5
    assert report["final"]["drop"] <= 1.0
