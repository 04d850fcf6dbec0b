"""Read what the kernel and small programs of a machine say: None for what cannot be read, or Unavailable and why."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMAND_SECONDS = 5.0
"""How long a program may take to answer."""


class Unavailable(Exception):
    """A sensor that is absent, forbidden or gone; the text says which and why."""


def text(path: Path) -> str | None:
    """Return the words of a file of sysfs, None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\n")
    except OSError:
        return None


def number(path: Path) -> float | None:
    """Return the number in a file of sysfs, None where there is none."""
    try:
        return float(text(path) or "")
    except ValueError:
        return None


def required(path: Path) -> float:
    """Return the number in a file of sysfs; Unavailable where it cannot be read."""
    try:
        return float(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise Unavailable(f"reading {path.name} is not permitted") from None
    except (OSError, ValueError) as problem:
        raise Unavailable(f"{path.name} cannot be read ({_why(problem)})") from None


def answer(command: Sequence[str]) -> str | None:
    """Return what a program prints; None where it is absent, fails or does not answer in COMMAND_SECONDS."""
    silent, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        done = subprocess.run(
            list(command), stdin=silent, stdout=pipe, stderr=silent, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace").strip() or None if done.returncode == 0 else None


def folders(root: Path, pattern: str) -> list[Path]:
    """Return the folders of a sysfs tree that match, sorted by name."""
    return sorted(path for path in root.glob(pattern) if path.is_dir())


def nvml() -> Any:
    """Return NVIDIA's library, ready to be asked (pynvml of nvidia-ml-py); Unavailable where it does not work."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        raise Unavailable("nvidia-ml-py is not installed") from None
    try:
        library.nvmlInit()
    except library.NVMLError as problem:
        raise Unavailable(f"NVML does not start ({problem})") from None
    return library


def _why(problem: Exception) -> str:
    return str(getattr(problem, "strerror", None) or "no number in it")
