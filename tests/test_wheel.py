"""The wheel: it holds what the repository holds, and works in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("optimizer", "kernels", "exporters", "bench")
NOT_SHIPPED = "bench/results/"
"""Measured figures: part of the repository, not of the program."""

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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the repository, so that nothing that lies about gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-P", "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, source])
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


def run(command: list[str | Path], cwd: Path | None = None) -> str:
    """Run a command without what would lead it back to this checkout; return its output."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    ours = [name for name in tracked() if name.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    assert sorted(names) == sorted(f"paredown/{name}" for name in ours if not name.startswith(NOT_SHIPPED))


def test_the_wheel_carries_its_licence_and_both_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        texts = {Path(name).name: file.read(name).decode() for name in file.namelist() if ".dist-info/" in name}
    assert "Apache License" in texts["LICENSE"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert {"optimize = paredown.optimizer.cli:main", "paredown = paredown.optimizer.cli:main"} <= set(
        texts["entry_points.txt"].splitlines()
    )


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
