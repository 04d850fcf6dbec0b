"""The baselines that a recipe asks for: calibrated with its data, scored by its metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..optimizer.data import rebatch
from ..optimizer.metric import Metric, drop
from . import baselines

if TYPE_CHECKING:
    from ..optimizer.planning import Job
    from ..optimizer.recipe import Recipe
    from .feeds import Feeds

CALIBRATED = 32
"""Samples of a calibration batch: the tool holds the extremes of every value of the network for one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is measured beside the baselines: both files, and the metric of each where there is one."""

    original: Path
    ours: Path
    before: Metric | None
    after: Metric | None


def prepare(job: Job, recipe: Recipe, result: Result, measure: Callable[[Path], Metric | None]) -> baselines.Prepared:
    """Make the baselines beside the original and measure each by the recipe's metric."""
    bench = recipe.bench
    if bench is None or not bench.baselines:
        return baselines.Prepared()
    wanted = baselines.Wanted(
        names=bench.baselines,
        original=result.original,
        folder=result.original.parent,
        feeds=_feeds(job),
        batch=bench.batch,
        threads=bench.threads,
        scenario=bench.scenario,
        seed=recipe.seed,
        remote=bool(bench.device),
    )
    found = baselines.prepare(wanted)
    scores = {path: _score(measure(path), result, recipe.seed) for path in found.paths}
    scores |= {result.original: _metric(result.before), result.ours: _metric(result.after)}
    return replace(found, scores=scores)


def _feeds(job: Job) -> tuple[Feeds, ...]:
    names = [spec.name for spec in job.model.inputs]
    batches = rebatch(job.calibration, CALIBRATED).batches
    return tuple({name: x.numpy(force=True) for name, x in zip(names, batch, strict=True)} for batch in batches)


def _score(metric: Metric | None, result: Result, seed: int) -> dict[str, object]:
    """Return a baseline's metric, what it lost, and how far it is behind ours on the same samples."""
    if metric is None or result.before is None or result.after is None:
        return _metric(metric)
    lost, behind = drop(result.before, metric, seed), drop(result.after, metric, seed)
    return _metric(metric) | {
        "drop": lost.value,
        "drop_ci95": lost.ci95,
        "drop_unit": lost.unit,
        "behind_ours": behind.value,
        "behind_ours_ci95": behind.ci95,
    }


def _metric(metric: Metric | None) -> dict[str, object]:
    return {} if metric is None else {"metric": metric.report()}
