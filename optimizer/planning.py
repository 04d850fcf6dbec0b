"""From a recipe to what will happen: model and data loaded, graph captured, one decision per layer and step."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from . import checkpoint, cost, data, entry, huggingface, quantize, store
from . import recipe as recipes
from .errors import Error, ExportError, InfeasibleError, RecipeError, nearest
from .graph import Graph
from .model import InputSpec, Model, Source, from_module, from_tensors, skeleton_of
from .recipe import Recipe, Step, step_module
from .steps import Decision, Ground, matches, short
from .walk import trace
from .workspace import code_sha256, file_sha256, fingerprint

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

    @property
    def ground(self) -> Ground:
        return Ground(graph=self.graph, calibration=self.calibration, seed=self.recipe.seed, base=self.recipe.base)


def load(recipe: Recipe) -> Job:
    """Load the model and the calibration data of a recipe, and capture the graph."""
    if recipe.data is None:
        raise RecipeError("the recipe names no data", where=recipe.name, fix='write data: {entry: "path.py:function"}')
    model = load_model(recipe)
    spec = recipe.data
    function = entry.resolve(spec.entry, recipe.base)
    offered = {"samples": spec.samples, "seed": spec.seed}
    result = entry.call(function.function, offered, recipe.at("data"), spec.args)
    calibration = data.batches(result, model.inputs, spec.samples)
    graph = _capture(model, calibration, recipe.at("model"))
    versions = (code_sha256(), torch.__version__, np.__version__, scipy.__version__)
    operators = re.sub(r"0x[0-9a-f]+", "", str(graph.program.graph))
    tensors = [*model.values().values(), *(tensor for batch in calibration.batches for tensor in batch)]
    mark = fingerprint(versions, recipe.seed, store.describe(model), operators, *tensors)
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
        module, files = entry.build_module(source_entry, spec.args), source_entry.files
    elif path is not None and path.is_dir():
        module, files = huggingface.build(path), huggingface.files(path)
    else:
        raise RecipeError("the model has no entry", where=recipe.at("model"), fix='write entry: "path.py:function"')
    _check_order(module, spec.inputs, recipe.at("model"))
    if path is None:
        return from_module(module, spec.inputs, Source(entry=spec.entry, args=spec.args, files=files))
    try:
        values = checkpoint.match(checkpoint.read(path), module)
    except Error as error:
        raise type(error)(error.what, where=error.where or spec.checkpoint, fix=error.fix) from error
    known = file_sha256(path) if path.is_file() else ""
    source = Source(entry=spec.entry, args=spec.args, files=files, checkpoint_sha256=known)
    return from_tensors(skeleton_of(_like(module, values, recipe)), values, spec.inputs, source)


def _check_order(module: nn.Module, inputs: Sequence[InputSpec], where: str) -> None:
    """Raise for inputs in another order than the network's forward takes them: they are passed by position."""
    takes = list(inspect.signature(module.forward).parameters)
    names = [spec.name for spec in inputs]
    for place, name in enumerate(names):
        if name in takes and takes.index(name) != place:
            what = f'input "{name}" is number {place + 1}, forward({", ".join(takes)}) takes it as number '
            raise RecipeError(what + str(takes.index(name) + 1), where=where, fix="list the inputs in that order")


def _like(module: nn.Module, values: Mapping[str, Tensor], recipe: Recipe) -> nn.Module:
    """Return a module of the checkpoint's dtype, if that has one: a float16 checkpoint stays float16."""
    stored = {value.dtype for value in values.values() if value.is_floating_point()}
    built = {value.dtype for value in module.parameters() if value.is_floating_point()}
    if len(stored) != 1 or stored == built:
        return module
    (dtype,) = stored
    name = str(dtype).removeprefix("torch.")
    for spec in recipe.model.inputs if recipe.model else ():
        if spec.dtype != name and getattr(torch, spec.dtype).is_floating_point:
            what = f'the checkpoint is {name}, the input "{spec.name}" is {spec.dtype}'
            fix = f"write {spec.name}: {{shape: {list(spec.shape)}, dtype: {name}}}, or convert the checkpoint"
            raise RecipeError(what, where=recipe.at("model"), fix=fix)
    return module.to(dtype)


def plan(job: Job) -> list[Planned]:
    """Resolve every step of a recipe for its model."""
    planned: list[Planned] = []
    for step in job.recipe.steps:
        try:
            decisions = step_module(step.name).plan(job.model, step.spec, step.extras, job.ground)
        except (RecipeError, InfeasibleError) as error:
            where = (
                f"{step.where}, {error.where}" if error.where and error.where[0] == '"' else error.where or step.where
            )
            raise type(error)(error.what, where=where, fix=error.fix) from error
        planned.append((step, decisions))
    _check_once(planned)
    return planned


def check_strict(planned: Sequence[Planned]) -> None:
    """Raise InfeasibleError for a layer that a step was asked to compress and keeps dense nevertheless."""
    for step, decisions in planned:
        for decision in decisions:
            name, spec = decision.layer, step.spec
            if step_module(step.name).UNTOUCHED != quantize.UNTOUCHED:
                continue
            wanted = any(matches(p, name) for p in spec.layers)
            wanted = wanted and not any(matches(p, name) for p in spec.skip)
            if wanted and not decision.method:
                raise InfeasibleError(
                    f'layer "{short(name)}" would stay dense: {decision.reason}',
                    where=step.where,
                    fix="name it in skip, or run without --strict",
                )


def without_feedback(job: Job, planned: Sequence[Planned]) -> list[str]:
    """Return the layers for which error feedback was asked and cannot be: an embedding looks rows up."""
    uses = job.graph.of_param()
    specs = [(d.layer, getattr(d.spec, "format", None)) for _, decisions in planned for d in decisions if d.method]
    asked = [layer for layer, form in specs if getattr(form, "feedback", False)]
    return [layer for layer in asked if all(site.kind == "embedding" for site in uses.get(layer, ()))]


def plan_data(planned: Sequence[tuple[Step, Sequence[Decision]]]) -> dict[str, Any]:
    """Return a plan as data for plan.yaml."""
    steps = [{s.name: {d.layer: step_module(s.name).describe(d) for d in decisions}} for s, decisions in planned]
    return {"schema": SCHEMA, "steps": steps}


def replay(path: Path, job: Job) -> list[Planned]:
    """Read plan.yaml for a recipe's steps; a RecipeError where it does not fit them or the model."""
    where = str(path)
    found = recipes.read_data(path)
    schema = found.get("schema") if isinstance(found, Mapping) else None
    if schema != SCHEMA:
        raise RecipeError(f'schema is "{schema}", not "{SCHEMA}"', where=where, fix="name a plan.yaml of optimize")
    steps = found.get("steps") or ()
    items = steps if isinstance(steps, Sequence) and not isinstance(steps, str) else ()
    names = [next(iter(item), "") if isinstance(item, Mapping) else "" for item in items]
    if names != [step.name for step in job.recipe.steps]:
        have, want = ", ".join(map(str, names)) or "nothing", ", ".join(s.name for s in job.recipe.steps) or "nothing"
        raise RecipeError(f"it plans {have}, the recipe {want}", where=where, fix="use the plan of this recipe")
    try:
        pairs = zip(job.recipe.steps, items, strict=True)
        planned = [(step, _replayed(step, item[step.name], job)) for step, item in pairs]
    except RecipeError as error:
        where = f"{path}, {error.where}" if error.where else where
        raise RecipeError(error.what, where=where, fix=error.fix) from error
    _check_once(planned)
    return planned


def explain(job: Job, planned: Sequence[Planned]) -> str:
    """Return a line per layer: what happens, its size now, and why."""
    lines = []
    for step, decisions in planned:
        lines.append(f"{step.name} ({step.where})")
        for decision in decisions:
            module, weight = step_module(step.name), job.model.weights.get(decision.layer)
            size = f"{weight.shape[0]} x {weight.shape[1]}, {weight.bits() // 8} bytes -> " if weight else ""
            what = module.shown(decision) if decision.method else module.UNTOUCHED
            why = decision.reason or "as the recipe says"
            lines.append(f"  {short(decision.layer)}: {size}{what} ({why})")
    return "\n".join(lines)


def forecast(job: Job, planned: Sequence[Planned]) -> str:
    """Return the plan in words, and what running it will cost."""
    batch = job.calibration.batches[0]
    base = 3 * job.model.size_bytes() + sum(x.nbytes for part in job.calibration.batches for x in part)
    guess = cost.estimate(job.graph, batch, job.calibration.samples, base)
    layers = sum(bool(decision.method) for _, decisions in planned for decision in decisions)
    return (
        f"{explain(job, planned)}\n{layers} layers on {job.calibration.samples} samples: "
        f"about {max(1, round(guess.seconds))} s and {guess.peak_bytes / 2**20:.0f} MiB for the steps; "
        "nothing was written"
    )


def _replayed(step: Step, layers: Any, job: Job) -> tuple[Decision, ...]:
    module = step_module(step.name)
    known = module.names(job.model, step.spec, job.ground)
    by_hand = 'write {keep: "by hand"} to leave it dense'
    layers = layers if isinstance(layers, Mapping) else {}
    for layer in layers:
        if layer not in known:
            raise RecipeError(f'the model has no layer "{layer}"', fix=nearest(str(layer), known))
        if not isinstance(layers[layer], Mapping):
            raise RecipeError(f'layer "{layer}" is planned without keys', fix=by_hand)
    absent = next((layer for layer in known if layer not in layers), None)
    if absent:
        raise RecipeError(f'it says nothing about layer "{absent}"', fix=by_hand)
    return tuple(module.restore(layer, fields) for layer, fields in layers.items())


def _check_once(planned: Sequence[Planned]) -> None:
    """Raise RecipeError where two steps compress one layer, but for the factors of a low rank, which quantize takes.

    Pruning comes before either, and once: units are numbered in the model as it is loaded.
    """
    taken: dict[str, Step] = {}
    for step, decisions in planned:
        first = next(iter(taken), "")
        if step.name == "prune" and first:
            what = f'"{short(first)}" is changed already by the step at {taken[first].where}'
            raise RecipeError(what, where=step.where, fix="prune in one step, before factorize and quantize")
        for layer in (decision.layer for decision in decisions if decision.method):
            before = taken.get(layer)
            if before and before.name != "prune" and (before.name, step.name) != ("factorize", "quantize"):
                late = (before.name, step.name) == ("quantize", "factorize")
                raise RecipeError(
                    f'layer "{short(layer)}" is compressed already by the step at {before.where}',
                    where=step.where,
                    fix="put factorize before quantize" if late else "name it in one step only, with layers or skip",
                )
            taken[layer] = step


def _capture(model: Model, calibration: data.Calibration, where: str) -> Graph:
    """Capture the graph on the first batch, without what torch prints; a failure names the line of the network."""
    quiet = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return trace(model.module(), calibration.batches[:1]).graph
    except ExportError as error:
        place = entry.place(error.__cause__) if error.__cause__ else ""
        what = error.what.strip().rstrip(".")
        if "data-dependent" in what:
            what = "the network cannot be captured: it branches in Python on the values of a tensor"
        raise ExportError(what, where=place or where, fix=error.fix) from error
    finally:
        logging.disable(quiet)
