"""The fingerprint describes the machine and nobody."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from paredown.bench.environment import fingerprint


def test_fingerprint_is_json_without_names_or_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = fingerprint()
    shown = json.dumps(found)
    assert found["threads_env"] == pytest.approx({"OMP_NUM_THREADS": "3"}) or "OMP_NUM_THREADS" in shown
    assert list(found) == [
        *("os", "kernel", "cpu", "memory_bytes", "python", "packages", "git_commit", "git_dirty", "threads_env")
    ]
    assert platform.node() not in shown
    assert str(Path.home()) + "/" not in shown
    assert str(Path.cwd()) not in shown
    if len(getpass.getuser()) > 4:  # "root" occurs in nothing here, but short names may
        assert getpass.getuser() not in shown


def test_fingerprint_does_not_import_torch() -> None:
    code = (
        "import sys; from paredown.bench.environment import fingerprint; p = fingerprint()['packages'];"
        "print('torch' in sys.modules, 'numpy' in p)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_outside_a_repository_the_commit_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = fingerprint()
    assert found["git_commit"] is None
    assert found["git_dirty"] is None
