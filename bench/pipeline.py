"""What a service does around a model: named stages from encoded bytes to an answer, given by a user's function.

The function returns a mapping (or a `Pipeline`) of `items`, a list of inputs such as encoded images or a function that
gives it; `before`, stage name -> function, from an item to the array or arrays that the model takes, with a batch of 1;
and `after`, from the model's output (a mapping by name where there are several) to the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..exporters.runner import Runner
from ..optimizer.errors import RecipeError
from .feeds import Feeds

Stage: TypeAlias = Callable[[Any], Any]
OWN = ("queue", "compute", "host_to_device", "device_to_host")
"""Names of the stages that we time ourselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Items, and the stages before and after the model in their order."""

    items: Sequence[object]
    before: Mapping[str, Stage]
    after: Mapping[str, Stage]


def resolve(text: str, base: Path) -> Pipeline:
    """Return the pipeline that an entry's function returns; a path is relative to `base`.

    Raises RecipeError for an answer that is no pipeline, InputError where the function raises.
    """
    from ..optimizer import entry  # torch

    found = entry.resolve(text, base)
    with entry.user_code(found.where):
        value = entry.call(found.function, {}, found.where)
    return value if isinstance(value, Pipeline) else checked(value, found.where)


def checked(value: object, where: str) -> Pipeline:
    """Return a mapping of items, before and after as a pipeline; RecipeError that says what is wrong with it."""
    if not isinstance(value, Mapping) or not {"items", "before"} <= value.keys() <= {"items", "before", "after"}:
        what = f"it returned {type(value).__name__}"
        raise RecipeError(what, where=where, fix='return {"items": [...], "before": {...}, "after": {...}}')
    items = list(value["items"]() if callable(value["items"]) else value["items"])
    if not items:
        raise RecipeError("it has no items", where=where, fix="return at least one")
    stages = {**value["before"], **value.get("after", {})}
    if len(stages) < len(value["before"]) + len(value.get("after", {})) or set(stages) & set(OWN):
        what = f"its stages are {', '.join([*value['before'], *value.get('after', {})])}"
        raise RecipeError(what, where=where, fix=f"name each once, and none {', '.join(OWN)}")
    return Pipeline(items=items, before=value["before"], after=value.get("after", {}))


def feeds_of(value: object, runner: Runner) -> Feeds:
    """Return what the last stage before the model gave as arrays by input name; RecipeError where it does not fit."""
    names = [spec.name for spec in runner.inputs]
    if isinstance(value, Mapping):
        return {name: np.asarray(array) for name, array in value.items()}
    if len(names) != 1 or not isinstance(value, np.ndarray):
        what = f"the last stage before the model gave {type(value).__name__}; the model takes {', '.join(names)}"
        raise RecipeError(what, where="--pipeline", fix="return one array, or arrays by input name")
    return {names[0]: value}


def output_of(outputs: Mapping[str, np.ndarray]) -> object:
    """Return the only output, or all by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs
