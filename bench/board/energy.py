"""Joules per run by whatever meter a machine has, idle power subtracted; never a model where it has none.

    python3 energy.py [METER]        which meter this machine has, and its idle power, as JSON

A meter is a module of this folder, or any module that can be imported: `open(root)` returns an object that has `name`,
`covers` ("board", "cpu" or "gpu"), `counts` (whether `read` returns joules that only grow, else watts), `rails`, `read`
and `close`; both may raise `sensors.Unavailable`.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from . import sensors
else:
    import sensors

AUTO = ("ina3221", "tegrastats", "rapl", "nvml")
"""The meters in the order in which `auto` tries them: the whole board first."""
NAMES = ("auto", "none", *AUTO)
INTERVAL_SECONDS = 0.02
"""How often power is read; sensors of boards and cards renew it every 10 to 100 ms."""
IDLE_SECONDS = 2.0
TURN_SECONDS = 0.5
TURNS = 4
"""Each artifact draws power in so many turns, between those of the others, so that warming up hits all alike."""


@dataclass(frozen=True)
class Energy:
    """Energy of one artifact: joules per run above idle, None with the reason in `unavailable` ("" where measured).

    mean_w: power under load, idle included. `seconds`, `runs`: how long and how often it ran for this.
    """

    meter: str | None
    rails: tuple[str, ...] = ()
    joules_per_run: float | None = None
    idle_w: float | None = None
    mean_w: float | None = None
    seconds: float = 0.0
    runs: int = 0
    unavailable: str = ""


@dataclass(frozen=True)
class Window:
    """Joules that were drawn in so many seconds."""

    joules: float
    seconds: float


class Integrator:
    """Joules since it was opened, of any meter: a counter is read, power is integrated by trapezoids in a thread."""

    def __init__(
        self, meter: Any, clock: Callable[[], float] = time.monotonic, interval: float = INTERVAL_SECONDS
    ) -> None:
        self._meter, self._clock, self._interval = meter, clock, interval
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._joules, self._problem = 0.0, ""
        self._last = (clock(), float(meter.read()))
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Return joules up to now; Unavailable where the sensor has gone in the meantime."""
        return self._reading()[1]

    def close(self) -> None:
        """End the thread; the meter stays open."""
        self._stop.set()
        self._thread.join()

    def window(self, work: Callable[[], None]) -> Window:
        """Return what was drawn while `work` ran."""
        start, before = self._reading()
        work()
        end, after = self._reading()
        return Window(after - before, end - start)

    def _reading(self) -> tuple[float, float]:
        """Return when the meter was read, now, and the joules up to then."""
        with self._lock:
            self._step()
            if self._problem:
                raise sensors.Unavailable(self._problem)
            return self._last[0], self._joules

    def _follow(self) -> None:
        while not self._stop.wait(self._interval):
            with self._lock:
                self._step()

    def _step(self) -> None:
        if self._problem:
            return
        try:
            value = float(self._meter.read())
        except (sensors.Unavailable, OSError, ValueError) as problem:
            self._problem = str(problem)
            return
        now, (then, old) = self._clock(), self._last
        self._joules += value - old if self._meter.counts else (now - then) * (value + old) / 2
        self._last = (now, value)


def open_meter(name: str, root: Path = Path("/"), device: str = "cpu") -> Any:
    """Return a meter by name; `auto` takes the first of AUTO that covers the `device` that computes, "cpu" or "gpu".

    Unavailable says why there is none, of all that were tried.
    """
    if name != "auto":
        return _module(name).open(root)
    reasons = []
    for each in AUTO:
        try:
            meter = _module(each).open(root)
        except sensors.Unavailable as problem:
            reasons.append(f"{each}: {problem}")
            continue
        if meter.covers in ("board", device):
            return meter
        meter.close()
        reasons.append(f"{each}: it measures the {meter.covers}, and the {device} computes")
    raise sensors.Unavailable("; ".join(reasons))


def measure(calls: Sequence[Callable[[], object]], meter: Any, idle_seconds: float = IDLE_SECONDS) -> list[Energy]:
    """Return the energy of each call: idle power first, then TURNS turns of each, back to back, in alternating order.

    A sensor that vanishes leaves None and the reason. Cost: idle_seconds + TURNS * TURN_SECONDS per call.
    """
    try:
        integrator = Integrator(meter)
    except sensors.Unavailable as problem:
        return [_unavailable(meter, str(problem)) for _ in calls]
    try:
        return _measure(calls, meter, integrator, idle_seconds)
    except sensors.Unavailable as problem:
        return [_unavailable(meter, f"the sensor vanished: {problem}") for _ in calls]
    finally:
        integrator.close()


def _measure(
    calls: Sequence[Callable[[], object]], meter: Any, integrator: Integrator, idle_seconds: float
) -> list[Energy]:
    idle = integrator.window(lambda: time.sleep(idle_seconds))
    windows: list[list[Window]] = [[] for _ in calls]
    runs = [0] * len(calls)
    for turn in range(TURNS):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            counted = [0]
            windows[index].append(integrator.window(_turn(calls[index], counted)))
            runs[index] += counted[0]
    idle_w = idle.joules / idle.seconds
    return [_energy(meter, idle_w, windows[index], runs[index]) for index in range(len(calls))]


def _turn(call: Callable[[], object], counted: list[int]) -> Callable[[], None]:
    def work() -> None:
        end = time.monotonic() + TURN_SECONDS
        while time.monotonic() < end:
            call()
            counted[0] += 1

    return work


def _energy(meter: Any, idle_w: float, windows: Sequence[Window], runs: int) -> Energy:
    joules, seconds = sum(window.joules for window in windows), sum(window.seconds for window in windows)
    above = joules - idle_w * seconds
    lost = above <= 0
    return Energy(
        meter=meter.name,
        rails=tuple(meter.rails),
        joules_per_run=None if lost else above / runs,
        idle_w=idle_w,
        mean_w=joules / seconds,
        seconds=seconds,
        runs=runs,
        unavailable="the load drew no more than idle" if lost else "",
    )


def _unavailable(meter: Any, reason: str) -> Energy:
    return Energy(meter=meter.name, rails=tuple(meter.rails), unavailable=reason)


def _module(name: str) -> Any:
    """Return the module of a meter; one with a dot in its name is somebody else's."""
    if "." in name:
        return importlib.import_module(name)
    return importlib.import_module(f"{__package__}.{name}" if __package__ else name)


if __name__ == "__main__":
    try:
        found = open_meter(sys.argv[1] if len(sys.argv) > 1 else "auto", device="gpu")
        said: dict[str, object] = asdict(measure([lambda: time.sleep(0.01)], found)[0])
        found.close()
    except sensors.Unavailable as problem:
        said = {"meter": None, "unavailable": str(problem)}
    json.dump(said, sys.stdout, indent=1)
    sys.stdout.write("\n")
