"""What a board gets: artifacts with their weights, inputs, what measures, our kernels as a library or as sources."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..exporters import onnx, onnx_runner
from ..exporters.runner import RunnerOptions
from ..kernels import build, elf
from ..optimizer.errors import InputError, RecipeError
from . import environment
from .edge import Spec, feeds_of
from .feeds import Feeds
from .streaming import check_state

BOARD = Path(__file__).with_name("board")
BUNDLE = "bundle.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One file of a parcel: its name on the board, and what is in it, read where it lies or made here."""

    name: str
    path: Path | None = None
    content: bytes = b""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path else len(self.content)

    def parts(self) -> Iterator[bytes]:
        """Yield the contents in pieces."""
        if self.path is None:
            yield self.content
            return
        with self.path.open("rb") as file:
            yield from iter(lambda: file.read(1 << 20), b"")

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts():
            digest.update(part)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact as the board sees it: "onnx" or "bundle", the path to open, and whether our operators are in it."""

    name: str
    kind: str
    path: str
    items: tuple[Item, ...]
    local: Path
    packed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How the board comes to our kernels: `library` is copied, or built there of sources, or is none and why."""

    items: tuple[Item, ...] = ()
    library: str = ""
    build: bool = False
    without: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What the board said of itself."""

    machine: str
    glibc: str
    compiler: str
    boot_id: str
    packages: Mapping[str, str | None] = field(default_factory=dict)


def artifacts(paths: Sequence[Path], names: Sequence[str], where: str) -> list[Artifact]:
    """Read which files make up each artifact."""
    return [_artifact(index, path, name, where) for index, (path, name) in enumerate(zip(paths, names, strict=True))]


def _artifact(index: int, path: Path, name: str, where: str) -> Artifact:
    folder = f"artifacts/{index}"
    if (path / BUNDLE).is_file():
        inner = (one.relative_to(path) for one in sorted(path.rglob("*")) if one.is_file())
        items = tuple(Item(name=f"{folder}/{one}", path=path / one) for one in inner if one.parts[0] != "build")
        return Artifact(name=name, kind="bundle", path=folder, items=items, local=path)
    if path.suffix != onnx.suffix:
        fix = "an engine fits the machine that built it: name an ONNX file, or a folder of optimize bundle"
        raise RecipeError(f'"{path.name}" is nothing that a board can run', where=where, fix=fix)
    files = (path, *onnx_runner.weight_files(path))
    return Artifact(
        name=name,
        kind="onnx",
        path=f"{folder}/{path.name}",
        items=tuple(Item(name=f"{folder}/{one.relative_to(path.parent).as_posix()}", path=one) for one in files),
        local=path,
        packed=onnx_runner.has_packed_layers(path),
    )


def folder_name(found: Sequence[Artifact]) -> str:
    """Return the name of the work folder: a hash of the artifacts' contents, in their order."""
    sums = [[item.name, item.sha256()] for artifact in found for item in artifact.items]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:20]


def inputs(artifact: Artifact, spec: Spec) -> dict[int, Item]:
    """Return the inputs of an artifact by batch size, the same arrays that a local run feeds it."""
    if artifact.kind == "bundle":
        return {batch: _archive(_example(artifact.local, batch)) for batch in spec.batch}
    runner = onnx.open(artifact.local, RunnerOptions(threads=1, kernels=False))
    made = {batch: feeds_of(runner, spec, batch) for batch in spec.batch}
    if spec.state:
        feeds = made[spec.batch[0]]
        check_state(runner.run(feeds), feeds, spec.state, artifact.name)
    return {batch: _archive(feeds) for batch, feeds in made.items()}


def _example(folder: Path, batch: int) -> Feeds:
    """Return the first example of a bundle, its samples repeated to the batch."""
    names = json.loads((folder / BUNDLE).read_text())["inputs"]
    try:
        with np.load(folder / "examples.npz") as arrays:
            found = {name: arrays[f"0.in.{name}"] for name in names}
    except (OSError, KeyError, ValueError) as error:
        raise InputError("the examples of the bundle cannot be read", where=folder.name, fix="bundle again") from error
    return {name: np.ascontiguousarray(np.resize(value, (batch, *value.shape[1:]))) for name, value in found.items()}


def _archive(feeds: Feeds) -> Item:
    file = io.BytesIO()
    arrays: dict[str, np.ndarray] = dict(feeds)
    np.savez(file, allow_pickle=False, **arrays)
    content = file.getvalue()
    return Item(name=f"feeds/{hashlib.sha256(content).hexdigest()[:20]}.npz", content=content)


def programs() -> list[Item]:
    """Return what measures on the board."""
    files = [path for path in sorted(BOARD.glob("*.py")) if path.name != "__init__.py"]
    return [Item(name=f"board/{path.name}", path=path) for path in (*files, Path(environment.__file__))]


def kernels(board: Board) -> Kernels:
    """Copy the library where it runs on the board's machine; else send the sources where there is a compiler."""
    library = onnx_runner.kernel_library()
    if library is not None and (digest := _fits(library, board)):
        name = f"kernels/{digest[:20]}.so"
        return Kernels(items=(Item(name=name, path=library),), library=name)
    if not board.compiler:
        return Kernels(without=f"there is no C++ compiler on the board ({board.machine}) to build the kernels with")
    sources = (Path(build.__file__), *build.source_files())
    items = tuple(Item(name=f"kernels/{one.relative_to(build.KERNELS).as_posix()}", path=one) for one in sources)
    return Kernels(items=items, library=f"kernels/{build.LIBRARY}", build=True)


def _fits(library: Path, board: Board) -> str:
    """Return the hash of the library where the board has its machine and no older C library, "" elsewhere."""
    made = build.record(library)
    needed = elf.read(library).newest.get("GLIBC", ())
    have = tuple(int(part) for part in board.glibc.split(".") if part.isdigit())
    if made is None or made.machine != board.machine or not have or have < needed:
        return ""
    return Item(name="", path=library).sha256()
