"""Read clocks, power mode, temperatures and throttling of a machine, and say whether they moved under a measurement.

    python3 state.py                 the state now, as JSON

Clocks are those of the kernel's cpufreq and devfreq, and of NVML. A virtual machine has none; there a fixed amount of
work of the standard library is timed instead (`reference_ms`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from . import sensors
else:
    import sensors

DRIFT = 0.05
"""How far the medians of the parts of a measurement may lie apart, relative to the smallest: more has drifted."""
PARTS = 4
"""A measurement is cut into at most so many consecutive parts, of three readings or more where there are six: the
median of three passes over a single disturbed reading."""
REFERENCE_ITERATIONS, REFERENCE_TIMES = 2000, 20
"""Iterations of PBKDF2 with SHA-256, 0.45 ms on an AMD EPYC, and how often, of which the best counts: of five, it moved
by 13 and 37 % on a virtual machine that seemed idle."""
GPUS = ("gpu", "ga10b", "gv11b", "gp10b", "gm20b", "gb10b")
"""What the kernel of Jetson calls its GPUs, after an address."""
NO_THROTTLE = ("fan", "tcc", "backlight")
"""Cooling devices whose state says nothing of clocks."""
HARMLESS = 0x1 | 0x2 | 0x10 | 0x100
"""Bits of NVML that slow no load down: idle, clocks that the user set, sync boost, display clocks."""
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""The other bits of NVML's clocks event reasons (nvml.h)."""


@dataclass(frozen=True)
class State:
    """One reading; None is what this machine does not say. `at`: seconds of the monotonic clock.

    cpu_mhz, governors: one per core. gpu_mhz: by device. temperatures_c: by sensor. throttle_counts: by counter, since
    boot. throttling: what holds clocks down right now. power_mode, jetson_clocks: what `nvpmodel -q` and
    `jetson_clocks --show` answer. reference_ms: milliseconds of the reference work.
    """

    at: float
    cpu_mhz: tuple[float, ...] | None = None
    governors: tuple[str, ...] | None = None
    gpu_mhz: dict[str, float] | None = None
    temperatures_c: dict[str, float] | None = None
    throttle_counts: dict[str, float] | None = None
    throttling: tuple[str, ...] = ()
    power_mode: str | None = None
    jetson_clocks: str | None = None
    reference_ms: float | None = None


def read(root: Path = Path("/"), library: Any = None) -> State:
    """Return what takes no time to read. `root`: where sys/ lies; `library`: NVML, None leaves its cards out."""
    clocks, reasons, heat = _nvml(library)
    return State(
        at=time.monotonic(),
        cpu_mhz=_cpu_mhz(root),
        governors=_governors(root),
        gpu_mhz={**_devfreq(root), **clocks} or None,
        temperatures_c={**_thermal_zones(root), **_hwmon(root), **heat} or None,
        throttle_counts=_throttle_counts(root) or None,
        throttling=tuple(_cooling(root) + reasons),
    )


def read_all(root: Path = Path("/"), library: Any = None) -> State:
    """Return the state with the answers of programs and the time of the reference work, which takes milliseconds."""
    return dataclasses.replace(
        read(root, library),
        power_mode=sensors.answer(("nvpmodel", "-q")),
        jetson_clocks=sensors.answer(("jetson_clocks", "--show")),
        reference_ms=reference_ms(),
    )


def reference_ms() -> float:
    """Return the milliseconds of a constant amount of work on one thread, the best of REFERENCE_TIMES."""
    found = []
    for _ in range(REFERENCE_TIMES):
        start = time.perf_counter()
        hashlib.pbkdf2_hmac("sha256", b"paredown", b"reference", REFERENCE_ITERATIONS)
        found.append(time.perf_counter() - start)
    return min(found) * 1e3


def drift(before: State, during: Sequence[State], after: State) -> tuple[str, ...]:
    """Return what moved under a measurement, a phrase each; () where nothing that could be read did.

    The clock of the fastest core, the clock of each GPU and, where no CPU clock can be read, the reference work must
    not differ by more than DRIFT between the PARTS of the measurement. An idle machine may clock down: readings before
    and after count for the reference work and for throttling only.
    """
    cores = [max(state.cpu_mhz) for state in during if state.cpu_mhz]
    work = [state.reference_ms for state in (before, *during, after) if state.reference_ms is not None]
    found = _moved("the CPU clock", cores, "MHz") if cores else _moved("the reference work", work, "ms")
    for name in sorted({name for state in during for name in state.gpu_mhz or {}}):
        seen = [clocks[name] for clocks in (state.gpu_mhz or {} for state in during) if name in clocks]
        found += _moved(f"the clock of {name}", seen, "MHz")
    return tuple(found + _throttled(before, during, after))


def summary(before: State, during: Sequence[State], after: State) -> dict[str, object]:
    """Return the states of a measurement as plain values; what was read in between as [least, median, greatest]."""
    reasons = drift(before, during, after)
    return {
        "drifted": bool(reasons),
        "drift_reasons": list(reasons),
        "state": {
            "before": plain(before),
            "during": {
                "readings": len(during),
                "cpu_mhz": _range([max(state.cpu_mhz) for state in during if state.cpu_mhz]),
                "gpu_mhz": _range([max(state.gpu_mhz.values()) for state in during if state.gpu_mhz]),
                "temperature_c": _range([max(s.temperatures_c.values()) for s in during if s.temperatures_c]),
                "reference_ms": _range([s.reference_ms for s in during if s.reference_ms is not None]),
            },
            "after": plain(after),
        },
    }


def plain(state: State) -> dict[str, object]:
    """Return a state as JSON holds it, without the time of day."""
    values = dataclasses.asdict(state)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key != "at"}


def nvml_or_none() -> Any:
    """Return NVML where it works, to pass to `read`."""
    try:
        return sensors.nvml()
    except sensors.Unavailable:
        return None


def _moved(what: str, values: Sequence[float], unit: str) -> list[str]:
    parts = _parts(values)
    if not parts or min(parts) <= 0 or max(parts) / min(parts) - 1 <= DRIFT:
        return []
    change = 100 * (max(parts) / min(parts) - 1)
    return [f"{what} moved by {change:.0f} % ({min(parts):.4g} to {max(parts):.4g} {unit})"]


def _parts(values: Sequence[float]) -> list[float]:
    count = min(PARTS, max(len(values) // 3, min(2, len(values))))
    edges = [round(i * len(values) / count) for i in range(count + 1)] if count else []
    return [median(values[edges[i] : edges[i + 1]]) for i in range(count)]


def _throttled(before: State, during: Sequence[State], after: State) -> list[str]:
    old, new = before.throttle_counts or {}, after.throttle_counts or {}
    risen = {name: new[name] - old[name] for name in sorted(new) if name in old and new[name] > old[name]}
    active = sorted({reason for state in (*during, after) for reason in state.throttling})
    counted = [f"it throttled: {name} rose by {count:g}" for name, count in risen.items()]
    return counted + [f"it throttled: {reason}" for reason in active]


def _range(values: Sequence[float]) -> list[float] | None:
    return [min(values), median(values), max(values)] if values else None


def _cpu_mhz(root: Path) -> tuple[float, ...] | None:
    cores = sensors.folders(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq")
    clocks = [sensors.number(core / "scaling_cur_freq") for core in cores]
    return tuple(clock / 1e3 for clock in clocks if clock is not None) or None


def _governors(root: Path) -> tuple[str, ...] | None:
    cores = sensors.folders(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq")
    return tuple(filter(None, (sensors.text(core / "scaling_governor") for core in cores))) or None


def _devfreq(root: Path) -> dict[str, float]:
    found = {}
    for folder in sensors.folders(root, "sys/class/devfreq/*"):
        clock = sensors.number(folder / "cur_freq")
        if clock is not None and any(name in folder.name for name in GPUS):
            found[folder.name] = clock / 1e6
    return found


def _thermal_zones(root: Path) -> dict[str, float]:
    found = {}
    for zone in sensors.folders(root, "sys/class/thermal/thermal_zone*"):
        value = sensors.number(zone / "temp")
        if value is not None:
            found[f"{zone.name} {sensors.text(zone / 'type') or ''}".strip()] = value / 1e3
    return found


def _hwmon(root: Path) -> dict[str, float]:
    found = {}
    for chip in sensors.folders(root, "sys/class/hwmon/hwmon*"):
        for path in sorted(chip.glob("temp*_input")):
            value, prefix = sensors.number(path), path.name[: -len("_input")]
            if value is not None:
                label = sensors.text(chip / f"{prefix}_label") or prefix
                found[f"{chip.name} {sensors.text(chip / 'name') or ''} {label}"] = value / 1e3
    return found


def _throttle_counts(root: Path) -> dict[str, float]:
    """Return counters since boot: thermal ones of x86 cores, over-current ones of Jetson (soctherm)."""
    paths = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"))
    paths += sorted(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt"))
    owners = (path.parent.parent if path.parent.name == "thermal_throttle" else path.parent for path in paths)
    names = [f"{owner.name} {path.name}" for owner, path in zip(owners, paths)]  # noqa: B905 (Python 3.8)
    counts = [sensors.number(path) for path in paths]
    return {name: count for name, count in zip(names, counts) if count is not None}  # noqa: B905


def _cooling(root: Path) -> list[str]:
    """Return the cooling devices that hold clocks down now."""
    found = []
    for device in sensors.folders(root, "sys/class/thermal/cooling_device*"):
        kind = sensors.text(device / "type") or device.name
        harmless = any(word in kind.lower() for word in NO_THROTTLE)
        if not harmless and (sensors.number(device / "cur_state") or 0) > 0:
            found.append(f"cooling device {kind}")
    return found


def _nvml(library: Any) -> tuple[dict[str, float], list[str], dict[str, float]]:
    """Return clocks in MHz, throttle reasons and degrees of NVIDIA's cards; a card says only what it can."""
    clocks: dict[str, float] = {}
    heat: dict[str, float] = {}
    reasons: list[str] = []
    for index in range(_asked(library, "nvmlDeviceGetCount") or 0):
        name, card = f"GPU {index}", _asked(library, "nvmlDeviceGetHandleByIndex", index)
        clock = _asked(library, "nvmlDeviceGetClockInfo", card, library.NVML_CLOCK_SM)
        degrees = _asked(library, "nvmlDeviceGetTemperature", card, library.NVML_TEMPERATURE_GPU)
        bits = int(_asked(library, "nvmlDeviceGetCurrentClocksThrottleReasons", card) or 0)
        clocks.update({} if clock is None else {name: float(clock)})
        heat.update({} if degrees is None else {name: float(degrees)})
        reasons += [f"{name}: {reason}" for reason in _reasons(bits)]
    return clocks, reasons, heat


def _reasons(bits: int) -> list[str]:
    known = [reason for bit, reason in REASONS.items() if bits & bit]
    rest = bits & ~HARMLESS & ~sum(REASONS)
    return known + ([f"reason {rest:#x}"] if rest else [])


def _asked(library: Any, function: str, *arguments: Any) -> Any:
    if library is None:
        return None
    try:
        return getattr(library, function)(*arguments)
    except library.NVMLError:
        return None


if __name__ == "__main__":
    json.dump(plain(read_all(library=nvml_or_none())), sys.stdout, indent=1)
    sys.stdout.write("\n")
