"""A model repository for Triton Inference Server: the exported file, its configuration, and how to serve it.

Triton's onnxruntime backend registers the libraries that `model_operations` names by calling RegisterCustomOpsLibrary
with the string as it stands, so the path is absolute and that of the server's file system: `Options.mount`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..optimizer import store, workspace
from ..optimizer.errors import InputError, RecipeError
from . import onnx, onnx_runner
from .runner import RunnerOptions
from .triton_config import Tensors, read_tensors, text
from .triton_readme import readme

if TYPE_CHECKING:
    from ..optimizer.model import Model
    from .onnx_runner import OnnxRunner

suffix = ""
CONFIG, FILE, PLAN = "config.pbtxt", "model.onnx", "model.plan"
NAME = "model_repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a model is served.

    platform: "onnxruntime", or "tensorrt" to serve the folder's model.engine. max_batch: rows that one execution takes.
    max_delay_ms: how long a request waits for others to share an execution with. instances: copies that execute at the
    same time. mount: where the server sees the repository. portable: leave our library out, whatever the file has.
    """

    platform: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    max_batch: int = 32
    max_delay_ms: float = 1.0
    instances: int = 1
    mount: str = "/models"
    portable: bool = False

    def __post_init__(self) -> None:
        if self.platform not in ("onnxruntime", "tensorrt"):
            raise RecipeError(f'there is no platform "{self.platform}"', fix="use onnxruntime or tensorrt")
        for name, least in (("max_batch", 1), ("instances", 1), ("max_delay_ms", 0)):
            if not getattr(self, name) >= least:
                raise RecipeError(f"{name}={getattr(self, name)} is out of range", fix=f"use {least} or more")
        if not self.mount.startswith("/") or not re.fullmatch(r"[\w./-]+", self.mount):
            raise RecipeError(f'mount="{self.mount}" is no absolute path of plain characters', fix="use /models")


def repository(folder: Path, out: Path | None, options: Options, *, force: bool = False) -> Path:
    """Write the repository of an output folder, all of it or nothing, and return it.

    Raises RecipeError where it may not be written or the options do not fit the engine, InputError without an engine.
    """
    path = out or folder / NAME
    if out is not None or folder.is_dir():
        _check(path, force=force)
    model = store.load(folder)
    name = _name(folder.resolve().name)
    with workspace.disk_errors(path), tempfile.TemporaryDirectory(prefix=".paredown-", dir=path.parent) as made:
        target = Path(made) / "repository"
        if options.platform == "tensorrt":
            _write_engine(folder / "model.engine", target / name, options)
        else:
            _write_onnx(model, target / name, options)
        (target / "README.md").write_text(readme(name, target / name / CONFIG, options.mount), encoding="utf-8")
        workspace.put_in_place(target, path, Path(made) / "old")
    return path


def export(model: Model, path: Path, options: Options | None = None) -> None:
    """Write the folder of one model, `path`, whose name is the name that it is served by, into a repository."""
    _write_onnx(model, path, options or Options())


def open(path: Path, options: RunnerOptions | None = None) -> OnnxRunner:
    """Return the model of a repository ready to run in onnxruntime; an InputError for an engine or no repository."""
    found = sorted(path.glob(f"*/1/{FILE}"))
    if len(found) != 1:
        raise InputError("has no ONNX model to run here", where=str(path), fix="export it with --platform onnxruntime")
    return onnx.open(found[0], options)


def notes(path: Path) -> list[str]:
    """Return what was decided on the way to a repository and why: the comments of its configuration."""
    lines = [line for file in path.glob(f"*/{CONFIG}") for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.removeprefix("# ") for line in lines if line.startswith("# ")]


def _write_onnx(model: Model, path: Path, options: Options) -> None:
    file = path / "1" / FILE
    file.parent.mkdir(parents=True)
    onnx.export(model, file)
    tensors = read_tensors(file)
    library, note = _library(file, path, options)
    config = text(path.name, tensors, options, (note,) if note else (), library)
    (path / CONFIG).write_text(config, encoding="utf-8")


def _library(file: Path, path: Path, options: Options) -> tuple[str, str]:
    """Copy our library beside the model; return its path in the server, "" without it, and what was decided."""
    if not onnx_runner.has_packed_layers(file):
        return "", ""
    if options.portable:
        return "", "The portable bodies of packed layers run: the library of kernels was left out as asked."
    library = onnx_runner.kernel_library()
    if library is None:
        return "", "The portable bodies of packed layers run: the kernels were not built on this machine."
    shutil.copyfile(library, path / library.name)
    return (
        f"{options.mount.rstrip('/')}/{path.name}/{library.name}",
        f"Packed layers run in {library.name}, compiled on the machine that exported; without model_operations below "
        "their portable bodies run.",
    )


def _write_engine(engine: Path, path: Path, options: Options) -> None:
    """Write the folder of an engine; its graph, which the export left beside it, says what it takes and gives."""
    from .tensorrt_engine import read_metadata

    graph = engine.with_name(f"{engine.name}.onnx")
    if not engine.is_file() or not graph.is_file():
        missing = graph if engine.is_file() else engine
        fix = f"run optimize export {engine.parent} --target tensorrt"
        raise InputError("is missing", where=str(missing), fix=fix)
    profile = {name: tuple(sizes) for name, sizes in read_metadata(engine).profile.items()}
    tensors = _profiled(read_tensors(graph), profile, options)
    (path / "1").mkdir(parents=True)
    shutil.copyfile(engine, path / "1" / PLAN)
    note = "The engine runs on the GPU and the TensorRT version that model.engine.json names, and nowhere else."
    (path / CONFIG).write_text(text(path.name, tensors, options, (note,), ""), encoding="utf-8")


def _profiled(tensors: Tensors, profile: dict[str, tuple[int, ...]], options: Options) -> Tensors:
    """Return the tensors with the usual sizes of an engine; RecipeError where it takes no such batches."""
    least, _, largest = profile.get(tensors.batch, (1, 1, options.max_batch))
    if tensors.batch and options.max_batch > largest:
        what = f"max_batch={options.max_batch} is above {largest}, the largest batch of the engine"
        raise RecipeError(what, where="--max-batch", fix=f"use {largest}, or build the engine with a larger --profile")
    if tensors.batch and least > 1:
        what = f"the engine takes no batch below {least}, and a request may come alone"
        raise RecipeError(what, where="--platform", fix=f"build it with --profile {tensors.batch}=1:8:{largest}")
    return replace(tensors, sizes={name: sizes[1] for name, sizes in profile.items()})


def _name(folder: str) -> str:
    """Return a folder's name in the characters that a URL of the server takes as they are."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder).strip("._-") or "model"


def _check(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise RecipeError(f'"{path.name}" exists already', fix="use --force or another --out")
    if path.exists() and not _is_repository(path):
        what = f'"{path.name}" is no model repository, and is not replaced'
        raise RecipeError(what, where="--out", fix="name another folder")
    if not path.parent.is_dir():
        raise RecipeError(f'the folder "{path.parent}" does not exist', where="--out", fix="make it first")


def _is_repository(path: Path) -> bool:
    """Return whether a folder is one of ours with one model: what others keep in it must not be lost."""
    inside: Sequence[Path] = list(path.iterdir()) if path.is_dir() else ()
    models = [item for item in inside if (item / CONFIG).is_file()]
    return len(models) == 1 and {item.name for item in inside} == {models[0].name, "README.md"}
