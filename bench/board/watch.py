"""Watch the machine while it measures: its state before, every quarter of a second, and after."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from . import energy, sensors, state
else:
    import energy
    import sensors
    import state

ROOT = "PAREDOWN_SENSORS_ROOT"
"""The variable that names another folder for what lies in sys/, for tests."""
PERIOD_SECONDS = 0.25


class Watch:
    """A context in which a thread reads the state; clocks of GPUs are left out where the CPU computes."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._library = state.nvml_or_none() if device == "gpu" else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._during: list[state.State] = []

    def __enter__(self) -> Watch:
        self._before = self._after = state.read_all(root(), self._library)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._after = state.read_all(root(), self._library)

    def summary(self) -> dict[str, object]:
        """Return the details of a row: drifted, drift_reasons, state."""
        return state.summary(self._before, self._during, self._after)

    def _follow(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            seen = state.read(root(), self._library)
            self._during.append(seen if self._device == "gpu" else replace(seen, gpu_mhz=None))


def root() -> Path:
    """Return the folder in which sys/ lies."""
    return Path(os.environ.get(ROOT, "/"))


def clock_mode() -> str:
    """Return what decides the clocks of this machine, to tell another mode by: governors, power mode, jetson_clocks."""
    seen = state.read_all(root())
    return repr((seen.governors, seen.power_mode, seen.jetson_clocks))


def energies(calls: Any, meter: str, device: str) -> list[energy.Energy]:
    """Return the energy of each call; None with the reason where there is no meter."""
    try:
        opened = energy.open_meter(meter, root(), device)
    except sensors.Unavailable as problem:
        return [energy.Energy(meter=None, unavailable=str(problem)) for _ in calls]
    try:
        return energy.measure(calls, opened)
    finally:
        opened.close()
