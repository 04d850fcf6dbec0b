#!/usr/bin/env python3
"""Check and measure the CUDA kernels on the GPU of this machine; write bench/results/gpu_kernels.json.

    python bench/gpu_kernels.py             correctness, compute-sanitizer, then the table: below 10 minutes on an H200
    python bench/gpu_kernels.py --check     correctness alone; --bench: the table alone
    python bench/gpu_kernels.py --dry-run   compile the kernels, list what would be run, and touch no GPU

It needs torch with CUDA, and NVRTC (which torch brings) or cubins; paredown need not be installed. The exit status is 1
if a check failed or could not be made. In detail: gpu_check.py, gpu_table.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "gpu_kernels.json"
SCHEMA = "paredown.gpu_kernels/1"
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_SECONDS = 60
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
    report: dict[str, object] = {"schema": SCHEMA}
    failed = False
    if not options.bench:
        for line in _checks(small=False, report=report):
            failed |= line.startswith("FAILED")
            yield line
        for line in sanitize(report):
            failed |= line.startswith("FAILED")
            yield line
    if not options.check:
        yield from _table(report)
    yield _write(report)
    yield "FAILED: see above" if failed else "all is well"


def use_this_checkout() -> None:
    """Make `paredown` the folders of this checkout, unless it is installed."""
    try:
        importlib.import_module("paredown.kernels")
    except ModuleNotFoundError:
        package = ModuleType("paredown")
        package.__path__ = [str(ROOT)]
        sys.modules["paredown"] = package


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


def sanitize(report: dict[str, object]) -> Iterator[str]:
    """Run the small set of cases under each tool of compute-sanitizer, without torch's cache of memory."""
    if shutil.which(SANITIZER) is None:
        report["sanitizer"] = f"{SANITIZER} is not on the path"
        yield f"{SANITIZER} is not on the path: memory accesses are not checked"
        return
    found: dict[str, str] = {}
    report["sanitizer"] = found
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--sanitize"]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=SANITIZER_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            found[tool] = f"not finished in {SANITIZER_SECONDS} s"
            yield f"{tool}: {found[tool]}"
            continue
        last = next((line for line in reversed(done.stdout.splitlines()) if "SUMMARY" in line), done.stderr[-300:])
        found[tool] = f"exit {done.returncode}: {last.strip('= ')}"
        yield f"{'FAILED ' if done.returncode else ''}{tool}: {found[tool]}"


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


def _table(report: dict[str, object]) -> Iterator[str]:
    from . import gpu_table

    table = gpu_table.measure()
    yield from (gpu_table.line(row) for row in table.rows)
    yield from (f"without {name}: {why}" for name, why in table.absent.items())
    yield from gpu_table.verdicts(table)
    report["table"] = table.document()


def _write(report: dict[str, object]) -> str:
    from . import environment, gpu_check

    report["environment"] = environment.fingerprint() | gpu_check.device_fingerprint()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return f"written: {RESULT.relative_to(ROOT)}"


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--bench", action="store_true", help="the table alone")
    parser.add_argument("--dry-run", action="store_true", help="compile and list, without a GPU")
    parser.add_argument("--sanitize", action="store_true", help="the small set of cases that compute-sanitizer runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    use_this_checkout()
    packaged = importlib.import_module("paredown.bench.gpu_kernels")  # so that it has a package to import from
    status = 0
    for text in packaged.main(sys.argv[1:]):
        print(text, flush=True)
        status |= text.startswith("FAILED")
    sys.exit(status)
