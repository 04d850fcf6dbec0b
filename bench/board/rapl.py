"""Energy of the processor's packages by the counters of Intel and AMD (RAPL), through the kernel's powercap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from . import sensors
else:
    import sensors


class Meter:
    """Joules of all packages since the meter was opened; wraps of the counters are undone.

    A counter wraps after minutes at the least (max_energy_range_uj); it must be read once in between.
    """

    name, covers, counts = "rapl", "cpu", True

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges = [sensors.required(zone / "max_energy_range_uj") for zone in zones]
        self._last = [sensors.required(zone / "energy_uj") for zone in zones]
        self._sum = 0.0
        self.rails = tuple(sensors.text(zone / "name") or zone.name for zone in zones)

    def read(self) -> float:
        now = [sensors.required(zone / "energy_uj") for zone in self._zones]
        for index, value in enumerate(now):
            step = value - self._last[index]
            self._sum += step if step >= 0 else step + self._ranges[index]
        self._last = now
        return self._sum * 1e-6

    def close(self) -> None:
        """Nothing is held open."""


def open(root: Path = Path("/")) -> Meter:
    """Return the meter; Unavailable where there is no package zone or its counter may not be read (root's alone)."""
    zones = [
        zone
        for zone in sensors.folders(root, "sys/class/powercap/intel-rapl:*")
        if (sensors.text(zone / "name") or "").startswith("package")
    ]
    if not zones:
        raise sensors.Unavailable("the kernel shows no RAPL package")
    return Meter(zones)
