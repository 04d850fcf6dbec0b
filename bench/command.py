"""`optimize bench A B ...`: what the command line asked for, measured, shown and written."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from ..optimizer.errors import InputError, RecipeError, nearest
from . import baselines, compare
from .environment import fingerprint
from .rows import Row

SCENARIOS = ("edge",)
"""Each is a module of this folder: `Spec`, whose fields are its options, and `run(artifacts, spec, open, progress)`."""


class Progress(Protocol):
    """Where progress goes."""

    def stage(self, label: str) -> None: ...

    def update(self, done: float, total: float, detail: str = "") -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line as it was written; the first artifact is the baseline.

    settings: options that only some scenarios have, as fields of the scenario's Spec.
    """

    artifacts: tuple[Path, ...]
    scenario: str = "edge"
    batch: str = "1"
    threads: str = "1"
    dims: tuple[str, ...] = ()
    seed: int = 0
    no_kernels: bool = False
    out: Path | None = None
    baselines: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def run(request: Request, progress: Progress) -> list[Row]:
    """Measure the artifacts, print a table, write bench.json and bench.csv where `out` says."""
    from rich.console import Console

    from ..exporters import onnx

    module = scenario(request.scenario, "--scenario")
    for path in request.artifacts:
        if path.suffix != onnx.suffix:
            raise InputError("is not an ONNX file", where=str(path), fix="name .onnx files, the original first")
    spec = _spec(module, request)
    baselines.check(request.baselines, "--baseline")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="paredown-") as made:
        peers = _prepare(request, spec, Path(made), progress)
        progress.stage("benchmark")
        artifacts = (*request.artifacts, *peers.paths)
        rows: list[Row] = module.run(artifacts, spec, onnx.open, _stepper(progress))
        rows = baselines.complete(rows, artifacts, peers)
    progress.close()
    for name, why in peers.missing:
        console.print(f"No baseline {name}: {why}.", markup=False, highlight=False)
    compare.show(rows, console)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        compare.write(rows, request.out, fingerprint())
    return rows


def _prepare(request: Request, spec: Any, folder: Path, progress: Progress) -> baselines.Prepared:
    """Make the baselines of the first artifact in a folder that is deleted; run keeps its own beside the original."""
    if not request.baselines:
        return baselines.Prepared()
    progress.stage("make the baselines")
    wanted = baselines.Wanted(
        names=request.baselines,
        original=request.artifacts[0],
        folder=folder,
        batch=spec.batch,
        dims=dict(_dim(text) for text in request.dims),
        threads=spec.threads,
        scenario=request.scenario,
        seed=request.seed,
    )
    return baselines.prepare(wanted)


def scenario(name: str, where: str) -> Any:
    """Return the module of a scenario: Spec and run."""
    if name not in SCENARIOS:
        what = f'there is no scenario "{name}" in this version'
        raise RecipeError(what, where=where, fix=nearest(name, SCENARIOS))
    return importlib.import_module(f"{__package__}.{name}")


def _spec(module: Any, request: Request) -> Any:
    known = {item.name for item in fields(module.Spec)}
    for name in request.settings:
        if name not in known:
            option = "--" + name.replace("_", "-")
            raise RecipeError(f"the scenario {request.scenario} has no {option}", where=option, fix="leave it out")
    return module.Spec(
        batch=_numbers("--batch", request.batch),
        threads=_numbers("--threads", request.threads),
        dims=dict(_dim(text) for text in request.dims),
        seed=request.seed,
        kernels=not request.no_kernels,
        **request.settings,
    )


def _stepper(progress: Progress) -> Callable[[float, str], None]:
    return lambda share, text: progress.update(share, 1.0, text)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f'"{text}" is not a list of whole numbers', where=option, fix="write 1,32") from error


def _dim(text: str) -> tuple[str, int]:
    name, equals, size = text.partition("=")
    if not equals or not size.isdigit():
        raise RecipeError(f'"{text}" is not a size', where="--dim", fix="write --dim seq=64")
    return name, int(size)
