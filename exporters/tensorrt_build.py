"""Build an engine in a process of its own, and say in one sentence why one was not built.

A builder that runs out of memory, aborts or is killed ends its process and not ours. Nothing is written but in the
folder that the caller gives.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..optimizer.errors import Error, ExportError
from .tensorrt_child import ANSWER, ENGINE, JOB, TIMING_CACHE
from .tensorrt_library import Library
from .tensorrt_profile import Shapes

LOG = "log"
MEMORY = re.compile(
    r"bad_alloc|out ?of ?memory|MemoryError|could not be allocated|allocation fail|cannot allocate memory|"
    r"failed to map segment|Resource temporarily unavailable",
    re.IGNORECASE,
)
"""How TensorRT, CUDA, C++, Python and, of threads, the system say that there was not enough."""
MESSAGE = re.compile(r"^(?:\[[^\]]*\] )?\[TRT\] \[[EF]\] (.*)$", re.MULTILINE)
WARNING = re.compile(r"^(?:\[[^\]]*\] )?\[TRT\] \[W\] .*$", re.MULTILINE)
"""A kernel that is left out for want of memory is one, and no failure."""
NO_SUCH_OPERATOR = re.compile(r"^(false)?$|plugin not found|not found in plugin registry", re.IGNORECASE)
"""The parser's reasons for an operator that it does not know; "false" is the whole of one (TensorRT-RTX 1.7)."""
SHOWN = 3
"""Refused nodes that a sentence names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is built: the ONNX file, the shapes of its inputs, the compute capabilities (TensorRT-RTX alone).

    timing_cache: a file to begin with, which need not exist yet. memory_bytes: private memory of the builder, 0 for
    any amount. plugin: where the kernels are that nodes of the plugin embed (`tensorrt_plugin.write_kernels`).
    """

    library: Library
    onnx: Path
    shapes: Shapes
    sm: tuple[str, ...] = ()
    timing_cache: Path | None = None
    memory_bytes: int = 0
    plugin: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What was made: the engine, the timing cache where one was asked for, and the layers that were parsed."""

    engine: Path
    timing_cache: Path | None
    layers: int


def build(job: Job, folder: Path) -> Built:
    """Build an engine into `folder`; ExportError says what was refused, or how the builder ended."""
    _ask(job, folder)
    status = _run(folder)
    answer = _answer(folder)
    if status == 0 and "layers" in answer:
        cache = folder / TIMING_CACHE if job.timing_cache else None
        return Built(engine=folder / ENGINE, timing_cache=cache, layers=answer["layers"])
    raise _failure(job, status, answer, (folder / LOG).read_text(errors="replace"))


def _ask(job: Job, folder: Path) -> None:
    cache = job.timing_cache
    data = {
        "library": job.library.name,
        "onnx": str(job.onnx.resolve()),
        "shapes": job.shapes,
        "sm": list(job.sm),
        "timing_cache": None if cache is None else str(cache.resolve()) if cache.is_file() else "",
        "memory_bytes": job.memory_bytes,
        "plugin": None if job.plugin is None else str(job.plugin.resolve()),
        "parent": os.getpid(),
    }
    (folder / JOB).write_text(json.dumps(data))


def _run(folder: Path) -> int:
    """Run the builder; it ends with this process, and when this process is interrupted."""
    command = [sys.executable, "-P", "-m", "paredown.exporters.tensorrt_child", str(folder.resolve())]
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        finally:
            process.kill()
            process.wait()


def _answer(folder: Path) -> dict[str, Any]:
    """Return what the builder answered; nothing, if it ended before."""
    path = folder / ANSWER
    try:
        answer: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return answer


def _failure(job: Job, status: int, answer: Mapping[str, Any], log: str) -> Error:
    where = f"{job.library.title}, {job.onnx.name}"
    refused = answer.get("refused", [])
    said = WARNING.sub("", log) + "".join(error["reason"] for error in refused)
    if MEMORY.search(said):
        return ExportError("there was not enough memory to build the engine", where=where, fix=_less_memory(job))
    if refused:
        fix = "write that part of the network with other operators, or use a version of TensorRT that has them"
        return ExportError(_refusal(refused), where=where, fix=fix)
    if answer.get("failed") == "timing cache":
        what = "it was made by another version of TensorRT or for another GPU, or is no timing cache"
        return ExportError(what, where=f'--timing-cache "{job.timing_cache}"', fix="delete it, or name another file")
    if status == -signal.SIGKILL:
        what = "the building process was killed, which is what the system does where memory runs out"
        return ExportError(what, where=where, fix=_less_memory(job))
    if status < 0:
        what = f"the library ended the building process ({signal.Signals(-status).name}){_last_words(log)}"
        return ExportError(what, where=where, fix="try another precision, or another version of the library")
    what = f"the engine was not built{_last_words(log)}"
    return ExportError(what, where=where, fix="try another precision or profile")


def _less_memory(job: Job) -> str:
    if job.memory_bytes:
        return f"allow more than --memory-limit {job.memory_bytes // 2**20}, or smaller sizes in --profile"
    return "stop other programs, or allow smaller sizes in --profile"


def _refusal(refused: Sequence[Mapping[str, str]]) -> str:
    """Return what was refused: operator, layer and reason of each node, the first few of them."""
    shown = [_refused_node(error) for error in refused[:SHOWN]]
    more = len(refused) - len(shown)
    return "the graph is refused: " + "; ".join(shown) + (f"; and {more} more" if more else "")


def _refused_node(error: Mapping[str, str]) -> str:
    operator, node, reason = error["operator"], error["node"], _one_line(error["reason"])
    if not operator:
        return reason
    layer = node.rpartition("/")[0] or node
    where = f'{operator} of layer "{layer}"' if layer else operator
    return f"{where} is no operator that it has" if NO_SUCH_OPERATOR.search(reason) else f"{where}: {reason}"


def _last_words(log: str) -> str:
    """Return what the library said last, else the last line of an exception, as ": ...", or nothing."""
    messages = MESSAGE.findall(log)
    lines = messages or [line for line in log.splitlines() if line.strip()]
    return f": {_one_line(lines[-1])}" if lines else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(". ")
