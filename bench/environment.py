"""The fingerprint of a machine: what a number depends on, without anything that names a person, host or folder.

A remote board runs this file too, so it is Python 3.8 and imports nothing of this package.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

PACKAGES = ("torch", "onnx", "onnxruntime", "onnx-ir", "numpy", "scipy", "safetensors", "paredown")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
FLAGS = (
    *("sse4_2", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "fphp", "sve", "sve2"),
)
"""The instruction sets that decide which kernels a runtime picks."""


def fingerprint() -> dict[str, object]:
    """Return the machine, its software and the state of the source; null where something cannot be read."""
    return {
        "os": _os_name(),
        "kernel": platform.release(),
        "cpu": _cpu(),
        "memory_bytes": _memory_bytes(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": _git_dirty(),
        "threads_env": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def _cpu() -> dict[str, object]:
    info = _cpuinfo()
    known = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "flags": [flag for flag in FLAGS if flag in known],
    }


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first core."""
    first = (_text("/proc/cpuinfo") or "").split("\n\n")[0]
    fields = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def _usable_cores() -> int | None:
    """Return on how many cores this process may run, which a container can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _os_name() -> str:
    """Return PRETTY_NAME of os-release, which Python reads itself from 3.10 on only."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text("/etc/os-release") or "", re.MULTILINE)
    return found[1] if found else platform.system()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git_dirty() -> bool | None:
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else bool(status)


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
