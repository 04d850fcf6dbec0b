"""A folder of compiled kernels in the user's cache folder: written whole or not at all, checked when read, bounded."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LIMIT = 64 * 2**20
"""Bytes that the folder may hold; what was not read for longest goes first."""
SUFFIX = ".image"
NOWHERE = Path(os.devnull)
_DIGEST = 32


def folder() -> Path:
    """Return the folder: `paredown/cuda` in $XDG_CACHE_HOME, by default ~/.cache. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A user without a home gets a folder that cannot be written; one in /tmp could be another user's.
    home = Path(os.path.expanduser("~"))
    return (Path(base) if os.path.isabs(base) else home / ".cache" if home.is_absolute() else NOWHERE) / "paredown/cuda"


def key(*parts: str | bytes) -> str:
    """Return the name for what is made of these parts."""
    data = [part.encode() if isinstance(part, str) else part for part in parts]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in data)).hexdigest()


def cached(name: str, make: Callable[[], bytes]) -> bytes:
    """Return what `make` returned when this name was first asked for; make it anew if the file is damaged.

    Where the folder cannot be written, `make` runs in every process, and a warning says so.
    """
    path = folder() / f"{name}{SUFFIX}"
    found = _read(path)
    if found is not None:
        return found
    image = make()
    try:
        _write(path, image)
        _trim(path)
    except OSError as error:
        warnings.warn(f"compiled CUDA kernels are not kept: {error}; set XDG_CACHE_HOME", RuntimeWarning, stacklevel=2)
    return image


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, image = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(image).digest() != digest:
        return None
    with suppress(OSError):  # the time of the last reading decides what is removed; a read-only folder removes nothing
        os.utime(path)
    return image


def _write(path: Path, image: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(image).digest() + image)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _trim(newest: Path) -> None:
    """Remove the files that were not read for longest until the rest is within LIMIT; others may remove them too."""
    files = []
    for path in newest.parent.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):
            state = path.stat()
            files.append((path == newest, state.st_mtime, state.st_size, path))
    excess = sum(size for _, _, size, _ in files) - LIMIT
    for is_newest, _, size, path in sorted(files):
        if excess <= 0 or is_newest:
            return
        path.unlink(missing_ok=True)
        excess -= size
