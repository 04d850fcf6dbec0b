"""`optimize bench A B ...`: what the command line asked for, measured, shown and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..optimizer.errors import InputError, RecipeError, nearest
from . import compare, edge
from .environment import fingerprint

SCENARIOS = ("edge",)


class Progress(Protocol):
    """Where progress goes."""

    def stage(self, label: str) -> None: ...

    def update(self, done: float, total: float, detail: str = "") -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line as it was written; the first artifact is the baseline."""

    artifacts: tuple[Path, ...]
    scenario: str = "edge"
    batch: str = "1"
    threads: str = "1"
    dims: tuple[str, ...] = ()
    min_seconds: float = 1.0
    seed: int = 0
    no_kernels: bool = False
    out: Path | None = None


def run(request: Request, progress: Progress) -> list[edge.Row]:
    """Measure the artifacts, print a table, write bench.json and bench.csv where `out` says."""
    from rich.console import Console

    from ..exporters import onnx

    if request.scenario not in SCENARIOS:
        what = f'there is no scenario "{request.scenario}" in this version'
        raise RecipeError(what, where="--scenario", fix=nearest(request.scenario, SCENARIOS))
    for path in request.artifacts:
        if path.suffix != onnx.suffix:
            raise InputError("is not an ONNX file", where=str(path), fix="name .onnx files, the original first")
    spec = edge.Spec(
        batch=_numbers("--batch", request.batch),
        threads=_numbers("--threads", request.threads),
        dims=dict(_dim(text) for text in request.dims),
        min_seconds=request.min_seconds,
        seed=request.seed,
        kernels=not request.no_kernels,
    )
    progress.stage("benchmark")
    rows = edge.run(request.artifacts, spec, onnx.open, _stepper(progress))
    progress.close()
    compare.show(rows, Console())
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        compare.write(rows, request.out, fingerprint())
    return rows


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
