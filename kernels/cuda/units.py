"""The translation units of the CUDA kernels as texts, ready for nvcc and NVRTC."""

from __future__ import annotations

import re
from pathlib import Path

from . import disk_cache
from .nvrtc import Source
from .sources import FLAGS

FOLDER = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def read(unit: str) -> Source:
    """Return a unit, "name.cu", with every file of ours that it includes.

    A file that is not there is left out: the compiler names it, unless it is for another compiler (emulated.h).
    """
    text = (FOLDER / unit).read_text(encoding="utf-8")
    headers: dict[str, str] = {}
    waiting = [(name, FOLDER) for name in _INCLUDE.findall(text)]
    while waiting:
        name, folder = waiting.pop()
        path = next((path for place in (folder, FOLDER, FOLDER.parent) if (path := place / name).exists()), None)
        if path is not None and name not in headers:
            headers[name] = path.read_text(encoding="utf-8")
            waiting += [(inner, path.parent) for inner in _INCLUDE.findall(headers[name])]
    return Source(name=unit, text=text, headers=dict(sorted(headers.items())))


def digest(source: Source) -> str:
    """Return a hash of all that a compiler sees but its architecture, to tell a stale image by."""
    return disk_cache.key(source.name, source.text, *(part for item in source.headers.items() for part in item), *FLAGS)
