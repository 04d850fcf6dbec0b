"""Energy of one NVIDIA card by NVML (nvidia-ml-py): its energy counter, or its power where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from . import sensors
else:
    import sensors


class Meter:
    """Joules since the driver was loaded (`counts`), or watts."""

    name, covers = "nvml", "gpu"

    def __init__(self, library: Any, index: int = 0) -> None:
        self._library = library
        self._card = self._ask("nvmlDeviceGetHandleByIndex", index)
        self.rails = (f"GPU {index}",)
        try:
            self._ask("nvmlDeviceGetTotalEnergyConsumption", self._card)
            self.counts = True
        except sensors.Unavailable:  # the counter came with Volta; Jetson has none
            self._ask("nvmlDeviceGetPowerUsage", self._card)
            self.counts = False

    def read(self) -> float:
        name = "nvmlDeviceGetTotalEnergyConsumption" if self.counts else "nvmlDeviceGetPowerUsage"
        return float(self._ask(name, self._card)) * 1e-3

    def close(self) -> None:
        """Release the library."""
        self._library.nvmlShutdown()

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._library, function)(*arguments)
        except self._library.NVMLError as problem:
            raise sensors.Unavailable(f"NVML does not tell it ({problem})") from None


def open(root: Path = Path("/")) -> Meter:
    """Return the meter of the first card; Unavailable where there is none. `root` is not used."""
    library = sensors.nvml()
    try:
        return Meter(library)
    except sensors.Unavailable:
        library.nvmlShutdown()
        raise
