"""A folder that a board builds its engine from: graphs, kernels and plugin as sources, a runner, examples, checksums.

The board needs neither this package nor torch or onnx. The same model and options give the same bytes, but for cubins,
which are copied where they were built (`python -m paredown.kernels.cuda.cubins`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np

from ..kernels.cuda import cubins, sources, units
from ..kernels.tensorrt import node
from ..optimizer import store, workspace
from ..optimizer.errors import RecipeError
from ..optimizer.model import Model
from . import (
    bundle_boards,
    bundle_examples,
    tensorrt,
    tensorrt_compare,
    tensorrt_profile,
    tensorrt_rounding,
    tensorrt_write,
    verify,
)
from .bundle_boards import Board
from .bundle_examples import Examples
from .tensorrt_choice import Decision
from .tensorrt_graph import GraphOptions, Lowered, lower
from .tensorrt_plugin import UNTRIED, kinds
from .tensorrt_profile import Sizes

SCHEMA = "paredown.bundle/1"
SETTINGS, SUMS, GRAPH, PLUGIN_GRAPH = "bundle.json", "SHA256SUMS", "model.onnx", "model.plugin.onnx"
BOARD = Path(__file__).resolve().parent / "board"
CARRIED = ("build.sh", "examples.py", "run.py")
"""Files of BOARD that go into every bundle as they are."""
EMBEDDED = "plugin_aot.py"
"""The file of BOARD that goes with nodes of the plugin."""
PREPARE = "prepare.cu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the graphs of a bundle are lowered: as in `tensorrt.Options`."""

    profile: Mapping[str, Sizes] = field(default_factory=dict)
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    keep: frozenset[str] = frozenset()
    fp8: bool = False
    opset: int = 21


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Contents:
    """All that a bundle is written from; `plugin` is None where no layer has a node of it."""

    model: Model
    name: str
    board: Board
    options: Options
    sizes: Mapping[str, Sizes]
    plain: Lowered
    plugin: Lowered | None
    examples: Examples

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return (self.plugin or self.plain).decisions


def bundle(folder: Path, target: str, out: Path | None, options: Options, *, force: bool = False) -> Path:
    """Write the bundle of an output folder for a board, all of it or nothing, and return its folder."""
    board = bundle_boards.find(target)
    path = out or (folder if folder.name else folder.resolve()).with_name(f"{folder.resolve().name}-{target}")
    _check(path, force=force)
    model = store.load(folder)
    contents = _contents(model, folder.resolve().name, board, options)
    with (
        workspace.disk_errors(path),
        tempfile.TemporaryDirectory(prefix=".paredown-", dir=path.parent) as made,
    ):
        _write(contents, Path(made) / "bundle")
        workspace.put_in_place(Path(made) / "bundle", path, Path(made) / "old")
    return path


def _check(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise RecipeError(f'"{path.name}" exists already', fix="use --force or another --out")
    if path.exists() and not _is_bundle(path):
        raise RecipeError(f'"{path.name}" is no bundle, and is not replaced', where="--out", fix="name another folder")
    if not path.parent.is_dir():
        raise RecipeError(f'the folder "{path.parent}" does not exist', where="--out", fix="make it first")


def _is_bundle(path: Path) -> bool:
    try:
        return bool(json.loads((path / SETTINGS).read_text())["schema"] == SCHEMA)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _contents(model: Model, name: str, board: Board, options: Options) -> _Contents:
    sizes = tensorrt_profile.complete(model.inputs, options.profile)
    if options.fp8:
        tensorrt.check_fp8(board.capabilities)
    graph = GraphOptions(precision=options.precision, opset=options.opset, keep=options.keep, fp8=options.fp8)
    graph, measured = tensorrt_rounding.settle(model, graph)
    plugin = None
    if options.precision != "fp32":
        found = _lowered(model, dataclasses.replace(graph, plugin=True), measured)
        plugin = found if any(one.op_type == node.OP for one in found.proto.graph.node) else None
    return _Contents(
        model=model,
        name=name,
        board=board,
        options=options,
        sizes=sizes,
        plain=_lowered(model, graph, measured),
        plugin=plugin,
        examples=bundle_examples.examples(model, sizes),
    )


def _lowered(model: Model, graph: GraphOptions, measured: tuple[Decision, ...]) -> Lowered:
    found = lower(model, graph)
    return dataclasses.replace(found, decisions=(*found.decisions, *measured))


def _write(contents: _Contents, folder: Path) -> None:
    folder.mkdir()
    tensorrt_write.save(contents.plain.proto, folder / GRAPH)
    for name in CARRIED:
        shutil.copyfile(BOARD / name, folder / name)
        (folder / name).chmod(0o755)  # an installed package does not keep it
    used = [] if contents.plugin is None else kinds(contents.plugin.proto)
    if contents.plugin is not None:
        tensorrt_write.save(contents.plugin.proto, folder / PLUGIN_GRAPH)
        shutil.copy(BOARD / EMBEDDED, folder / EMBEDDED)
        _write_kernels(folder / "kernels", _units(used), contents.board)
    (folder / "settings.sh").write_text(_shell_settings(contents.board, used))
    (folder / "examples.npz").write_bytes(_archive(contents.examples.arrays))
    (folder / SETTINGS).write_text(json.dumps(_settings(contents), indent=1) + "\n")
    (folder / "README.md").write_text(_readme(contents))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = [f"{workspace.file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(sums))


def _units(used: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Return the translation units of kernels of these kinds and bits."""
    return tuple(sorted({PREPARE, *(sources.unit_of(kind, bits) for kind, bits in used)})) if used else ()


def _write_kernels(folder: Path, used: tuple[str, ...], board: Board) -> None:
    """Copy what the plugin and the kernels are compiled of, and cubins where all units were built for a GPU."""
    for name in (*node.SOURCES, *node.HEADERS, node.BUCKET):
        _put(folder / name, (node.KERNELS / name).read_text(encoding="utf-8"))
    for unit in used:
        source = units.read(unit)
        _put(folder / "cuda" / unit, source.text)
        for name, text in source.headers.items():
            _put((folder / "cuda" / name).resolve(), text)
    made = list(_built(used, board))
    if made:
        (folder / "cuda" / "cubin").mkdir()
        for entry in made:
            shutil.copy(cubins.FOLDER / entry.file, folder / "cuda" / "cubin" / entry.file)
        entries = [dataclasses.asdict(entry) for entry in made]
        (folder / "cuda" / "cubin" / cubins.MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")


def _built(used: tuple[str, ...], board: Board) -> Iterator[cubins.Made]:
    """Yield the cubins of these units that were built of the sources as they are, for each GPU that has all of them."""
    fitting = [entry for entry in cubins.manifest(cubins.FOLDER) if entry.unit in used and board.takes(entry)]
    current = [entry for entry in fitting if entry.digest == units.digest(units.read(entry.unit))]
    for architecture in board.architectures:
        mine = [entry for entry in current if entry.architecture == architecture]
        if {entry.unit for entry in mine} == set(used):
            yield from mine


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _shell_settings(board: Board, used: Sequence[tuple[str, int]]) -> str:
    """Return what build.sh reads: GPUs, units with the digests of their sources, and what the plugins are made of."""
    values = {
        "ARCHITECTURES": " ".join(board.architectures),
        "VIRTUAL": cubins.VIRTUAL,
        "UNITS": " ".join(f"{unit}={units.digest(units.read(unit))}" for unit in _units(used)),
        "BUCKETS": " ".join(f"{node.CLASSES[kind]}:{kind}:{bits}" for kind, bits in used),
        "FLAGS": " ".join(sources.FLAGS),
        "SOURCES": " ".join(f"kernels/{name}" for name in node.SOURCES),
    }
    return "".join(f'{name}="{value}"\n' for name, value in values.items())


def _archive(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return arrays as a file of numpy; entries have a fixed date."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return file.getvalue()


def _settings(contents: _Contents) -> dict[str, object]:
    board, options = contents.board, contents.options
    return {
        "schema": SCHEMA,
        "paredown": version("paredown"),
        "name": contents.name,
        "target": board.name,
        "capabilities": list(board.capabilities),
        "tensorrt": list(board.tensorrt),
        "precision": options.precision,
        "opset": options.opset,
        "inputs": [spec.name for spec in contents.model.inputs],
        "outputs": list(contents.examples.outputs),
        "shapes": tensorrt_profile.shapes(contents.model.inputs, contents.sizes),
        "examples": contents.examples.count,
        "tolerance": _tolerance(contents),
        "plugin": {"creator": [node.OP, "1", node.NAMESPACE], "layers": _plugin_layers(contents)},
        "decisions": [dataclasses.asdict(decision) for decision in contents.decisions],
    }


def _tolerance(contents: _Contents) -> float:
    """Return what `optimize verify --runtime tensorrt` allows."""
    truth = tensorrt_compare.truth(contents.model)
    dtype = tensorrt_compare.DTYPES.get(contents.options.precision)
    least = [verify.tolerance(truth, verify.Spec()), verify.TOLERANCE[dtype] if dtype else 0.0]
    if contents.options.fp8:
        with tempfile.TemporaryDirectory(prefix="paredown-") as made:
            graph = Path(made) / GRAPH
            tensorrt_write.save(contents.plain.proto, graph)
            least.append(verify.SLACK * tensorrt_compare.moved(truth, graph, truth.examples(tensorrt_compare.ROWS)))
    return max(least)


def _plugin_layers(contents: _Contents) -> list[str]:
    return [decision.layer for decision in contents.decisions if UNTRIED in decision.reason]


def _readme(contents: _Contents) -> str:
    board, options, layers = contents.board, contents.options, _plugin_layers(contents)
    sizes = [f"{name} {s.least} to {s.most}, usually {s.usual}" for name, s in contents.sizes.items()]
    taken = f"The plugin computes {len(layers)} of these layers." if layers else "No layer has a node of the plugin."
    rows = [
        f"| {one.layer} | {one.form} | {'yes' if one.kept else 'no'} | {one.reason} |" for one in contents.decisions
    ]
    has_cubins = contents.plugin is not None and any(_built(_units(kinds(contents.plugin.proto)), board))
    return Template((BOARD / "README.md").read_text(encoding="utf-8")).substitute(
        name=contents.name,
        title=board.title,
        board=board.name,
        version=version("paredown"),
        capabilities=" or ".join(board.capabilities),
        needs=board.needs,
        least=board.tensorrt[0],
        below=board.tensorrt[1],
        nvcc="" if has_cubins else ", nvcc",
        inputs=", ".join(spec.name for spec in contents.model.inputs),
        outputs=", ".join(contents.examples.outputs),
        profile="; ".join(sizes) or "fixed",
        precision=options.precision,
        tolerance=f"{_tolerance(contents):g}",
        plugin=taken,
        layers="\n".join(rows) or "| - | - | - | no layer is compressed |",
    )
