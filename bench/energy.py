"""Energy of artifacts in a phase of its own, after they were timed: back to back, with idle power measured first."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..optimizer.errors import RecipeError, RuntimeMissingError, nearest
from .board import energy, sensors
from .measure import Call

if TYPE_CHECKING:
    from .board.watch import Device

NONE = "none"


def check_meter(name: str) -> None:
    """Raise RecipeError for a meter that cannot be meant."""
    if "." not in name and name not in energy.NAMES:
        raise RecipeError(f'there is no meter "{name}"', where="bench meter", fix=nearest(name, energy.NAMES))
    if "." in name and _missing(name):
        fix = "name a module with a function open(root)"
        raise RecipeError(f'there is no module "{name}"', where="bench meter", fix=fix)


def measure(calls: Sequence[Call], meter: str, device: Device, root: Path = Path("/")) -> list[energy.Energy]:
    """Return the energy of each call; without a meter None and the reason.

    `auto` may find none. A meter that was named must be there: RuntimeMissingError.
    """
    if meter == NONE:
        return [energy.Energy(meter=None, unavailable="no meter was asked for") for _ in calls]
    try:
        opened = energy.open_meter(meter, root, device)
    except sensors.Unavailable as problem:
        if meter != "auto":
            fix = "use --meter auto, or none"
            raise RuntimeMissingError(
                f"the meter {meter} is not available: {problem}", where="bench", fix=fix
            ) from None
        return [energy.Energy(meter=None, unavailable=str(problem)) for _ in calls]
    try:
        return energy.measure(calls, opened, energy.IDLE_SECONDS)
    finally:
        opened.close()


def per_sample(found: energy.Energy, batch: int) -> float | None:
    """Return joules per sample above idle."""
    return None if found.joules_per_run is None else found.joules_per_run / batch


def details(found: energy.Energy) -> dict[str, Any]:
    """Return the details of a row: the meter, idle and mean power in watts, or why there is no energy."""
    if found.unavailable:
        return {"energy": f"unavailable: {found.unavailable}"}
    rails = {"meter": found.meter, "meter_rails": list(found.rails)}
    return rails | {"idle_w": found.idle_w, "mean_w": found.mean_w}


def _missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
