"""A model in a folder: model.safetensors (every byte that counts), model.json (what they mean), source/ (the entry).

Loading needs no original checkpoint and no pickle. It does run the entry's source, which is what builds the network;
its SHA-256 is checked against model.json first, so an edited file is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import huggingface, surgery
from .checkpoint import read_safetensors
from .entry import build_module, resolve_from_files
from .errors import InputError
from .model import ActQuant, InputSpec, Model, Source, SourceFile, skeleton_of
from .packed import dynamic_refusal
from .weight import Dense, Layout, Weight, rebuild

SCHEMA = "paredown.model/1"


def save(model: Model, folder: Path) -> None:
    """Write a model; the same value gives the same bytes. The folder must exist."""
    save_file(_stored(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.json").write_text(json.dumps(describe(model), indent=1, sort_keys=True) + "\n")
    shutil.copymode(folder / "model.json", folder / "model.safetensors")  # safetensors writes for its owner alone
    (folder / "source").mkdir(exist_ok=True)
    for file in model.source.files:
        path = _within(folder, file.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text, encoding="utf-8", newline="")


def load(folder: str | Path) -> Model:
    """Read a model that `save` wrote; tensors stay memory-mapped.

    Raises InputError naming the file where one is missing, was changed, or does not fit the others.
    """
    folder = Path(folder)
    data = _read_json(folder / "model.json")
    if data.get("schema") != SCHEMA:
        raise InputError(
            f'schema "{data.get("schema")}" is not "{SCHEMA}"',
            where=str(folder / "model.json"),
            fix="run optimize again",
        )
    tensors = read_safetensors(folder / "model.safetensors")
    try:
        source = _source(folder, data)
        module = _build(source, folder)
        skeleton = surgery.apply(skeleton_of(module), data["edits"])
        return _assemble(data, tensors, skeleton, source)
    except InputError as error:
        raise InputError(error.what, where=error.where or str(folder / "model.json"), fix=error.fix) from error
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"does not fit model.safetensors: {type(error).__name__} {error}",
            where=str(folder / "model.json"),
            fix="copy the folder again",
        ) from error


def describe(model: Model) -> dict[str, Any]:
    """Return everything but the tensors, as JSON data."""
    source = model.source
    return {
        "schema": SCHEMA,
        "entry": source.entry,
        "args": dict(source.args),
        "files": [{"name": file.name, "sha256": file.sha256} for file in source.files],
        "checkpoint_sha256": source.checkpoint_sha256,
        "inputs": [dataclasses.asdict(spec) for spec in model.inputs],
        "edits": [dict(edit) for edit in model.edits],
        "weights": {
            name: {"layout": dataclasses.asdict(model.layouts[name]), **weight.meta()}
            for name, weight in model.weights.items()
        },
        "tensors": sorted(model.tensors),
        "acts": {name: dataclasses.asdict(act) for name, act in model.acts.items()},
        "dynamic": sorted(model.dynamic),
    }


def _stored(model: Model) -> dict[str, Tensor]:
    stored = {name: tensor.contiguous() for name, tensor in model.tensors.items()}
    for name, weight in model.weights.items():
        for part, tensor in _parts(name, weight, model.layouts[name]).items():
            stored[part] = tensor.contiguous()
    return {name: tensor.clone() for name, tensor in stored.items()}


def _parts(name: str, weight: Weight, layout: Layout) -> dict[str, Tensor]:
    """Return stored name -> tensor: a dense weight keeps its parameter's name and shape."""
    if isinstance(weight, Dense):
        return {name: layout.to_param(weight.values)}
    return {f"{name}:{part}": tensor for part, tensor in weight.tensors().items()}


def _assemble(
    data: Mapping[str, Any], tensors: Mapping[str, Tensor], skeleton: torch.nn.Module, source: Source
) -> Model:
    weights: dict[str, Weight] = {}
    layouts: dict[str, Layout] = {}
    for name, meta in data["weights"].items():
        layout = Layout(**{**meta["layout"], "shape": tuple(meta["layout"]["shape"])})
        layouts[name] = layout
        if meta["format"] == "dense":
            weights[name] = Dense(values=layout.to_matrix(tensors[name]))
        else:
            own = {key.removeprefix(f"{name}:"): t for key, t in tensors.items() if key.startswith(f"{name}:")}
            weights[name] = rebuild(meta, own)
        if layout.matrix_shape != weights[name].shape:
            raise ValueError(f"{name} of shape {weights[name].shape} is no parameter {layout.shape}")
    return Model(
        skeleton=skeleton,
        weights=weights,
        layouts=layouts,
        tensors={name: tensors[name] for name in data["tensors"]},
        inputs=tuple(InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in data["inputs"]),
        source=source,
        acts={name: ActQuant(**act) for name, act in data["acts"].items()},
        edits=tuple(data["edits"]),
        dynamic=_dynamic(data, weights, layouts),
    )


def _dynamic(data: Mapping[str, Any], weights: Mapping[str, Weight], layouts: Mapping[str, Layout]) -> frozenset[str]:
    """Return the layers that round their inputs; folders of version 0.1 name none."""
    found = frozenset(data.get("dynamic", ()))
    for name in sorted(found):
        if name not in weights or dynamic_refusal(weights[name], layouts[name]):
            raise ValueError(f'"{name}" cannot take inputs of int8')
    return found


def _source(folder: Path, data: Mapping[str, Any]) -> Source:
    files = []
    for entry in data["files"]:
        path = _within(folder, entry["name"])
        if not path.is_file():
            raise InputError("is missing", where=str(path), fix="copy the whole folder")
        file = SourceFile(name=entry["name"], text=path.read_bytes().decode("utf-8", errors="replace"))
        if file.sha256 != entry["sha256"]:
            raise InputError("was changed after it was saved", where=str(path), fix="restore it or run optimize again")
        files.append(file)
    return Source(
        entry=data["entry"], args=data["args"], files=tuple(files), checkpoint_sha256=data["checkpoint_sha256"]
    )


def _build(source: Source, folder: Path) -> torch.nn.Module:
    """Return the network that the entry builds, or the kept config.json of a Hugging Face folder."""
    if not source.entry:
        return huggingface.build(folder / "source")
    return build_module(resolve_from_files(source.entry, source.files), source.args)


def _within(folder: Path, name: str) -> Path:
    """Return the path of a source file; an InputError where its name would leave the folder."""
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or set(name) & {"\\", ":", "\0"} or PurePosixPath(name).is_absolute():
        raise InputError(f'source file "{name}" would lie outside the folder', where=str(folder / "model.json"))
    return folder.joinpath("source", *parts)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f'"{path.parent}" is not an output folder', fix="it must hold model.json and model.safetensors"
        )
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"is not JSON: {error}", where=str(path), fix="copy the folder again") from error
    return data if isinstance(data, dict) else {}
