"""TensorRT's own benchmark, `trtexec`, on an ONNX file: its times with and without transfers."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..optimizer.errors import ExportError, RuntimeMissingError

TIMEOUT_SECONDS = 1800
"""Building an engine of a large network takes minutes."""
MISSING = "trtexec is not on this machine"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Times:
    """Seconds of every run. with_transfers: from before the inputs' copy to after the outputs'; compute: between."""

    with_transfers: NDArray[np.float64]
    compute: NDArray[np.float64]


def measure(path: Path, shapes: Mapping[str, Sequence[int]], seconds: float) -> Times:
    """Build an engine of an ONNX file and time it for some seconds.

    shapes: of the inputs with named dimensions. Raises RuntimeMissingError without the program, ExportError where it
    fails or writes no times.
    """
    program = shutil.which("trtexec")
    if program is None:
        raise RuntimeMissingError(MISSING, fix="install TensorRT and put trtexec on the PATH")
    with tempfile.TemporaryDirectory(prefix="paredown-") as made:
        times = Path(made) / "times.json"
        command = [program, f"--onnx={path}", f"--duration={max(1, round(seconds))}", f"--exportTimes={times}"]
        if shapes:
            command.append("--shapes=" + ",".join(f"{name}:{'x'.join(map(str, shapes[name]))}" for name in shapes))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as problem:
            raise ExportError(f"trtexec did not finish: {type(problem).__name__}", where=path.name) from problem
        if done.returncode:
            raise ExportError(f"trtexec ended with {done.returncode}: {_complaint(done)}", where=path.name)
        return parse(times)


def parse(times: Path) -> Times:
    """Read what `--exportTimes` wrote: a list with `latencyMs` and `computeMs` of each run."""
    try:
        runs = json.loads(times.read_text(encoding="utf-8"))
        latency, compute = (np.array([float(run[key]) for run in runs]) * 1e-3 for key in ("latencyMs", "computeMs"))
    except (OSError, ValueError, TypeError, KeyError) as problem:
        what = f"trtexec wrote no times that can be read ({type(problem).__name__})"
        raise ExportError(what, where=times.name) from problem
    if not len(latency):
        raise ExportError("trtexec measured no run", where=times.name)
    return Times(with_transfers=latency, compute=compute)


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return next((line.strip() for line in lines if "[E]" in line), lines[-1].strip() if lines else "it said nothing")
