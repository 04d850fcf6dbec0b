"""The state of simulated machines: what is read, what is null, and when a measurement counts as drifted."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from paredown.bench.board import sensors, state

from .machines import Nvml, orin_nano, write

FOLDER = Path(state.__file__).parent
MEASURING = ("agent", "peak", "receive", "runners", "sampling", "timing")
"""What needs numpy or a runtime too, for which see tests/bench/test_remote.py."""
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in MEASURING)
IDLE = state.State(at=0.0)


def _clocks(*mhz: float) -> list[state.State]:
    return [state.State(at=0.0, cpu_mhz=(800.0, value)) for value in mhz]


def _work(*milliseconds: float) -> list[state.State]:
    return [state.State(at=0.0, reference_ms=value) for value in milliseconds]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_readers_are_old_python_and_need_the_standard_library_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    siblings = {other.stem for other in FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= {*sys.stdlib_module_names, *siblings}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1 or str(node.module).partition(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("name", ["state", "energy"])
def test_readers_run_in_a_flat_folder(name: str, tmp_path: Path) -> None:
    for path in FILES:
        shutil.copy(path, tmp_path)
    (tmp_path / "__init__.py").unlink()
    done = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert "reference_ms" in said or "unavailable" in said


def test_a_jetson_says_its_clocks_heat_and_counters(tmp_path: Path) -> None:
    seen = state.read(orin_nano(tmp_path))
    assert seen.cpu_mhz == (1510.4,) * 6
    assert seen.governors == ("schedutil",) * 6
    assert seen.gpu_mhz == {"17000000.gpu": 624.75}
    assert seen.temperatures_c == {"thermal_zone0 cpu-thermal": 48.25, "thermal_zone1 gpu-thermal": 47.0}
    assert seen.throttle_counts == {"hwmon2 oc1_event_cnt": 0}
    assert seen.throttling == ()  # a fan that turns holds no clock down


def test_what_a_machine_does_not_say_is_null(tmp_path: Path) -> None:
    seen = state.plain(state.read(tmp_path))
    assert {key for key, value in seen.items() if value is not None} == {"throttling"}
    assert state.read_all(tmp_path).reference_ms > 0  # type: ignore[operator]


def test_programs_are_asked_for_the_power_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("nvpmodel", "NV Power Mode: 15W"), ("jetson_clocks", "cpu0: Online=1")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    seen = state.read_all(tmp_path)
    assert (seen.power_mode, seen.jetson_clocks) == ("NV Power Mode: 15W", "cpu0: Online=1")
    (tmp_path / "nvpmodel").write_text("#!/bin/sh\nexit 1\n")
    assert state.read_all(tmp_path).power_mode is None


def test_a_card_says_clock_heat_and_why_it_throttles(tmp_path: Path) -> None:
    seen = state.read(tmp_path, Nvml(mhz=1200, reasons=0x1 | 0x4 | 0x200))
    assert seen.gpu_mhz == {"GPU 0": 1200.0}
    assert seen.temperatures_c == {"GPU 0": 61.0}
    assert seen.throttling == ("GPU 0: power cap", "GPU 0: reason 0x200")


@pytest.mark.parametrize(
    ("during", "reasons"),
    [
        (_clocks(2400, 2400, 2410, 2390), []),
        (_clocks(2400, 2400, 2400, 1200, 2400, 2400, 2400, 2400, 2400, 2400, 2400, 2400), []),  # one reading
        (_clocks(2400, 2400, 1800, 1800), ["the CPU clock moved by 33 % (1800 to 2400 MHz)"]),
        (_work(1.0, 1.01, 1.0, 1.02), []),
        (_work(1.0, 1.0, 1.0, 1.0, 1.5, 1.5), ["the reference work moved by 50 % (1 to 1.5 ms)"]),
        ([], []),
    ],
)
def test_drift_is_told_beyond_five_percent(during: list[state.State], reasons: list[str]) -> None:
    assert list(state.drift(IDLE, during, IDLE)) == reasons


def test_a_steady_clock_outweighs_the_reference_work() -> None:
    during = [replace(one, reference_ms=value) for one, value in zip(_clocks(2400, 2400), (1.0, 2.0), strict=True)]
    assert state.drift(IDLE, during, IDLE) == ()


def test_an_idle_machine_that_clocks_down_has_not_drifted() -> None:
    (idle,) = _clocks(900)
    assert state.drift(idle, _clocks(2400, 2400), idle) == ()


def test_throttling_is_told_by_counters_and_by_devices(tmp_path: Path) -> None:
    before = state.read(orin_nano(tmp_path))
    write(tmp_path, {"sys/class/hwmon/hwmon2/oc1_event_cnt": 3, "sys/class/thermal/cooling_device1/cur_state": 1})
    after = state.read(tmp_path)
    told = state.summary(before, [before], after)
    assert told["drifted"] is True
    assert told["drift_reasons"] == [
        "it throttled: hwmon2 oc1_event_cnt rose by 3",
        "it throttled: cooling device cpufreq-cpu0",
    ]
    json.dumps(told, allow_nan=False)


def test_x86_counters_are_named_by_core(tmp_path: Path) -> None:
    write(tmp_path, {"sys/devices/system/cpu/cpu3/thermal_throttle/core_throttle_count": 7})
    assert state.read(tmp_path).throttle_counts == {"cpu3 core_throttle_count": 7}


def test_a_library_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(sensors.Unavailable, match=r"^nvidia-ml-py is not installed$"):
        sensors.nvml()
    assert state.nvml_or_none() is None
