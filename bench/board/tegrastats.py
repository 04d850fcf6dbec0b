"""Power of a Jetson module by the lines of tegrastats, where the sensors themselves cannot be read."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from . import ina3221, sensors
else:
    import ina3221
    import sensors

COMMAND = ("tegrastats", "--interval", "100")
SILENCE_SECONDS = 3.0
"""A line that is older is no measurement any more."""
_RAIL = re.compile(r"\b((?:VDD|VIN|POM|VDDQ)\w*) (\d+)(?:mW)?/\d+(?:mW)?")


class Meter:
    """Watts of the rails that make up the module, of the last line."""

    name, covers, counts = "tegrastats", "board", False

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.rails: tuple[str, ...] = ()
        self._last: tuple[float, Mapping[str, float]] | None = None
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as problem:
            raise sensors.Unavailable(f"tegrastats does not start ({problem.strerror})") from None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        self._await_first()

    def read(self) -> float:
        if self._last is None or time.monotonic() - self._last[0] > SILENCE_SECONDS or self._process.poll() is not None:
            raise sensors.Unavailable("tegrastats fell silent")
        watts = self._last[1]
        return sum(watts[name] for name in self.rails)

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _follow(self) -> None:
        for line in self._process.stdout or ():
            rails = parse(line.decode("utf-8", "replace"))
            if rails:
                self._last = (time.monotonic(), rails)

    def _await_first(self) -> None:
        end = time.monotonic() + SILENCE_SECONDS
        while self._last is None and time.monotonic() < end and self._thread.is_alive():
            time.sleep(0.01)
        if self._last is None:
            self.close()
            raise sensors.Unavailable("tegrastats names no power rail")
        self.rails = ina3221.total(tuple(self._last[1]))


def open(root: Path = Path("/")) -> Meter:
    """Return the meter; Unavailable where the program is absent or its lines name no rail. `root` is not used."""
    return Meter()


def parse(line: str) -> dict[str, float]:
    """Return watts by rail of a line such as "... VDD_IN 4852mW/4790mW ..." (the second number is an average)."""
    return {name: float(value) / 1e3 for name, value in _RAIL.findall(line)}
