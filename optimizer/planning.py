"""From a recipe to what will happen: model and data loaded, graph captured, one decision per layer and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from . import checkpoint, cost, data, entry, quantize, store
from . import recipe as recipes
from .errors import Error, RecipeError
from .graph import Graph
from .model import Model, Source, from_module, from_tensors, skeleton_of
from .quantize import Decision
from .recipe import Recipe, Step
from .walk import trace
from .workspace import fingerprint

SCHEMA = "paredown.plan/1"
Planned: TypeAlias = tuple[Step, tuple[Decision, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A recipe whose model and data have been loaded."""

    recipe: Recipe
    model: Model
    calibration: data.Calibration
    graph: Graph
    fingerprint: str


def load(recipe: Recipe) -> Job:
    """Load the model and the calibration data of a recipe, and capture the graph."""
    model = load_model(recipe)
    if recipe.data is None:
        raise RecipeError("the recipe names no data", where=recipe.name, fix='write data: {entry: "path.py:function"}')
    spec = recipe.data
    function = entry.resolve(spec.entry, recipe.base)
    offered = {"samples": spec.samples, "seed": spec.seed}
    result = entry.call(function.function, offered, recipe.at("data"), spec.args)
    calibration = data.batches(result, model.inputs, spec.samples)
    graph = trace(model.module(), calibration.batches[:1]).graph
    hashes = [tensor for batch in calibration.batches for tensor in batch]
    mark = fingerprint(torch.__version__, recipe.seed, store.describe(model), *model.values().values(), *hashes)
    return Job(recipe=recipe, model=model, calibration=calibration, graph=graph, fingerprint=mark)


def load_model(recipe: Recipe) -> Model:
    """Return the model of a recipe: its entry (or Hugging Face folder) with the weights of its checkpoint."""
    spec = recipe.model
    if spec is None or not spec.inputs:
        what = "the recipe names no model" if spec is None else "the model has no inputs"
        fix = "write model: {entry: ..., checkpoint: ..., inputs: {x: [batch, 3, 32, 32]}}"
        raise RecipeError(what, where=recipe.at("model"), fix=fix)
    path = recipe.path(spec.checkpoint) if spec.checkpoint else None
    if spec.entry:
        source_entry = entry.resolve(spec.entry, recipe.base)
        module = entry.build_module(source_entry, spec.args)
        files = source_entry.files
    elif path is not None and path.is_dir():
        module, files = checkpoint.hf_module(path), ()
    else:
        raise RecipeError("the model has no entry", where=recipe.at("model"), fix='write entry: "path.py:function"')
    source = Source(entry=spec.entry, args=spec.args, files=files)
    if path is None:
        return from_module(module, spec.inputs, source)
    try:
        values = checkpoint.match(checkpoint.read(path), module)
    except Error as error:
        raise type(error)(error.what, where=error.where or spec.checkpoint, fix=error.fix) from error
    return from_tensors(skeleton_of(module), values, spec.inputs, source)


def plan(job: Job) -> list[Planned]:
    """Resolve every step of a recipe for its model."""
    planned = []
    taken: dict[str, str] = {}
    for step in job.recipe.steps:
        try:
            decisions = quantize.plan(job.model, step.spec, step.extras[0], job.graph)
        except RecipeError as error:
            raise RecipeError(error.what, where=error.where or step.where, fix=error.fix) from error
        for decision in decisions:
            if decision.quantizer and decision.layer in taken:
                layer = quantize.short(decision.layer)
                raise RecipeError(
                    f'layer "{layer}" is compressed already by the step at {taken[decision.layer]}',
                    where=step.where,
                    fix="name it in one step only, with layers or skip",
                )
            if decision.quantizer:
                taken[decision.layer] = step.where
        planned.append((step, decisions))
    return planned


def plan_data(planned: Sequence[tuple[Step, Sequence[Decision]]]) -> dict[str, Any]:
    """Return a plan as data for plan.yaml."""
    steps = [{s.name: {d.layer: quantize.describe(d) for d in decisions}} for s, decisions in planned]
    return {"schema": SCHEMA, "steps": steps}


def replay(path: Path, job: Job) -> list[Planned]:
    """Read plan.yaml for a recipe's steps; a RecipeError where it does not fit them or the model."""
    found = recipes.read_data(path)
    steps = found.get("steps", []) if isinstance(found, Mapping) else []
    names = [next(iter(item), "") if isinstance(item, Mapping) else "" for item in steps]
    if names != [step.name for step in job.recipe.steps]:
        raise RecipeError(
            f"it plans {names or 'nothing'}, the recipe has {[s.name for s in job.recipe.steps]}",
            where=str(path),
            fix="use the plan of this recipe",
        )
    planned = []
    for step, item in zip(job.recipe.steps, steps, strict=True):
        layers = item[step.name]
        for layer in layers:
            if layer not in job.model.weights:
                raise RecipeError(
                    f'the model has no layer "{layer}"', where=str(path), fix="use the plan of this model"
                )
        planned.append((step, tuple(quantize.restore(layer, fields) for layer, fields in layers.items())))
    return planned


def explain(job: Job, planned: Sequence[Planned]) -> str:
    """Return a line per layer: what happens, its size now, and why."""
    lines = []
    for step, decisions in planned:
        lines.append(f"{step.name} ({step.where})")
        for decision in decisions:
            weight = job.model.weights[decision.layer]
            size = f"{weight.shape[0]} x {weight.shape[1]}, {weight.bits() // 8} bytes"
            what = f"{decision.quantizer}, {decision.spec.format.bits} bits" if decision.quantizer else "dense"
            why = decision.reason or "as the recipe says"
            lines.append(f"  {quantize.short(decision.layer)}: {size} -> {what} ({why})")
    return "\n".join(lines)


def forecast(job: Job, planned: Sequence[Planned]) -> str:
    """Return the plan in words, and what running it will cost."""
    batch = job.calibration.batches[0]
    base = 3 * job.model.size_bytes() + sum(x.nbytes for part in job.calibration.batches for x in part)
    guess = cost.estimate(job.graph, batch, job.calibration.samples, base)
    layers = sum(bool(decision.quantizer) for _, decisions in planned for decision in decisions)
    return (
        f"{explain(job, planned)}\n{layers} layers on {job.calibration.samples} samples: "
        f"about {max(1, round(guess.seconds))} s and {guess.peak_bytes / 2**20:.0f} MiB for the steps; "
        "nothing was written"
    )
