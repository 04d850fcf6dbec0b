"""`optimize CHECKPOINT --entry ... --data ...`: the shipped default recipe, model and data from the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from . import recipe as recipes
from .errors import RecipeError
from .model import InputSpec
from .recipe import DataSpec, MetricSpec, ModelSpec, Recipe

DEFAULT = Path(__file__).parent / "recipes" / "default.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line names; entries are relative to the current folder."""

    checkpoint: Path
    entry: str
    data: str
    metric: str = ""
    inputs: tuple[str, ...] = ()
    samples: int = 512


def recipe(request: Request, settings: tuple[str, ...]) -> Recipe:
    """Return the default recipe for a request."""
    base = recipes.parse(DEFAULT.read_text(), DEFAULT.name, Path(), settings)
    inputs = tuple(_input(text) for text in request.inputs)
    if not inputs:
        raise RecipeError("the inputs are not named", where="--input", fix="write --input x=batch,3,32,32")
    checkpoint = os.path.abspath(request.checkpoint)
    return replace(
        base,
        model=ModelSpec(entry=request.entry, checkpoint=checkpoint, inputs=inputs),
        data=DataSpec(entry=request.data, samples=request.samples, seed=base.seed),
        metric=MetricSpec(entry=request.metric) if request.metric else None,
    )


def _input(text: str) -> InputSpec:
    name, equals, rest = text.partition("=")
    shape, _, dtype = rest.partition(":")
    if not name or not equals or not shape:
        raise RecipeError(f'"{text}" names no shape', where="--input", fix="write --input x=batch,3,32,32")
    sizes = tuple(
        int(size) if size.lstrip("-").isdigit() else size for size in shape.strip("[]()").replace(" ", "").split(",")
    )
    return InputSpec(name=name, shape=sizes, dtype=dtype or "float32")
