"""Power of a Jetson module by its INA3221 sensors, through hwmon, or iio in JetPack 4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from . import sensors
else:
    import sensors

TOTALS = ("VDD_IN", "POM_5V_IN", "VIN")
"""Rails that feed the whole module, where it has one."""
INSIDE = ("VDDQ_VDD2_1V8AO",)
"""Rails that are not added, as another that is may feed them: the memory's on AGX Orin. `rails` says what was added."""


class Meter:
    """Watts of the rails that make up the module."""

    name, covers, counts = "ina3221", "board", False

    def __init__(self, rails: Mapping[str, tuple[Path, ...]]) -> None:
        self.rails = total(tuple(rails))
        self._paths = [rails[name] for name in self.rails]
        self.read()

    def read(self) -> float:
        return sum(_watts(paths) for paths in self._paths)

    def close(self) -> None:
        """Nothing is held open."""


def open(root: Path = Path("/")) -> Meter:
    """Return the meter; Unavailable where there is no such sensor or it cannot be read."""
    rails = {**_hwmon(root), **_iio(root)}
    if not rails:
        raise sensors.Unavailable("there is no INA3221 sensor")
    return Meter(rails)


def total(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the rails whose sum is the module: its input where that is measured, else all that feed something."""
    for name in TOTALS:
        if name in names:
            return (name,)
    return tuple(name for name in names if name not in INSIDE)


def _watts(paths: tuple[Path, ...]) -> float:
    """Return the power of a rail from millivolts and milliamperes, or from milliwatts alone."""
    values = [sensors.required(path) for path in paths]
    return values[0] * 1e-3 if len(values) == 1 else values[0] * values[1] * 1e-6


def _hwmon(root: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for chip in sensors.folders(root, "sys/class/hwmon/hwmon*"):
        for path in sorted(chip.glob("in*_label")) if sensors.text(chip / "name") == "ina3221" else ():
            channel, label = re.sub(r"\D", "", path.name), sensors.text(path) or ""
            volts, amperes = chip / f"in{channel}_input", chip / f"curr{channel}_input"
            if (
                label and label != "NC" and volts.exists() and amperes.exists()
            ):  # "sum of shunt voltages" has no current
                found[label] = (volts, amperes)
    return found


def _iio(root: Path) -> dict[str, tuple[Path, ...]]:
    found: dict[str, tuple[Path, ...]] = {}
    for device in sensors.folders(root, "sys/bus/i2c/drivers/ina3221x/*/iio:device*"):
        for path in sorted(device.glob("rail_name_*")):
            power = device / f"in_power{path.name[-1]}_input"
            if power.exists() and sensors.text(path) not in (None, "", "NC"):
                found[sensors.text(path) or ""] = (power,)
    return found
