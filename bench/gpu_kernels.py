#!/usr/bin/env python3
"""Check and measure the CUDA kernels on the GPU of this machine; write bench/results/gpu_kernels.json.

    python bench/gpu_kernels.py             correctness, the table, then compute-sanitizer: below 10 minutes on an H200
    python bench/gpu_kernels.py --check     correctness and compute-sanitizer alone; --bench: the table alone
    python bench/gpu_kernels.py --dry-run   compile the kernels, list what would be run, and touch no GPU

It needs torch with CUDA, and NVRTC (which torch brings) or cubins; paredown need not be installed, nor jaxtyping. What
is done is written after each of the three. The exit status is 1 if a check failed or could not be made; where there is
no compute-sanitizer, a line says so. In detail: gpu_check.py, gpu_table.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu_kernels.json"
SCHEMA = "paredown.gpu_kernels/1"
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS = 560.0
"""The whole script, from its start: the table and compute-sanitizer take what is left of it."""
SANITIZER_SECONDS = 60.0
"""What one tool may take on the small set of cases; it is then said not to have finished."""


def main(arguments: Sequence[str]) -> Iterator[str]:
    """Yield lines to print; the last one begins with "FAILED" where a check did."""
    options = _options(arguments)
    # W decoded for cuBLAS is multiplied by the same algorithm each time only with such a workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.dry_run:
        yield from dry_run()
        return
    if not importlib.import_module("torch").cuda.is_available():
        yield "FAILED: torch sees no GPU here; --dry-run needs none"
        return
    if options.sanitize:
        yield from _checks(small=True, report={})
        return
    report: dict[str, object] = {"schema": SCHEMA, "environment": _environment()}
    failed = False
    for name, lines in _stages(options, report, time.monotonic() + SECONDS).items():
        for line in _held(name, lines):
            failed |= line.startswith("FAILED")
            yield line
        written = _write(report)
    yield written
    yield "FAILED: see above" if failed else "all is well"


def use_this_checkout() -> None:
    """Make `paredown` the folders of this checkout, unless it is installed, and jaxtyping, if need be, nothing."""
    try:
        importlib.import_module("paredown.kernels")
    except ModuleNotFoundError:
        package = ModuleType("paredown")
        package.__path__ = [str(ROOT)]
        sys.modules["paredown"] = package
    try:
        importlib.import_module("jaxtyping")
    except ModuleNotFoundError:
        sys.modules["jaxtyping"] = Shapes("jaxtyping")


class Shapes(ModuleType):
    """All names that jaxtyping has: annotations of shapes, which nobody reads here."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return Annotated


def dry_run() -> Iterator[str]:
    """Compile one unit of each kind for one architecture, and name every case; no GPU is touched."""
    from ..kernels.cuda import cubins, sources, state
    from . import gpu_check, gpu_table

    yield from state.examine()
    for unit in DRY_UNITS:
        started = time.monotonic()
        try:
            compiler = cubins.compiler_for("sm_90a", cubins.compilers())
            data = cubins.compile_image(unit, "sm_90a", compiler)
        except cubins.CubinError as error:
            yield f"{unit} is not compiled: {error}"
            continue
        yield f"{unit}: {len(data)} bytes for sm_90a, {time.monotonic() - started:.1f} s"
    yield f"{len(sources.UNITS)} units for {', '.join(sources.ARCHITECTURES)}"
    cases = gpu_check.cases(small=False)
    yield from (f"check {case.name}" for case in cases)
    yield from (f"measure {n} x {k}, m = {', '.join(map(str, gpu_table.ROWS))}" for n, k in gpu_table.SHAPES)
    yield f"{len(cases)} weights to check, each with up to {len(gpu_check.ALL_ROWS)} batches"


DRY_UNITS = ("prepare.cu", "linear_f16b_4.cu")
"""What --dry-run compiles: CI does it, and the others are the same template."""


def sanitize(report: dict[str, object], until: float) -> Iterator[str]:
    """Run the small set of cases under each tool of compute-sanitizer, without torch's cache of memory."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        report["sanitizer"] = f"there is no {SANITIZER}"
        yield f"there is no {SANITIZER} on the path or in the toolkit: memory accesses are not checked"
        return
    found: dict[str, str] = {}
    report["sanitizer"] = found
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        seconds = max(0.0, min(SANITIZER_SECONDS, until - time.monotonic()))
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--sanitize"]
        try:
            status, output = _run(command, environment, seconds)
        except subprocess.TimeoutExpired:
            found[tool] = f"not finished in {seconds:.0f} s"
            yield f"{tool}: {found[tool]}"
            continue
        last = next((line for line in reversed(output.splitlines()) if "SUMMARY" in line), output[-300:])
        found[tool] = f"exit {status}: {last.strip('= ')}"
        yield f"{'FAILED ' if status else ''}{tool}: {found[tool]}"


def find_sanitizer() -> str | None:
    """Return compute-sanitizer, from the path or from the toolkit."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(folders))


def _run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Run a command and return its status and what it printed; after `seconds` end it with all that it started.

    compute-sanitizer starts Python itself, which would hold our pipe open after the sanitizer alone was killed.
    """
    done = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = done.communicate(timeout=seconds)
    except BaseException:
        os.killpg(done.pid, signal.SIGKILL)
        done.communicate()
        raise
    return done.returncode, output


def _stages(options: argparse.Namespace, report: dict[str, object], until: float) -> dict[str, Iterator[str]]:
    """Return what is to be done: figures before compute-sanitizer, which takes whatever time it is given."""
    stages: dict[str, Iterator[str]] = {}
    if not options.bench:
        stages["checks"] = _checks(small=False, report=report)
    if not options.check:
        stages["table"] = _table(report, until)
    if not options.bench:
        stages["sanitizer"] = sanitize(report, until)
    return stages


def _held(name: str, lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a stage, and what ended it if anything did: the others still have their turn."""
    try:
        yield from lines
    except Exception as error:
        yield f"FAILED {name}: {type(error).__name__}: {error}"


def _checks(small: bool, report: dict[str, object]) -> Iterator[str]:
    from . import gpu_check

    done: list[gpu_check.Outcome] = []
    started = time.monotonic()
    for outcome in gpu_check.run(small=small):
        done.append(outcome)
        if outcome.failure:
            yield f"FAILED {outcome.name}: {outcome.failure}"
    report["checks"] = [outcome.row() for outcome in done]
    wrong = sum(bool(outcome.failure) for outcome in done)
    yield f"{len(done)} checks, {wrong} failed, {time.monotonic() - started:.0f} s"


def _table(report: dict[str, object], until: float) -> Iterator[str]:
    from . import gpu_table

    table = gpu_table.measure(until)
    report["table"] = table.document()
    for row in table.rows:
        wrong = row.column.startswith("ours") and not row.error <= gpu_table.MOST_ERROR
        yield f"{'FAILED: ' if wrong else ''}{gpu_table.line(row)}"
    for name, why in table.absent.items():
        yield f"{'FAILED: ' if name.startswith('ours') else ''}without {name}: {why}"
    yield from gpu_table.verdicts(table)


def _environment() -> dict[str, object]:
    from . import environment, gpu_check

    return environment.fingerprint() | gpu_check.device_fingerprint()


def _write(report: dict[str, object]) -> str:
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return f"written: {RESULT.relative_to(ROOT)}"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--check", action="store_true", help="correctness and compute-sanitizer alone")
    one.add_argument("--bench", action="store_true", help="the table alone")
    one.add_argument("--dry-run", action="store_true", help="compile and list, without a GPU")
    one.add_argument("--sanitize", action="store_true", help="the small set of cases that compute-sanitizer runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    use_this_checkout()
    packaged = importlib.import_module("paredown.bench.gpu_kernels")  # so that it has a package to import from
    status = 0
    for text in packaged.main(sys.argv[1:]):
        print(text, flush=True)
        status |= text.startswith("FAILED")
    sys.exit(status)
