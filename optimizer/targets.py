"""What a stored model can be lowered to, and where the result can be run: `optimize export` and `optimize verify`.

With `run` and `cli` the only module that reaches across folders.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import artifact, store, workspace
from .errors import InputError, RecipeError, RuntimeMissingError, nearest

TARGETS = ("onnx", "tensorrt", "triton")
SERVED = ("platform", "max_batch", "max_delay_ms", "instances", "mount", "portable")
"""Options of the target triton; the others are of tensorrt."""
RUNTIMES = {"onnxruntime": "onnx", "tensorrt": "tensorrt"}
"""Runtime -> the target whose files it runs."""


def exporter(target: str, where: str = "") -> Any:
    """Return `exporters/<target>.py`: suffix, Options, export, open and comparison."""
    if target not in TARGETS:
        raise RecipeError(f'there is no export target "{target}"', where=where, fix=nearest(target, TARGETS))
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.exporters.{target}")


def export(
    folder: Path, target: str, out: Path | None, *, force: bool, settings: Mapping[str, Any] | None = None
) -> Path:
    """Lower the stored model of an output folder and return the file or folder, which appears only when it is whole.

    settings: fields of the target's Options.
    """
    module = exporter(target, "--target")
    options = module.Options(**(settings or {}))
    if target == "triton":
        repository: Path = module.repository(folder, out, options, force=force)
        return repository
    path = out or folder / f"model{module.suffix}"
    if path.is_dir():
        raise RecipeError(f'"{path}" is a folder', where="--out", fix="name a file to write")
    if path.suffix != module.suffix:
        what, fix = f'"{path.name}" is no name for a file of {target}', f"end it with {module.suffix}"
        raise RecipeError(what, where="--out", fix=fix)
    if path.exists() and not force:
        raise RecipeError(f'the file "{path.name}" exists already', fix="use --force or another --out")
    model = store.load(folder)
    if not path.parent.is_dir():
        raise RecipeError(f'the folder "{path.parent}" does not exist', where="--out", fix="name a file to write")
    with workspace.disk_errors(path), tempfile.TemporaryDirectory(prefix=".paredown-", dir=path.parent) as made:
        module.export(model, Path(made) / path.name, options)
        files = sorted(Path(made).iterdir(), reverse=True)  # external weights first
        for file in files:
            if (path.parent / file.name).exists() and not force:
                raise RecipeError(f'the file "{file.name}" exists already', fix="use --force or another --out")
        for file in files:
            if not file.with_name(f"{file.name}.data").exists():
                (path.parent / f"{file.name}.data").unlink(missing_ok=True)
        for file in files:
            file.replace(path.parent / file.name)
    return path


def explain(path: Path, target: str) -> list[str]:
    """Return a line for each layer of an exported file that was decided on: its form, kept or fallback, and why.

    For Triton: a line for each decision on how the model is served.
    """
    module = exporter(target)
    if target == "triton":
        return list(module.notes(path))
    rows = module.decisions(path) if target == "tensorrt" else ()
    return [f"{row['layer']}: {row['form']}, {'kept' if row['kept'] else 'fallback'}: {row['reason']}" for row in rows]


def lowering_settings(target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the target's Options that were given; RecipeError for one of another target."""
    given = {name: value for name, value in options.items() if value is not None and value != () and value is not False}
    for name in given:
        owner = "triton" if name in SERVED else "tensorrt"
        if owner != target:
            raise RecipeError(f"--{name.replace('_', '-')} is of --target {owner}", fix="leave it out")
    if target != "tensorrt":
        return given
    from ..exporters import tensorrt_profile

    if "profile" in given:
        given["profile"] = tensorrt_profile.parse(given["profile"])
    if "keep" in given:
        given["keep"] = frozenset(given["keep"])
    if "sm" in given:
        given["sm"] = tuple(given["sm"].split(","))
    if "memory_limit" in given:
        given["memory_bytes"] = given.pop("memory_limit") * 2**20
    return given


def verify(folder: Path, runtime: str, *, kernels: bool = True) -> list[str]:
    """Compare the exported artifact of a folder with its stored model; return a line per batch size.

    kernels: False runs the portable bodies of the file even where our library is built.
    """
    from ..exporters import verify as comparison

    if runtime not in RUNTIMES:
        what = f'there is no runtime "{runtime}" in this version'
        raise RuntimeMissingError(what, where="--runtime", fix=nearest(runtime, RUNTIMES))
    target = RUNTIMES[runtime]
    module = exporter(target)
    path = folder / f"model{module.suffix}"
    model = store.load(folder)
    if not path.is_file():
        how = "" if target == "onnx" else f" --target {target}"
        raise InputError("is missing", where=str(path), fix=f"run optimize export {folder}{how}")
    if target == "onnx":
        spec = comparison.Spec(inputs=artifact.examples(model), kernels=kernels)
    else:
        model, spec = module.comparison(path, model)
    rows = comparison.verify(model, path, module.open, spec)
    lines = [
        f"{row.runtime} batch {row.batch}: relative {row.rel:.1e}, max {row.max_abs:.1e}, first bad layer: none"
        for row in rows
    ]
    if equal := rows[0].weights_equal:
        lines.append(f"{equal} tensors of {path.name} are those of the stored model to the bit")
    return lines
