"""Watch a machine while it measures: its state before, every quarter of a second, between processes, and after."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from . import state
else:
    import state

if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    Device: TypeAlias = Literal["cpu", "gpu"]

PERIOD_SECONDS = 0.25
ROOT = "PAREDOWN_SENSORS_ROOT"
"""The variable that names another folder for what lies in sys/ of a board, for tests."""


class Watch:
    """A context in which a thread reads the state; clocks of GPUs are left out where the CPU computes."""

    def __init__(self, device: Device = "cpu", root: Path = Path("/")) -> None:
        self._root, self._device = root, device
        self._library = state.nvml_or_none() if device == "gpu" else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._before = self._after = state.State(at=0.0)
        self._during: list[state.State] = []

    def __enter__(self) -> Watch:
        self._before = state.read_all(self._root, self._library)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._after = state.read_all(self._root, self._library)

    def time_reference(self) -> None:
        """Time the reference work, when nothing else runs."""
        self._during.append(replace(self._read(), cpu_mhz=None, reference_ms=state.reference_ms()))

    def summary(self) -> dict[str, object]:
        """Return the details of a row: drifted, drift_reasons, state."""
        return state.summary(self._before, self._during, self._after)

    def _follow(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            self._during.append(self._read())

    def _read(self) -> state.State:
        seen = state.read(self._root, self._library)
        return seen if self._device == "gpu" else replace(seen, gpu_mhz=None)


def device_of(runtime: str) -> Device:
    """Return what a runner of this name computes on."""
    return "gpu" if any(word in runtime.lower() for word in ("tensorrt", "cuda")) else "cpu"


def root() -> Path:
    """Return the folder in which a board's sys/ lies."""
    return Path(os.environ.get(ROOT, "/"))


def clock_mode() -> str:
    """Return what decides the clocks of this board, to tell another mode by: governors, power mode, jetson_clocks."""
    seen = state.read_all(root())
    return repr((seen.governors, seen.power_mode, seen.jetson_clocks))
