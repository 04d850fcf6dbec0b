"""Make a trained network smaller and faster, and prove that it still computes the same.

The public names, loaded when they are first used, so that importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        AccuracyError,
        Error,
        ExportError,
        InfeasibleError,
        InputError,
        RecipeError,
        RuntimeMissingError,
    )
    from .model import InputSpec, Model
    from .recipe import Recipe
    from .recipe import read as read_recipe
    from .run import Options
    from .run import run as run_recipe
    from .store import load, save

__all__ = [
    "AccuracyError",
    "Error",
    "ExportError",
    "InfeasibleError",
    "InputError",
    "InputSpec",
    "Model",
    "Options",
    "Recipe",
    "RecipeError",
    "RuntimeMissingError",
    "load",
    "read_recipe",
    "run_recipe",
    "save",
]

_PLACES = {
    **dict.fromkeys(("InputSpec", "Model"), "model"),
    **dict.fromkeys(("Recipe", "read_recipe"), "recipe"),
    **dict.fromkeys(("Options", "run_recipe"), "run"),
    **dict.fromkeys(("load", "save"), "store"),
}
"""Name -> its module, where that is not `errors`. `run` names a module already, so its function is `run_recipe`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_PLACES.get(name, 'errors')}", __name__)
    return getattr(module, name.removesuffix("_recipe"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
