"""`optimize bench A B ...`: what the command line asked for, measured, shown and written."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..optimizer import tree
from ..optimizer.errors import InputError, RecipeError, nearest
from . import compare
from .environment import fingerprint
from .rows import Row

if TYPE_CHECKING:
    from ..optimizer.sections import BenchSpec

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
    progress.stage("benchmark")
    rows: list[Row] = module.run(request.artifacts, spec, onnx.open, _stepper(progress))
    progress.close()
    compare.show(rows, Console())
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        compare.write(rows, request.out, fingerprint())
    return rows


def scenario(name: str, where: str) -> Any:
    """Return the module of a scenario: Spec and run."""
    if name not in SCENARIOS:
        what = f'there is no scenario "{name}" in this version'
        raise RecipeError(what, where=where, fix=nearest(name, SCENARIOS))
    return importlib.import_module(f"{__package__}.{name}")


def recipe_spec(bench: BenchSpec, seed: int, where: str) -> Any:
    """Return the scenario's Spec that a recipe's `bench` asks for; a key that it does not have is a RecipeError."""
    module = scenario(bench.scenario, where)
    known = tree.known_keys((module.Spec,))
    names = known | tree.known_keys((type(bench),))
    for name, child in bench.settings.items():
        if name not in known:
            raise child.error(f'there is no key "{name}"', nearest(name, names))
    values = {name: tree.of_plain(getattr(bench, name), where) for name in known & {"batch", "threads"}}
    values |= bench.settings
    spec = tree.build(module.Spec, tree.Node(value=values, where=where), "bench")
    return replace(spec, seed=seed)


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
        **{name: _setting(name, value) for name, value in request.settings.items()},
    )


def _setting(name: str, value: Any) -> Any:
    """Return a setting as its field holds it: pairs NAME=VALUE are a mapping."""
    if name == "state":
        return dict(_pair("--state", text) for text in value)
    if name == "inputs":
        return {key: _value(text) for key, text in (_pair("--input", text) for text in value)}
    return value


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise RecipeError(f'"{text}" is not a pair', where=option, fix=f"write {option} NAME=VALUE")
    return name, value


def _value(text: str) -> int | float:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    raise RecipeError(f'"{text}" is not a number', where="--input", fix="write --input sr=16000")


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
