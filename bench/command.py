"""`optimize bench A B ...`: what the command line asked for, measured, shown and written."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..optimizer import tree
from ..optimizer.errors import InputError, RecipeError, nearest
from . import baselines, compare, device, remote
from .environment import fingerprint
from .rows import Row

if TYPE_CHECKING:
    from ..optimizer.sections import BenchSpec

SCENARIOS = ("edge", "singlestream", "multistream", "server", "offline", "stages")
LISTS = ("concurrency",)
"""Options that are lists of whole numbers."""
"""Each is a module of this folder: `Spec`, whose fields are its options, and `run(artifacts, spec, open, progress)`."""


class Progress(Protocol):
    """Where progress goes."""

    def stage(self, label: str) -> None: ...

    def update(self, done: float, total: float, detail: str = "") -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line as it was written; the first artifact is the baseline.

    device: the address of a board that measures instead of this machine, ssh://user@host:port.
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
    device: str = ""
    baselines: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def run(request: Request, progress: Progress) -> list[Row]:
    """Measure the artifacts, print a table, write bench.json and bench.csv where `out` says."""
    from rich.console import Console

    modules = {name: scenario(name, "--scenario") for name in request.scenario.split(",")}
    _check_settings(list(modules.values()), request.settings)
    specs = {name: _spec(module, request) for name, module in modules.items()}
    board = check_device(request.device, request.scenario, "--device")
    baselines.check(request.baselines, "--baseline")
    parts = []
    with tempfile.TemporaryDirectory(prefix="paredown-") as made:
        for number, (name, module) in enumerate(modules.items()):
            folder = Path(made) / str(number)
            folder.mkdir()
            peers = _prepare(request, name, specs[name], folder, progress)
            progress.stage("benchmark")
            artifacts = (*request.artifacts, *peers.paths)
            part = measure(module, artifacts, specs[name], board, _stepper(progress))
            parts.append(replace(part, rows=baselines.complete(part.rows, artifacts, peers)))
    found = replace(parts[0], rows=[row for part in parts for row in part.rows])
    progress.close()
    console = Console()
    for note in (*found.notes, *(f"No baseline {name}: {why}." for name, why in peers.missing)):
        console.print(note, markup=False, highlight=False)
    compare.show(found.rows, console)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        compare.write(found.rows, request.out, found.environment)
    return found.rows


def check_device(address: str, scenario: str, where: str) -> device.Device | None:
    """Return the board of an address, None for this machine; RecipeError where a scenario cannot run there."""
    if not address:
        return None
    if scenario != "edge":
        raise RecipeError(f"the scenario {scenario} runs on this machine only", where=where, fix="use edge on a board")
    return device.parse(address, where)


def measure(
    module: Any,
    artifacts: Sequence[Path],
    spec: Any,
    board: device.Device | None,
    progress: Callable[[float, str], None],
) -> remote.Found:
    """Return the rows of a scenario with the environment that they were taken in: a board, or this machine."""
    from ..exporters import onnx

    if board is not None:
        return remote.run(artifacts, spec, board, progress)
    for path in artifacts:
        if path.suffix != onnx.suffix:
            raise InputError("is not an ONNX file", where=str(path), fix="name .onnx files, the original first")
    rows: list[Row] = module.run(artifacts, spec, onnx.open, progress)
    return remote.Found(rows=rows, environment=fingerprint())


def _prepare(request: Request, scenario: str, spec: Any, folder: Path, progress: Progress) -> baselines.Prepared:
    """Make the baselines of the first artifact in a folder that is deleted; run keeps its own beside the original."""
    if not request.baselines:
        return baselines.Prepared()
    progress.stage("make the baselines")
    wanted = baselines.Wanted(
        names=request.baselines,
        original=request.artifacts[0],
        folder=folder,
        batch=spec.batch,
        dims=sizes(request.dims),
        threads=spec.threads,
        scenario=scenario,
        seed=request.seed,
        remote=bool(request.device),
    )
    return baselines.prepare(wanted)


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


def _check_settings(modules: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Raise RecipeError for an option that none of the scenarios has."""
    known = {item.name for module in modules for item in fields(module.Spec)}
    names = [module.__name__.rpartition(".")[2] for module in modules]
    for name in settings:
        if name not in known:
            option = "--" + name.replace("_", "-")
            who = f"the scenario {names[0]} has no" if len(names) == 1 else f"none of {', '.join(names)} has"
            raise RecipeError(f"{who} {option}", where=option, fix="leave it out")


def _spec(module: Any, request: Request) -> Any:
    """Return a scenario's Spec from those of the options that it has."""
    known = {item.name for item in fields(module.Spec)}
    settings = {name: _setting(name, value) for name, value in request.settings.items() if name in known}
    if request.out is not None and "logs" in known:
        settings["logs"] = request.out / "loadgen"
    return module.Spec(
        batch=_numbers("--batch", request.batch),
        threads=_numbers("--threads", request.threads),
        dims=sizes(request.dims),
        seed=request.seed,
        kernels=not request.no_kernels,
        **settings,
    )


def _setting(name: str, value: Any) -> Any:
    """Return a setting as its field holds it: pairs NAME=VALUE are a mapping, lists are numbers."""
    if name in LISTS:
        return _numbers(f"--{name}", value)
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


def sizes(texts: Sequence[str]) -> dict[str, int]:
    """Return the sizes that --dim NAME=SIZE gives."""
    return dict(_dim(text) for text in texts)


def _dim(text: str) -> tuple[str, int]:
    name, equals, size = text.partition("=")
    if not equals or not size.isdigit():
        raise RecipeError(f'"{text}" is not a size', where="--dim", fix="write --dim seq=64")
    return name, int(size)
