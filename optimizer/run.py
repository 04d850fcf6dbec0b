"""The pipeline: checkpoint -> model -> steps -> export -> verify -> bench -> report, in one folder.

With `cli` and `targets` the only module that reaches across folders: exporters and bench are imported where they are
used.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from . import artifact, entry, fallback, history, planning, report, store, summary, workspace
from . import recipe as recipes
from .errors import (
    Error,
    ExportError,
    InfeasibleError,
    InputError,
    RecipeError,
    RuntimeMissingError,
    nearest,
)
from .fallback import Settled
from .metric import Metric, evaluate
from .model import Model
from .planning import Job, Planned
from .progress import Reporter
from .recipe import Recipe, Step, step_module
from .sections import BenchSpec
from .steps import Decision, Hooks, LayerResult
from .targets import exporter
from .verdict import is_slower
from .walk import trace
from .workspace import Workspace, fingerprint

if TYPE_CHECKING:
    from ..bench.baselines import Prepared
    from ..bench.baselines_run import Result

RUNTIMES = ("onnxruntime",)
RESUME = "the layers that are finished are kept for --resume"
UNTOUCHED = "no step asked for it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a recipe is run; `command` is what the report tells people to type."""

    out: Path = Path("optimized")
    plan: Path | None = None
    resume: bool = False
    force: bool = False
    strict: bool = False
    command: str = ""


def run(recipe: Recipe, options: Options, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run a recipe into `options.out` and return the report.

    Raises AccuracyError or ExportError where a gate fails; then `<out>.failed` holds what was made, for inspection.
    On any other error nothing is left but a cache, if there is something in it that `resume` can use.
    """
    reporter = reporter or Reporter(console=Console(quiet=True))
    check(recipe)
    torch.manual_seed(recipe.seed)
    work = workspace.open_workspace(options.out, resume=options.resume, force=options.force)
    try:
        with workspace.disk_errors(work.out):
            return _Run(recipe=recipe, options=options, reporter=reporter, work=work).all()
    except Error as error:
        if not work.discard_unless_costly():
            raise
        fix = "; ".join(part for part in (error.fix, RESUME) if part)
        raise type(error)(error.what, where=error.where, fix=fix) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(RESUME if work.discard_unless_costly() else "") from error
    except BaseException:
        work.discard_unless_costly()
        raise
    finally:
        reporter.close()
        work.close()


def check(recipe: Recipe) -> None:
    """Raise for what cannot work whatever the model is, before anything takes time."""
    for target in recipe.export:
        exporter(target, recipe.at("export"))
        if target != "onnx":
            known = target == "tensorrt"
            what = f"{target} lowers for one {'machine' if known else 'server'}, which a recipe does not name"
            fix = f"write export: [onnx], and run optimize export DIR --target {target}{' on that machine' * known}"
            raise RecipeError(what, where=recipe.at("export"), fix=fix)
    if recipe.gates.max_drop is not None and recipe.metric is None:
        fix = 'write metric: {entry: "path.py:function"}'
        raise RecipeError("max_drop needs a metric", where=recipe.at("gates"), fix=fix)
    bench, where = recipe.bench, recipe.at("bench")
    if bench is None:
        return
    if not recipe.export:
        raise RecipeError("there is no file to measure", where=where, fix="write export: [onnx]")
    from ..bench import baselines, command

    command.recipe_spec(bench, recipe.seed, where)
    baselines.check(bench.baselines, where)
    if bench.runtime not in RUNTIMES:
        what = f'there is no runtime "{bench.runtime}" in this version'
        raise RuntimeMissingError(what, where=where, fix=nearest(bench.runtime, RUNTIMES))
    command.check_device(bench.device, bench.scenario, where)
    first = recipe.model.inputs[0] if recipe.model and recipe.model.inputs else None
    fixed = first.shape[0] if first and first.shape else ""
    if isinstance(fixed, int) and bench.batch != (fixed,):
        what = f"batch {list(bench.batch)} does not fit the inputs, which fix it at {fixed}"
        raise RecipeError(what, where=where, fix=f"write batch: [{fixed}], or name the dimension")


@dataclass(slots=True, kw_only=True)
class _Run:
    recipe: Recipe
    options: Options
    reporter: Reporter
    work: Workspace

    def all(self) -> dict[str, Any]:
        started = time.monotonic()
        self.reporter.stage("load checkpoint and calibration data")
        job = planning.load(self.recipe)
        planned = _planned(job, self.options)
        if self.recipe.bench is not None:  # before the steps, so that an operator without a form stops it at once
            self._export("export the original to compare with", job.model, self.recipe.export[0], "baseline")
            self._greet_board()
        before = self._metric("measure the original", job.model.module(), job.fingerprint)
        settled = self._settled(job, planned)
        planned = settled.plan(planned) if settled else planned
        model, steps, layers, notes = self._steps(job, planned)
        self.reporter.stage("write the model")
        self._write_texts(planned)
        store.save(model, self.work.folder)
        parts: dict[str, Any] = {
            "environment": _environment(),
            "seed": self.recipe.seed,
            "command": self.options.command,
            "baseline": summary.sizes(job.model, job.graph, before, self.recipe.seed),
            "steps": steps,
            "layers": summary.layer_rows(model, layers),
            "decisions": summary.decision_rows(planned, planning.without_feedback(job, planned)) + notes,
        }
        if settled:
            parts["decisions"] = settled.rows(parts["decisions"])
        failure = self._artifacts(job, model, before, parts)
        parts["seconds"] = time.monotonic() - started
        return self._finish(parts, failure)

    def _write_texts(self, planned: Sequence[Planned]) -> None:
        (self.work.folder / "recipe.yaml").write_text(recipes.dump(self.recipe))
        (self.work.folder / "plan.yaml").write_text(recipes.dump_data(planning.plan_data(planned)))

    def _settled(self, job: Job, planned: Sequence[Planned]) -> Settled | None:
        """Return what measuring decides of a plan, None where nothing is measured; a resumed run decides as before.

        A plan that was given has decided already. Only latencies of this machine say what a layer costs alone.
        """
        bench = self.recipe.bench
        if bench is None or not self.recipe.gates.never_slower or self.options.plan is not None:
            return None
        if bench.device or bench.scenario != "edge":
            return None
        what = (recipes.dump_data(planning.plan_data(planned)), self.recipe.objective, bench)
        mark = fingerprint("never slower", job.fingerprint, *what)
        known = self.work.get_json(mark)
        settled = Settled(**known) if known else self._measured(job, planned, bench)
        self.work.put_json(mark, dataclasses.asdict(settled))
        if self.options.strict:
            fallback.check_strict(settled, self.recipe.at("gates"))
        return settled

    def _measured(self, job: Job, planned: Sequence[Planned], bench: BenchSpec) -> Settled:
        from ..bench import command, trial

        clock = trial.Trial(
            baseline=self.work.folder / f"baseline{exporter(self.recipe.export[0]).suffix}",
            folder=self.work.folder,
            calibration=job.calibration,
            spec=command.recipe_spec(bench, self.recipe.seed, self.recipe.at("bench")),
            stage=self.reporter.stage,
            progress=lambda share, text: self.reporter.update(share, 1, text),
        )
        return fallback.settle(planned, lambda plan: self._steps(job, plan)[0], clock, self.recipe.objective)

    def _steps(
        self, job: Job, planned: Sequence[Planned]
    ) -> tuple[Model, list[dict[str, Any]], list[LayerResult], list[dict[str, Any]]]:
        model, mark = job.model, job.fingerprint
        rows: list[dict[str, Any]] = []
        layers: list[LayerResult] = []
        notes: list[dict[str, Any]] = []
        for index, (step, decisions) in enumerate(planned):
            described = [step_module(step.name).describe(decision) for decision in decisions]
            mark = fingerprint(mark, step.name, step.spec, described, _foreign_code(step, decisions))
            self.reporter.stage(f"{step.name} ({index + 1} of {len(planned)})")
            model, done = self._step(job, model, mark, (step, decisions))
            rows.append({"step": step.name, "spec": recipes.show_step(step), **done["row"]})
            layers = summary.merged(layers, [LayerResult(**item) for item in done["layers"]])
            notes += [{"layer": "*", "kept": step.name, "reason": note} for note in done["notes"]]
        rest = [LayerResult(layer=name, error_rel=0.0, reason=UNTOUCHED) for name in model.weights]
        return model, rows, summary.merged(layers, rest), notes

    def _step(self, job: Job, model: Model, mark: str, planned: Planned) -> tuple[Model, dict[str, Any]]:
        known = self.work.get_model(mark)
        if known is not None:
            return known
        step, decisions = planned
        started = time.monotonic()
        summary.reset_peak_rss()
        hooks = Hooks(progress=self.reporter.update, cache=self.work.layers(mark), seed=self.recipe.seed)
        result = step_module(step.name).apply(model, step.spec, decisions, job.calibration, hooks)
        total = [layer.error_rel for layer in result.layers if not layer.reason]
        row = {
            "seconds": time.monotonic() - started,
            "peak_rss_bytes": summary.peak_rss(),
            "metric": None,
            "error_rel": float(np.sqrt(np.mean(np.square(total)))) if total else None,
        }
        done = {"row": row, "layers": [dataclasses.asdict(x) for x in result.layers], "notes": list(result.notes)}
        self.work.put_model(mark, result.model, done)
        return result.model, done

    def _metric(self, label: str, model: nn.Module, subject: str) -> Metric | None:
        """Measure a model; `subject` is the fingerprint of what is measured, for a resumed run to know it by."""
        spec = self.recipe.metric
        if spec is None:
            return None
        function, name = entry.resolve(spec.entry, self.recipe.base), spec.entry.rpartition(":")[2]
        mark = fingerprint("metric", subject, spec, function.code)
        known = self.work.get_json(mark)
        if known is not None:
            return evaluate(known, name)
        self.reporter.stage(label)
        with torch.no_grad():
            result = entry.call(function.function, {"model": model}, self.recipe.at("metric"), spec.args)
        try:
            found = evaluate(result, name)
        except InputError as error:
            raise InputError(error.what, where=f'metric "{spec.entry}"', fix=error.fix) from error
        self.work.put_json(mark, found.value if found.scores is None else found.scores.tolist())
        return found

    def _artifacts(self, job: Job, model: Model, before: Metric | None, parts: dict[str, Any]) -> Error | None:
        """Export, verify, measure; fill the rest of the report; return the gate that failed."""
        failure: Error | None = None
        paths = []
        parts["verify"], after = [], None
        for target in self.recipe.export:
            paths.append(self._export(f"export to {target}", model, target, "model"))
            if self.recipe.gates.verify:
                self.reporter.stage(f"verify {paths[-1].name}")
                failure = failure or self._verify(job, model, paths[-1], parts)
        if paths:
            target = exporter(self.recipe.export[0])
            summary.tell_modes(parts, model, target.modes(paths[0], model), target.kernels())
        if paths and failure is None:
            runner = artifact.as_module(exporter(self.recipe.export[0]).open(paths[0]), job)
            after = self._metric(f"measure {paths[0].name}", runner, artifact.mark(paths[0]))
        elif failure is None:
            mark = artifact.mark(self.work.folder / "model.safetensors")
            after = self._metric("measure the result", model.module(), mark)
        graph = trace(model.module(), job.calibration.batches[:1]).graph
        final = summary.sizes(model, graph, after, self.recipe.seed)
        lost = summary.dropped(before, after, self.recipe.seed)
        parts["final"] = final | {"bits_per_weight": summary.bits_per_weight(model)} | lost
        if paths and self.recipe.bench is not None and failure is None:
            from ..bench.baselines_run import Result

            original = paths[0].with_stem("baseline")
            peers = self._baselines(job, Result(original=original, ours=paths[0], before=before, after=after), parts)
            failure = self._bench(paths[0], parts, peers)
        return failure or summary.gate(self.recipe, before, after)

    def _export(self, label: str, model: Model, target: str, name: str) -> Path:
        """Write `<name>.<suffix of the target>` into the folder and return it."""
        self.reporter.stage(label)
        module = exporter(target)
        path = self.work.folder / f"{name}{module.suffix}"
        module.export(model, path, module.Options())
        return path

    def _verify(self, job: Job, model: Model, path: Path, parts: dict[str, Any]) -> Error | None:
        """Compare a file with the model on calibration data."""
        from ..exporters import verify

        inputs = artifact.samples(job.calibration)
        spec = verify.Spec(batches=artifact.batches(job.model.inputs, inputs), inputs=inputs)
        try:
            rows = verify.compare(model, path, exporter(path.suffix.removeprefix(".")).open, spec)
            parts["verify"] += [dataclasses.asdict(row) for row in rows]
            verify.judge(rows, path)
        except ExportError as error:
            return error
        return None

    def _greet_board(self) -> None:
        """Raise now, and not after the steps, where the board that is to measure cannot."""
        from ..bench import command, remote

        bench = self.recipe.bench
        assert bench is not None
        if board := command.check_device(bench.device, bench.scenario, self.recipe.at("bench")):
            self.reporter.stage("reach the board")
            remote.check(board, ("onnxruntime",))

    def _baselines(self, job: Job, result: Result, parts: dict[str, Any]) -> Prepared:
        """Make what others make of the original, and score it; what cannot be made is a decision."""
        from ..bench import baselines_run

        def measure(path: Path) -> Metric | None:
            runner = artifact.as_module(exporter(self.recipe.export[0]).open(path), job)
            return self._metric(f"measure {path.name}", runner, artifact.mark(path))

        self.reporter.stage("make the baselines")
        found = baselines_run.prepare(job, self.recipe, result, measure)
        parts["decisions"] += found.decisions()
        return found

    def _bench(self, path: Path, parts: dict[str, Any], peers: Prepared) -> Error | None:
        """Measure the file beside the original; slower is told, and with --strict an error if gates.never_slower."""
        from ..bench import baselines, command, compare

        assert self.recipe.bench is not None
        original = path.with_stem("baseline")
        self.reporter.stage("benchmark")
        bench = self.recipe.bench
        scenario = command.scenario(bench.scenario, self.recipe.at("bench"))
        spec = command.recipe_spec(bench, self.recipe.seed, self.recipe.at("bench"))
        progress = lambda share, text: self.reporter.update(share, 1, text)  # noqa: E731
        board = command.check_device(bench.device, bench.scenario, self.recipe.at("bench"))
        artifacts = (original, path, *peers.paths)
        found = command.measure(scenario, artifacts, spec, board, progress)
        rows = baselines.complete(found.rows, artifacts, peers)
        parts["bench"] = [row.report() for row in rows]
        parts["environment"]["bench_caution"] = compare.caution(rows)
        if board is not None:
            parts["environment"]["bench_device"] = found.environment
        if is_slower(parts["bench"]):
            why = summary.why_slower(parts)
            parts["decisions"].append({"layer": "*", "kept": "compressed", "reason": why})
            if self.options.strict and self.recipe.gates.never_slower:
                where = self.recipe.at("gates")
                return InfeasibleError("the result is slower than the original", where=where, fix=why)
        return None

    def _finish(self, parts: dict[str, Any], failure: Error | None) -> dict[str, Any]:
        self.reporter.stage("write the report")
        if failure is not None:
            parts["failure"] = str(failure)
        full = report.assemble(parts)
        history.carry(self.work.out, self.work.folder)
        report.write(full, self.work.folder)
        self.reporter.close()
        if failure is not None:
            kept = self.work.keep_failed()
            raise type(failure)(failure.what, where=failure.where, fix=f'{failure.fix} (see "{kept.name}")')
        self.work.finish()
        return full


def _planned(job: Job, options: Options) -> list[Planned]:
    planned = planning.replay(options.plan, job) if options.plan else planning.plan(job)
    if options.strict:
        planning.check_strict(planned)
    return planned


def _foreign_code(step: Step, decisions: Sequence[Decision]) -> list[str]:
    """Return the source of steps and methods that are not ours, which `code_sha256` does not cover."""
    names = sorted({name for name in (step.name, *(d.method for d in decisions)) if "." in name})
    return [inspect.getsource(importlib.import_module(name)) for name in names]


def _environment() -> dict[str, Any]:
    from ..bench.environment import fingerprint as machine

    return machine()


def dry_run(recipe: Recipe, options: Options) -> str:
    """Return the plan and what it will cost, writing nothing."""
    check(recipe)
    job = planning.load(recipe)
    return planning.forecast(job, _planned(job, options))
