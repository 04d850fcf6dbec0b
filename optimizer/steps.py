"""What all steps share: decisions, results, what a run lends to a step, and how layers are named and matched.

A step is a module with `Spec` and the functions of `StepModule`; `recipe.step_module` finds it by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .data import Calibration
from .errors import RecipeError, nearest
from .graph import Graph
from .model import Model
from .stats import LayerStats
from .weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a step does to one layer: a method (quantizer, criterion, ...) with its spec, or nothing and why.

    activations: "dynamic" where the layer is asked to round its inputs to int8 at run time.
    """

    layer: str
    method: str = ""
    spec: Any = None
    reason: str = ""
    activations: Literal["float", "dynamic"] = "float"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """What a plan stands on: the graph of the model as it is loaded, and calibration data for plans that measure.

    base: the folder that entries in the recipe are relative to.
    """

    graph: Graph
    calibration: Calibration | None = None
    seed: int = 0
    base: Path = Path()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """What came of one layer: relative output error ||(W' - W) X|| / ||W X|| on its calibration inputs.

    reason: why it stayed as it was. The inputs are those that it was fitted to, before corrections.
    """

    layer: str
    error_rel: float
    reason: str = ""


class Cache(Protocol):
    """Where finished layers are kept, so that a killed run goes on from them."""

    def get(self, key: str) -> Weight | None: ...

    def put(self, key: str, weight: Weight) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a run lends to a step: where to report progress (done, total, label) and where to keep layers."""

    progress: Callable[[float, float, str], None] = lambda done, total, label: None
    cache: Cache | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What a step made: the new model, one result per layer, and sentences for the report."""

    model: Model
    layers: tuple[LayerResult, ...]
    notes: tuple[str, ...]


class StepModule(Protocol):
    """What the module of a step offers; `spec_types(fields)` beside it where several Specs share the mapping.

    names: every layer that a plan must say something about. shown: a decision in a few words. UNTOUCHED: what a layer
    is that the step leaves alone.
    """

    Spec: type
    UNTOUCHED: str

    def names(self, model: Model, spec: Any, ground: Ground) -> Sequence[str]: ...

    def plan(self, model: Model, spec: Any, extras: tuple[Any, ...], ground: Ground) -> tuple[Decision, ...]: ...

    def apply(
        self, model: Model, spec: Any, decisions: Sequence[Decision], calibration: Calibration, hooks: Hooks
    ) -> Result: ...

    def describe(self, decision: Decision) -> dict[str, Any]: ...

    def restore(self, layer: str, data: Mapping[str, Any]) -> Decision: ...

    def shown(self, decision: Decision) -> str: ...


def matches(pattern: str, layer: str) -> bool:
    """Return whether a glob means a layer; a name is a glob that means itself, brackets or not."""
    return pattern in (layer, short(layer)) or fnmatch(layer, pattern) or fnmatch(short(layer), pattern)


def short(layer: str) -> str:
    """Return a layer's name as people write it: "conv1" for "conv1.weight"."""
    return layer.removesuffix(".weight")


def weight_names(model: Model, ground: Ground) -> Sequence[str]:
    """Return every weight, those of the graph first and in its order."""
    uses = ground.graph.of_param()
    return [*(name for name in uses if name in model.weights), *(name for name in model.weights if name not in uses)]


def check_globs(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise RecipeError for a glob that matches none of the names."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise RecipeError(f'"{pattern}" matches no layer', fix=nearest(pattern, [short(name) for name in names]))


def output_error(before: Float[Tensor, "out in"], after: Float[Tensor, "out in"], stats: LayerStats) -> float:
    """Return ||(after - before) X|| / ||before X|| from the gram; plain Frobenius norms where there is none."""
    delta, reference = (after.double() - before.double()), before.double()
    return math.sqrt(_energy(delta, stats) / max(_energy(reference, stats), 1e-300))


def _energy(matrix: Tensor, stats: LayerStats) -> float:
    if stats.gram is None:
        weights = torch.ones(len(matrix), dtype=torch.float64) if stats.row_counts is None else stats.row_counts
        return float((matrix.square().sum(1) * weights).sum())
    grouped = matrix.reshape(len(stats.gram), -1, matrix.shape[1])
    return max(0.0, float((grouped @ stats.gram * grouped).sum()))
