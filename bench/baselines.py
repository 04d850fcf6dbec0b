"""What others make of the original, measured beside ours: made or found, then rows of the same table."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..optimizer.errors import Error, RecipeError, RuntimeMissingError, nearest
from ..optimizer.sections import BASELINES
from .feeds import Feeds, random_feeds
from .rows import Row, against, artifact_names

if TYPE_CHECKING:
    from ..exporters.runner import Runner
    from ..exporters.trtexec import Times

TRTEXEC = "trtexec"
CALIBRATION = (8, 8)
"""Random batches and samples of each, to calibrate with where there is no data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which baselines, of which file, where they are written, and what they are calibrated with.

    feeds: () = seeded random inputs, after which an accuracy means nothing. cells: batch sizes and sizes of other named
    dimensions that trtexec, which is not one of the artifacts that alternate, is run with. remote: a board
    measures, and trtexec would on this machine.
    """

    names: tuple[str, ...]
    original: Path
    folder: Path
    feeds: tuple[Feeds, ...] = ()
    batch: tuple[int, ...] = (1,)
    dims: Mapping[str, int] = field(default_factory=dict)
    threads: tuple[int, ...] = (1,)
    scenario: str = "edge"
    seconds: float = 3.0
    seed: int = 0
    remote: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Baselines that are there. facts: per path, what its rows say in `details`. missing: (name, why not).

    scores: per path of any artifact, its accuracy, as further `details`.
    measured: rows of tools that measure themselves, which cannot alternate with ours.
    """

    facts: Mapping[Path, Mapping[str, object]] = field(default_factory=dict)
    scores: Mapping[Path, Mapping[str, object]] = field(default_factory=dict)
    missing: tuple[tuple[str, str], ...] = ()
    measured: tuple[Row, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.facts)

    def decisions(self) -> list[dict[str, object]]:
        """Return a row of the report's decisions for each baseline that could not be made."""
        return [{"layer": "*", "fallback": f"no baseline {name}", "reason": why} for name, why in self.missing]


def check(names: Sequence[str], where: str) -> None:
    """Raise a RecipeError for a baseline that is not known or named twice."""
    for name in names:
        if name not in BASELINES:
            raise RecipeError(f'there is no baseline "{name}"', where=where, fix=nearest(name, BASELINES))
        if names.count(name) > 1:
            raise RecipeError(f'the baseline "{name}" is named twice', where=where, fix="name it once")


def prepare(wanted: Wanted) -> Prepared:
    """Make the baselines, as `<stem of the original>.<name>.onnx`; what cannot be made is `missing` with its reason."""
    facts: dict[Path, dict[str, object]] = {}
    missing: list[tuple[str, str]] = []
    measured: list[Row] = []
    for name in wanted.names:
        try:
            if name == TRTEXEC:
                measured += _trtexec(wanted)
            else:
                path = wanted.folder / f"{wanted.original.stem}.{name}{wanted.original.suffix}"
                facts[path] = {"peer": name, "how": _made(name, path, wanted)}
        except Error as problem:
            missing.append((name, problem.what))
    return Prepared(facts=facts, missing=tuple(missing), measured=tuple(measured))


def complete(rows: Sequence[Row], artifacts: Sequence[Path], prepared: Prepared) -> list[Row]:
    """Return the rows with sizes, facts and the ratio to ours in `details`, then those that tools measured.

    artifacts: as they were measured: the original, ours where there is one, and the baselines.
    """
    if not prepared.facts:
        return [*rows, *prepared.measured]
    paths = dict(zip(artifact_names(artifacts), artifacts, strict=True))
    second = next((path for path in artifacts[1:] if path not in prepared.facts), None)
    ours = {(row.batch, row.threads): row for row in rows if paths[row.artifact] == second}
    found = [_with_facts(row, paths[row.artifact], prepared, ours.get((row.batch, row.threads))) for row in rows]
    return [*found, *prepared.measured]


def file_bytes(path: Path) -> int:
    """Return the bytes of a file and of the weights beside it."""
    parts = (path, path.with_name(f"{path.name}.data"))
    return sum(part.stat().st_size for part in parts if part.is_file())


def _with_facts(row: Row, path: Path, prepared: Prepared, ours: Row | None) -> Row:
    facts: dict[str, object] = {"size_bytes": file_bytes(path)}
    facts |= {**prepared.facts.get(path, {}), **prepared.scores.get(path, {})}
    if ours is None:  # nothing of ours is compared: what others made is what is compared
        facts.pop("peer", None)
    elif path in prepared.facts:
        facts |= _against(row, ours)
    return replace(row, details={**row.details, **facts})


def _against(row: Row, ours: Row) -> dict[str, object]:
    """Return the latency over ours, where both were measured in the same rounds."""
    if row.samples.ndim != 2 or len(row.samples) != len(ours.samples):
        return {}
    ratio, ends = against(row, ours, np.random.default_rng([row.batch, row.threads]))
    return {
        "ratio_to_ours": ratio,
        "ratio_to_ours_ci95": None if ends is None else list(ends),
    }


def _made(name: str, path: Path, wanted: Wanted) -> str:
    """Make a baseline, or take the one that a run put beside the original; return how it was made."""
    from ..exporters import onnx_baselines

    beside = wanted.original.with_name(path.name)
    if beside.is_file() and not wanted.feeds:
        shutil.copyfile(beside, path)
        weights = beside.with_name(f"{beside.name}.data")
        if weights.is_file():
            shutil.copyfile(weights, path.with_name(weights.name))
        return "the file beside the original"
    how = onnx_baselines.make(name, wanted.original, path, wanted.feeds or _random(wanted))
    return f"{how}; calibrated with random inputs" if name == "int8" and not wanted.feeds else how


def _random(wanted: Wanted) -> tuple[Feeds, ...]:
    runner = _open(wanted)
    batches, samples = CALIBRATION
    size = _fixed_batch(runner) or samples
    return tuple(random_feeds(runner, size, wanted.dims, wanted.seed + index) for index in range(batches))


def _open(wanted: Wanted) -> Runner:
    from ..exporters import onnx

    return onnx.open(wanted.original)


def _fixed_batch(runner: Runner) -> int:
    """Return the first dimension of the first input where it is a number, else 0."""
    shape = runner.inputs[0].shape if runner.inputs else ()
    return shape[0] if shape and isinstance(shape[0], int) else 0


def _trtexec(wanted: Wanted) -> list[Row]:
    from ..exporters import trtexec

    if wanted.remote:
        raise RuntimeMissingError("it is run on this machine alone, not on a board")

    runner = _open(wanted)
    found = []
    for batch in wanted.batch:
        shapes = {name: array.shape for name, array in random_feeds(runner, batch, wanted.dims, wanted.seed).items()}
        named = {spec.name for spec in runner.inputs if any(isinstance(size, str) for size in spec.shape)}
        times = trtexec.measure(
            wanted.original, {key: shape for key, shape in shapes.items() if key in named}, wanted.seconds
        )
        found.append(_row(times, batch, wanted.threads[0], wanted.scenario))
    return found


def _row(times: Times, batch: int, threads: int, scenario: str) -> Row:
    seconds, compute = times.with_transfers, times.compute
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]) * 1e3)
    kernels = (float(value) for value in np.percentile(compute, [50, 90, 99]) * 1e3)
    names = ("compute_ms_p50", "compute_ms_p90", "compute_ms_p99")
    return Row(
        artifact=TRTEXEC,
        runtime="trtexec, with transfers",
        scenario=scenario,
        batch=batch,
        threads=threads,
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p99=p99,
        ci95=None,
        throughput_per_s=batch * len(seconds) / float(seconds.sum()),
        peak_rss_bytes=None,
        ratio_to_baseline=None,
        ratio_ci95=None,
        samples=seconds[:, None],
        details={
            "peer": TRTEXEC,
            "how": "TensorRT's own benchmark, not interleaved",
            **dict(zip(names, kernels, strict=True)),
        },
    )
