"""The script for GPUs, without one: its dry run, its checks on emulated kernels, and what it says of figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from paredown.bench import gpu_check, gpu_kernels, gpu_table
from paredown.kernels.cuda import call, launch
from paredown.kernels.cuda.sources import LINEAR

from ..kernels.cuda_emulation import Emulator

SCRIPT = Path(gpu_kernels.__file__)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"), bulk=False)


@pytest.fixture
def emulated(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels on the emulated warp, on tensors of the CPU."""

    def start(kernel: str, how: launch.Launch, values: Mapping[str, Tensor | int], place: call.Place) -> None:
        absent = torch.zeros(64)
        given = {name: values[name] for name in launch.ARGUMENTS[kernel]}
        pointers = {name: absent for name, value in given.items() if name in launch.POINTERS and isinstance(value, int)}
        emulator.run(how, given | pointers)

    monkeypatch.setattr(call, "_start", start)
    monkeypatch.setattr(call, "_place", lambda x: call.Place(device=0, processors=3, stream=0))


def small_case(mode: str = "exact") -> gpu_check.Case:
    (case,) = [
        case
        for case in gpu_check.cases(small=True)
        if case.spec.bits == 4 and case.spec.group == 32 and case.mode == mode and case.dtype == torch.float16
    ]
    return replace(case, rows=(1, 9, 17, 129) if mode == "exact" else (1, 9, 17), halves=False)


# --- the script


def test_the_dry_run_compiles_and_lists_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "DRY_UNITS", ("prepare.cu",))
    lines = list(gpu_kernels.main(["--dry-run"]))
    assert any(line.startswith("prepare.cu") for line in lines)
    assert sum(line.startswith("check ") for line in lines) == len(gpu_check.cases(small=False)) == 450
    assert sum(line.startswith("measure ") for line in lines) == len(gpu_table.SHAPES)
    assert not any(line.startswith("FAILED") for line in lines)


@pytest.mark.slow
def test_the_script_runs_where_neither_paredown_nor_jaxtyping_is_installed(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['jaxtyping'] = None\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.argv = ['gpu_kernels.py', '--dry-run']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "450 weights to check" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--bench"], ["--sanitize"]])
def test_without_a_gpu_the_script_fails_and_says_why(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(gpu_kernels.main(arguments)) == ["FAILED: torch sees no GPU here; --dry-run needs none"]


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that there is a GPU, and no compute-sanitizer; return where the results will be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "device_fingerprint", lambda: {"gpu": "none"})
    monkeypatch.setattr(gpu_kernels, "find_sanitizer", lambda: None)
    monkeypatch.setattr(gpu_kernels, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_kernels, "RESULT", tmp_path / "results" / "gpu.json")
    return tmp_path / "results" / "gpu.json"


def test_a_failed_check_fails_the_run_and_is_written(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [gpu_check.Outcome(name="right", worst=0.5), gpu_check.Outcome(name="off", worst=3.0, failure="m = 7")]
    monkeypatch.setattr(gpu_check, "run", lambda small: iter(outcomes))
    lines = list(gpu_kernels.main(["--check"]))
    assert "FAILED off: m = 7" in lines
    assert lines[-1].startswith("FAILED")
    written = json.loads(pretended.read_text())
    assert [row["failure"] for row in written["checks"]] == ["", "m = 7"]
    assert written["environment"]["gpu"] == "none"
    assert written["sanitizer"] == "there is no compute-sanitizer"


def test_what_ends_one_part_leaves_the_others_and_their_results(
    pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(until: float) -> gpu_table.Table:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(gpu_check, "run", lambda small: iter([gpu_check.Outcome(name="right", worst=0.5)]))
    monkeypatch.setattr(gpu_table, "measure", broken)
    lines = list(gpu_kernels.main([]))
    assert "FAILED table: RuntimeError: CUDA error: out of memory" in lines
    assert lines[-1] == "FAILED: see above"
    assert set(json.loads(pretended.read_text())) == {"schema", "environment", "checks", "sanitizer"}


def test_a_table_without_cublas_or_one_of_ours_is_written_and_said(
    pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (row("ours 4 bits float16", 1, ratio=float("nan"), error=float("inf")),)
    absent = {"ours 3 bits float16": "RuntimeError: no", "GemLite 4 bits": "ModuleNotFoundError: no"}
    table = gpu_table.Table(rows=rows, ceiling=4.3e12, absent=absent)
    monkeypatch.setattr(gpu_table, "measure", lambda until: table)
    lines = list(gpu_kernels.main(["--bench"]))
    assert "FAILED: without ours 3 bits float16: RuntimeError: no" in lines
    assert "without GemLite 4 bits: ModuleNotFoundError: no" in lines
    assert any(line.startswith("FAILED: 8192 x 28672, m = 1") and line.endswith("error inf") for line in lines)
    assert [json.loads(pretended.read_text())["table"]["rows"][0][name] for name in ("ratio", "error")] == [None, None]


def fake_sanitizer(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_sanitizer_s_verdict_is_its_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'echo "========= ERROR SUMMARY: 2 errors"; [ "$2" != racecheck ] || exit 9'
    fake_sanitizer(tmp_path, said, monkeypatch)
    report: dict[str, Any] = {}
    lines = list(gpu_kernels.sanitize(report, math.inf))
    assert [line.partition(":")[0] for line in lines] == ["memcheck", "FAILED racecheck", "initcheck", "synccheck"]
    assert report["sanitizer"]["racecheck"] == "exit 9: ERROR SUMMARY: 2 errors"


def test_a_sanitizer_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it started has our pipe, and would be waited for."""
    fake_sanitizer(tmp_path, "sleep 600 & sleep 600", monkeypatch)
    monkeypatch.setattr(gpu_kernels, "TOOLS", ("memcheck",))
    monkeypatch.setattr(gpu_kernels, "SANITIZER_SECONDS", 0.3)
    assert list(gpu_kernels.sanitize({}, math.inf)) == ["memcheck: not finished in 0 s"]


def test_the_sanitizer_of_the_toolkit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    fake_sanitizer(tmp_path / "bin", "", monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_kernels.find_sanitizer() == str(tmp_path / "bin" / "compute-sanitizer")


# --- the checks


def test_every_width_group_and_kind_meets_every_batch() -> None:
    cases = gpu_check.cases(small=False)
    assert len({case.name for case in cases}) == len(cases)
    everywhere = {(c.spec.bits, c.spec.group, c.dtype, c.mode) for c in cases if c.rows == tuple(range(1, 301))}
    assert len(everywhere) == len(gpu_check.BITS) * len(gpu_check.GROUPS) * len(gpu_check.KINDS)
    kinds = {(c.spec.bits, c.dtype, c.mode) for c in cases}
    assert len({(c.activation, *kind) for c in cases for kind in [(c.spec.bits, c.dtype, c.mode)]}) == 5 * len(kinds)
    repeated = cases[:: gpu_check.EVERY]
    assert {(c.dtype, c.mode) for c in repeated} == set(gpu_check.KINDS)
    assert {c.spec.bits for c in repeated} == set(gpu_check.BITS)
    for case in cases:
        table = torch.float16 if case.halves else torch.uint8
        assert call.refusal(case.spec, case.mode, case.dtype, table) == ""


@pytest.mark.parametrize("small", [False, True])
def test_every_form_of_every_unit_is_checked_on_a_large_gpu(small: bool) -> None:
    """On 132 multiprocessors, an H200, no layer of 4096 rows takes blocks of 32."""
    started, cut = set(), False
    for case in gpu_check.cases(small=small):
        kind = launch.kind_of(case.spec, torch.float16 if case.halves else torch.uint8, case.dtype, case.mode)
        assert kind is not None
        for m in case.rows:
            if kind == "s8" or m <= launch.TILE_M:
                form = launch.choose(case.spec, m, 132)
                started.add((form.name, kind if not small else "", case.spec.bits))
                cut |= launch.splits(case.spec, m, form, 132) > 1
    kinds = [("", bits) for bits in gpu_check.BITS] if small else LINEAR
    wanted = {(form.name, kind, bits) for form in launch.FORMS for kind, bits in kinds}
    assert started == wanted
    assert cut is not small


@pytest.mark.parametrize("mode", ["exact", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_case_passes_on_the_emulated_kernels_with_poisoned_memory(mode: str, emulated: None) -> None:
    case = small_case(mode)
    with gpu_check._poisoned():
        assert torch.empty(1).isnan().all()
        outcome = gpu_check._guarded(case, "cpu", gpu_check.check)
    assert outcome.failure == ""
    assert outcome.worst is not None
    assert 0 < outcome.worst <= 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: y * 1.01, "of its bound"),
        (lambda y: torch.where(torch.arange(y.shape[1]) == 5, torch.nan, y), "the error is inf"),
        (lambda y: y.roll(1, 1), "of its bound"),
    ],
)
def test_a_wrong_product_is_noticed(wrong: Any, said: str, emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = call.linear
    monkeypatch.setattr(call, "linear", lambda x, weight, **more: wrong(right(x, weight, **more)))
    outcome = gpu_check._guarded(replace(small_case(), rows=(2,)), "cpu", gpu_check.check)
    assert said in outcome.failure


def test_an_error_is_the_failure_of_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(gpu_check, "draw", fail)
    outcome = gpu_check._guarded(small_case(), "cpu", gpu_check.repeat)
    assert outcome.name.endswith(": repeat")
    assert outcome.failure == "RuntimeError: CUDA error: an illegal memory access"


def test_after_the_gpu_was_lost_no_check_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = gpu_check.Outcome(name="first", worst=None, failure="RuntimeError: CUDA error: an illegal memory access")
    monkeypatch.setattr(gpu_check, "_guarded", lambda case, device, make: failed)
    monkeypatch.setattr(gpu_check, "_alive", lambda device: False)
    found = list(gpu_check.run(small=True, device="cpu"))
    assert [outcome.failure for outcome in found] == [
        failed.failure,
        "the GPU answers no longer: 38 checks were not made",
    ]


def test_a_check_that_hangs_ends_the_process_by_name() -> None:
    code = (
        "import time\nfrom paredown.bench import gpu_check\ngpu_check.CASE_SECONDS = 0.2\n"
        "with gpu_check._watched('4 bits: check'): time.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (
        1,
        "FAILED 4 bits: check: not finished in 0 s, does a kernel hang?\n",
    )


def test_different_bits_of_a_repetition_are_counted(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "REPEATS", 3)
    calls = iter(range(1000))
    case = replace(small_case(), rows=(64,))
    problem = gpu_check.draw(case, "cpu")
    monkeypatch.setattr(call, "linear", lambda x, weight, **more: torch.full((len(x), 2), float(next(calls) % 4 == 1)))
    outcome = gpu_check.repeat(problem)
    assert "1 of 3 runs at m = 1" in outcome.failure


# --- the table


def row(column: str, m: int, **changes: float) -> gpu_table.Row:
    n, k = gpu_table.SHAPES[0]
    figures = {"us": 40.0, "us_low": 39.0, "us_high": 41.0, "us_warm": 20.0, "gb_per_s": 3000.0, "error": 1e-3}
    return gpu_table.Row(n=n, k=k, m=m, column=column, **{**figures, "percent": 75.0, "ratio": 3.0, **changes})


def test_figures_are_held_against_what_is_wanted() -> None:
    rows = (row("ours 4 bits float16", 1), row("ours 4 bits float16", 16, percent=66.0, ratio=0.9))
    said = list(gpu_table.verdicts(gpu_table.Table(rows=rows, ceiling=4.3e12, absent={})))
    assert said == [
        "ceiling: a copy moves 4300 GB/s",
        "NOT reached (70 wanted): 4 bits float16, m up to 16: 66 % at m = 16",
        "reached (2.8 wanted): 4 bits float16, m = 1: 3.00 x cuBLAS float16",
        "NOT reached (0.98 wanted): 4 bits float16, m up to 64: 0.90 x cuBLAS at m = 16",
    ]


def test_a_row_is_rate_share_and_ratio() -> None:
    column = gpu_table.Column(name="ours", dtype=torch.float16, products=[], bytes=10**8, dense=torch.zeros(1))
    found = gpu_table._row((1, 2, 3), column, [5e-5, 4e-5, 6e-5], 2e-5, (1e-4, 4e12), 1e-3)
    assert (found.us, found.us_warm, found.ratio) == pytest.approx((50.0, 20.0, 2.0))
    assert (found.gb_per_s, found.percent) == pytest.approx((2000.0, 50.0))
    assert "1 x 2, m = 3" in gpu_table.line(found)
    document = gpu_table.Table(rows=(found,), ceiling=4e12, absent={"x": "y"}).document()
    assert json.loads(json.dumps(document))["rows"][0]["column"] == "ours"
