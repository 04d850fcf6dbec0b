"""The pipeline: checkpoint -> model -> steps -> export -> verify -> bench -> report, in one folder.

The only module, with `cli`, that reaches across folders: exporters and bench are imported where they are used.
"""

from __future__ import annotations

import dataclasses
import importlib
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import checkpoint, cost, data, entry, quantize, report, store, workspace
from . import recipe as recipes
from .errors import AccuracyError, Error, ExportError, RecipeError, nearest
from .graph import Graph
from .metric import Metric, drop, evaluate
from .model import Model, Source, from_module, from_tensors, skeleton_of
from .progress import Reporter
from .quantize import Decision, LayerResult
from .recipe import Recipe, Step
from .verdict import reason_when_slower
from .walk import trace
from .weight import Dense, format_name
from .workspace import Workspace, fingerprint

PLAN_SCHEMA = "paredown.plan/1"
TARGETS = ("onnx",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a recipe is run; `command` is what the report tells people to type."""

    out: Path = Path("optimized")
    plan: Path | None = None
    resume: bool = False
    force: bool = False
    strict: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """A recipe whose model and data have been loaded."""

    recipe: Recipe
    model: Model
    calibration: data.Calibration
    graph: Graph
    fingerprint: str


def run(recipe: Recipe, options: Options, reporter: Reporter) -> dict[str, Any]:
    """Run a recipe into `options.out` and return the report.

    Raises AccuracyError or ExportError where a gate fails; then `<out>.failed` holds what was made, for inspection.
    On any other error nothing is left but a cache, if there is something in it that `resume` can use.
    """
    torch.manual_seed(recipe.seed)
    work = workspace.open_workspace(options.out, resume=options.resume, force=options.force)
    try:
        with workspace.disk_errors(work.out):
            return _Run(recipe=recipe, options=options, reporter=reporter, work=work).all()
    except Error:
        work.discard_unless_costly()
        raise
    finally:
        reporter.close()


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
    """Return the model of a recipe: architecture from its entry (or Hugging Face folder), weights from its checkpoint."""
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


def plan(job: Job) -> list[tuple[Step, tuple[Decision, ...]]]:
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
                raise RecipeError(
                    f'layer "{quantize.short(decision.layer)}" is compressed already by the step at {taken[decision.layer]}',
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
    return {"schema": PLAN_SCHEMA, "steps": steps}


def replay(path: Path, job: Job) -> list[tuple[Step, tuple[Decision, ...]]]:
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
                raise RecipeError(f'the model has no layer "{layer}"', where=str(path), fix="use the plan of this model")
        planned.append((step, tuple(quantize.restore(layer, fields) for layer, fields in layers.items())))
    return planned


@dataclass(slots=True, kw_only=True)
class _Run:
    recipe: Recipe
    options: Options
    reporter: Reporter
    work: Workspace

    def all(self) -> dict[str, Any]:
        started = time.monotonic()
        for target in self.recipe.export:
            exporter(target, self.recipe.at("export"))
        self.reporter.stage("load checkpoint and calibration data")
        job = load(self.recipe)
        planned = replay(self.options.plan, job) if self.options.plan else plan(job)
        self._write_texts(planned)
        before = self._metric("measure the original", job.model.module(), job.fingerprint + "-baseline")
        model, steps, layers, notes = self._steps(job, planned)
        self.reporter.stage("write the model")
        store.save(model, self.work.folder)
        parts: dict[str, Any] = {
            "environment": _environment(),
            "seed": self.recipe.seed,
            "command": self.options.command,
            "baseline": _sizes(job.model, job.graph, before, self.recipe.seed),
            "steps": steps,
            "layers": _layer_rows(model, layers),
            "decisions": [_decision_row(d) for _, decisions in planned for d in decisions] + notes,
        }
        failure = self._artifacts(job, model, before, parts)
        parts["seconds"] = time.monotonic() - started
        return self._finish(parts, failure)

    def _write_texts(self, planned: Sequence[tuple[Step, Sequence[Decision]]]) -> None:
        (self.work.folder / "recipe.yaml").write_text(recipes.dump(self.recipe))
        (self.work.folder / "plan.yaml").write_text(recipes.dump_data(plan_data(planned)))

    def _steps(
        self, job: Job, planned: Sequence[tuple[Step, tuple[Decision, ...]]]
    ) -> tuple[Model, list[dict[str, Any]], list[LayerResult], list[dict[str, Any]]]:
        model, mark = job.model, job.fingerprint
        rows: list[dict[str, Any]] = []
        layers: list[LayerResult] = []
        notes: list[dict[str, Any]] = []
        for index, (step, decisions) in enumerate(planned):
            mark = fingerprint(mark, step.spec, [quantize.describe(d) for d in decisions])
            self.reporter.stage(f"{step.name} ({index + 1} of {len(planned)})")
            model, done = self._step(job, model, mark, (step, decisions))
            rows.append({"step": step.name, "spec": recipes.show_step(step), **done["row"]})
            layers += [LayerResult(**item) for item in done["layers"]]
            notes += [{"layer": "*", "kept": step.name, "reason": note} for note in done["notes"]]
        return model, rows, layers, notes

    def _step(
        self, job: Job, model: Model, mark: str, planned: tuple[Step, tuple[Decision, ...]]
    ) -> tuple[Model, dict[str, Any]]:
        known = self.work.get_model(mark)
        if known is not None:
            return known
        step, decisions = planned
        started = time.monotonic()
        _reset_peak_rss()
        hooks = quantize.Hooks(
            progress=self.reporter.update, cache=self.work.layers(mark), seed=self.recipe.seed
        )
        result = quantize.apply(model, step.spec, decisions, job.calibration, hooks)
        total = [layer.error_rel for layer in result.layers if not layer.reason]
        row = {
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": _peak_rss(),
            "metric": None,
            "error_rel": float(np.sqrt(np.mean(np.square(total)))) if total else None,
        }
        done = {"row": row, "layers": [dataclasses.asdict(x) for x in result.layers], "notes": list(result.notes)}
        self.work.put_model(mark, result.model, done)
        return result.model, done

    def _metric(self, label: str, model: Any, mark: str) -> Metric | None:
        spec = self.recipe.metric
        if spec is None:
            return None
        known = self.work.get_json(mark)
        if known is None:
            self.reporter.stage(label)
            function = entry.resolve(spec.entry, self.recipe.base)
            with torch.no_grad():
                result = entry.call(function.function, {"model": model}, self.recipe.at("metric"), spec.args)
            known = np.asarray(result, dtype=np.float64).tolist()
            self.work.put_json(mark, known)
        return evaluate(np.asarray(known), spec.entry.rpartition(":")[2])

    def _artifacts(self, job: Job, model: Model, before: Metric | None, parts: dict[str, Any]) -> Error | None:
        """Export, verify, measure; fill the rest of the report; return the gate that failed."""
        failure: Error | None = None
        paths = []
        parts["verify"], after = [], None
        for target in self.recipe.export:
            target_module = exporter(target)
            path = self.work.folder / f"model{target_module.suffix}"
            self.reporter.stage(f"export to {target}")
            target_module.export(model, path, target_module.Options())
            paths.append(path)
            if self.recipe.gates.verify:
                self.reporter.stage(f"verify {path.name}")
                failure = failure or self._verify(target_module, model, path, parts)
        if paths and failure is None:
            runner = as_module(exporter(self.recipe.export[0]).open(paths[0]), job.graph)
            after = self._metric(f"measure {paths[0].name}", runner, "")
        elif failure is None:
            after = self._metric("measure the result", model.module(), "")
        graph = trace(model.module(), job.calibration.batches[:1]).graph
        final = _sizes(model, graph, after, self.recipe.seed)
        parts["final"] = final | {"bits_per_weight": bits_per_weight(model)} | self._drop(before, after)
        if paths and self.recipe.bench is not None and failure is None:
            self._bench(job, paths[0], parts)
        return failure or self._gate(before, after)

    def _verify(self, target: Any, model: Model, path: Path, parts: dict[str, Any]) -> Error | None:
        from ..exporters import verify

        try:
            rows = verify.verify(model, path, target.open)
        except ExportError as error:
            parts["verify"] += [dataclasses.asdict(row) for row in getattr(error, "rows", [])]
            return error
        parts["verify"] += [dataclasses.asdict(row) for row in rows]
        return None

    def _drop(self, before: Metric | None, after: Metric | None) -> dict[str, Any]:
        if before is None or after is None:
            return {"drop": None, "drop_ci95": None}
        lost = drop(before, after, self.recipe.seed)
        return {"drop": lost.value, "drop_ci95": lost.ci95}

    def _gate(self, before: Metric | None, after: Metric | None) -> Error | None:
        limit = self.recipe.gates.max_drop
        if limit is None:
            return None
        if before is None or after is None:
            raise RecipeError("gates.max_drop needs a metric", where=self.recipe.at("gates"), fix="write metric:")
        lost = drop(before, after, self.recipe.seed)
        if lost.value <= limit:
            return None
        return AccuracyError(
            f"{before.name} fell by {lost.value:.2f} {lost.unit}".rstrip() + f", gates.max_drop allows {limit:g}",
            where=self.recipe.at("gates"),
            fix="use more bits, or keep the worst layers of the report dense with skip",
        )

    def _bench(self, job: Job, path: Path, parts: dict[str, Any]) -> None:
        from ..bench import edge

        assert self.recipe.bench is not None
        target = exporter(self.recipe.export[0])
        original = self.work.folder / f"baseline{target.suffix}"
        self.reporter.stage("export the original to compare with")
        target.export(job.model, original, target.Options())
        self.reporter.stage("benchmark")
        bench = self.recipe.bench
        spec = edge.Spec(batch=bench.batch, threads=bench.threads, runtime=bench.runtime, seed=self.recipe.seed)
        rows = edge.run([original, path], spec, target.open, lambda share, text: self.reporter.update(share, 1, text))
        parts["bench"] = [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in rows]
        reason = reason_when_slower(parts)
        if reason and self.recipe.gates.never_slower:
            parts["decisions"].append({"layer": "*", "kept": "compressed", "reason": reason})

    def _finish(self, parts: dict[str, Any], failure: Error | None) -> dict[str, Any]:
        self.reporter.stage("write the report")
        if failure is not None:
            parts["failure"] = str(failure)
        full = report.assemble(parts)
        report.write(full, self.work.folder)
        self.reporter.close()
        if failure is not None:
            kept = self.work.keep_failed()
            raise type(failure)(failure.what, where=failure.where, fix=f'{failure.fix} (see "{kept.name}")')
        self.work.finish()
        return full


class _RunnerModule(nn.Module):
    """A runner that is called like the network it came from."""

    def __init__(self, runner: Any, graph: Graph) -> None:
        super().__init__()
        self.runner, self.graph = runner, graph

    def forward(self, *inputs: Tensor) -> Any:
        feeds = {spec.name: x.numpy(force=True) for spec, x in zip(self.runner.inputs, inputs, strict=True)}
        found = iter(self.runner.run(feeds).values())
        flat = [None if node is None else torch.from_numpy(np.array(next(found))) for node in self.graph.outputs]
        return pytree.tree_unflatten(flat, self.graph.program.call_spec.out_spec)


def as_module(runner: Any, graph: Graph) -> nn.Module:
    """Return an opened artifact as a module with the inputs and the output structure of the original."""
    return _RunnerModule(runner, graph).eval()


def bits_per_weight(model: Model) -> float | None:
    """Return 8 x bytes of all compressed weights with tables and scales, over the number of weights they stand for."""
    compressed = [weight for weight in model.weights.values() if not isinstance(weight, Dense)]
    count = sum(weight.shape[0] * weight.shape[1] for weight in compressed)
    return sum(weight.bits() for weight in compressed) / count if count else None


def exporter(target: str, where: str = "") -> Any:
    """Return `exporters/<target>.py`: suffix, Options, export and open."""
    if target not in TARGETS:
        raise RecipeError(f'there is no export target "{target}"', where=where, fix=nearest(target, TARGETS))
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.exporters.{target}")


def _environment() -> dict[str, Any]:
    from ..bench.environment import fingerprint as machine

    return machine()


def _sizes(model: Model, graph: Graph, metric: Metric | None, seed: int) -> dict[str, Any]:
    return {
        "metric": metric.report() if metric else None,
        "metric_ci95": metric.interval(seed) if metric else None,
        "size_bytes": model.size_bytes(),
        "parameters": model.parameters(),
        "macs": cost.macs(graph),
    }


def _layer_rows(model: Model, results: Sequence[LayerResult]) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        weight = model.weights[result.layer]
        rows.append(
            {
                "name": result.layer,
                "shape": list(model.layouts[result.layer].shape),
                "channels_kept": weight.shape[0],
                "rank": None,
                "format": format_name(weight),
                "bits": getattr(weight, "code_bits", None) or 8 * weight.values.element_size(),  # type: ignore[union-attr]
                "size_bytes": weight.bits() // 8,
                "error_rel": result.error_rel,
                "mode": "decoded to float",
            }
        )
    return rows


def _decision_row(decision: Decision) -> dict[str, Any]:
    if decision.quantizer:
        text = f"{decision.quantizer}, {decision.spec.format.bits} bits"
        return {"layer": decision.layer, "kept": text, "reason": "as the recipe says"}
    return {"layer": decision.layer, "fallback": "dense", "reason": decision.reason}


def _reset_peak_rss() -> None:
    """Start a new peak for this step, where the system can (Linux)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), "")
        if line:
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

