"""Simulated machines: a sysfs tree, a stand-in for NVML, a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


def write(root: Path, files: Mapping[str, object]) -> Path:
    """Write a sysfs tree and return its root."""
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return root


def orin_nano(root: Path, milliamperes: float = 1000) -> Path:
    """Write an Orin Nano: one INA3221 with the module's input, clocks, zones, an over-current counter."""
    chip = "sys/class/hwmon/hwmon1"
    labels = {1: "VDD_IN", 2: "VDD_CPU_GPU_CV", 3: "VDD_SOC"}
    rails = {f"{chip}/in{i}_label": name for i, name in labels.items()} | {f"{chip}/in{i}_input": 5000 for i in labels}
    currents = {f"{chip}/curr{i}_input": milliamperes / i for i in labels}
    odd = {f"{chip}/in7_label": "sum of shunt voltages", f"{chip}/in7_input": 12}
    cpus = {f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_cur_freq": 1510400 for i in range(6)}
    governors = {f"sys/devices/system/cpu/cpu{i}/cpufreq/scaling_governor": "schedutil" for i in range(6)}
    rest = {
        f"{chip}/name": "ina3221",
        "sys/class/hwmon/hwmon2/name": "soctherm_oc",
        "sys/class/hwmon/hwmon2/oc1_event_cnt": 0,
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": 48250,
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
        "sys/class/thermal/thermal_zone1/temp": 47000,
        "sys/class/thermal/cooling_device0/type": "pwm-fan",
        "sys/class/thermal/cooling_device0/cur_state": 2,
        "sys/class/thermal/cooling_device1/type": "cpufreq-cpu0",
        "sys/class/thermal/cooling_device1/cur_state": 0,
        "sys/class/devfreq/17000000.gpu/cur_freq": 624750000,
        "sys/class/devfreq/15340000.vic/cur_freq": 115200000,
    }
    return write(root, rails | currents | odd | cpus | governors | rest)


@dataclass
class Clock:
    """A clock that the test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class NvmlError(Exception):
    """What pynvml calls NVMLError."""


@dataclass
class Nvml:
    """A card that draws known watts on a clock, in the words of pynvml."""

    clock: Clock = field(default_factory=Clock)
    watts: float = 100.0
    counter: bool = True
    cards: int = 1
    mhz: int = 1980
    reasons: int = 0
    gone: bool = False
    open: int = 0

    NVMLError = NvmlError
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.cards

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index >= self.cards:
            raise NvmlError("Not Found")
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, card: int) -> int:  # noqa: N802
        if not self.counter or self.gone:
            raise NvmlError("GPU is lost" if self.gone else "Not Supported")
        return round(1e6 + 1e3 * self.watts * self.clock())

    def nvmlDeviceGetPowerUsage(self, card: int) -> int:  # noqa: N802
        if self.gone:
            raise NvmlError("GPU is lost")
        return round(1e3 * self.watts)

    def nvmlDeviceGetClockInfo(self, card: int, kind: int) -> int:  # noqa: N802
        return self.mhz

    def nvmlDeviceGetTemperature(self, card: int, kind: int) -> int:  # noqa: N802
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: int) -> int:  # noqa: N802
        return self.reasons
