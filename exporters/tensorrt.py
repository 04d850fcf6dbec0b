"""Export to a TensorRT engine, and run it.

An engine holds compiled kernels: it fits one version of the library, and the GPUs that it was built for. Beside
`model.engine` lie `model.engine.json`, what it was built of and for, and `model.tensorrt.onnx`, the graph that TensorRT
was given, whose precision is in the graph. TensorRT-RTX builds without a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..optimizer.errors import InputError, RecipeError, RuntimeMissingError
from . import tensorrt_library, tensorrt_profile
from .runner import RunnerOptions
from .tensorrt_library import Library
from .tensorrt_profile import Sizes

if TYPE_CHECKING:
    from ..optimizer.model import Model
    from .tensorrt_engine import EngineRunner
    from .verify import Spec

suffix = ".engine"
CAPABILITY = (8, 9)
"""The first with floats of 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an engine is built.

    profile: sizes of named dimensions. library: "tensorrt", "rtx" or "" for the first that is installed. sm: compute
    capabilities, "8.6" and so on, for TensorRT-RTX; none for an engine that any GPU can take. precision, opset, keep:
    as in `tensorrt_graph.GraphOptions`; more layers stay float32 where measuring asks for it (`tensorrt_rounding`).
    fp8: layers between int8 grids compute in floats of 8 bits (`tensorrt_fp8`), from compute capability 8.9 on.
    plugin: linear layers by our CUDA kernels, embedded into the engine (TensorRT 10.9 and later; never run on a GPU).
    timing_cache: a file that is read and written back. memory_bytes: private memory of the process that builds, 0 for
    any amount.
    """

    profile: Mapping[str, Sizes] = field(default_factory=dict)
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    library: str = ""
    sm: tuple[str, ...] = ()
    opset: int = 21
    keep: frozenset[str] = frozenset()
    fp8: bool = False
    plugin: bool = False
    timing_cache: Path | None = None
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        if self.memory_bytes < 0:
            raise RecipeError(f"memory_bytes={self.memory_bytes} is negative", fix="use 0 (no limit) or more")


def export(model: Model, path: Path, options: Options | None = None) -> None:
    """Build an engine to `path`, with its metadata and its ONNX file beside it: all of them or none.

    RuntimeMissingError where there is no library or no GPU that it needs; ExportError where it refuses the graph or
    does not finish.
    """
    options = options or Options()
    library = tensorrt_library.find(options.library)
    sizes = tensorrt_profile.complete(model.inputs, options.profile)
    _check_plugin(library, options)
    targets = _targets(library, options)
    if options.fp8:
        check_fp8(targets)
    _check_timing_cache(library, options.timing_cache)
    from .tensorrt_write import Order, write

    with tempfile.TemporaryDirectory(prefix=".paredown-", dir=path.parent) as made:
        write(model, path, Order(library=library, options=options, sizes=sizes, sm=targets, folder=Path(made)))


def open(path: Path, options: RunnerOptions | None = None) -> EngineRunner:
    """Return an engine ready to run on the first GPU; what is stale or cannot run here is an error that says why."""
    from .tensorrt_engine import load, read_metadata

    if not path.is_file():
        raise InputError("is missing", where=str(path), fix="run optimize export --target tensorrt")
    return load(path, read_metadata(path))


def comparison(path: Path, model: Model) -> tuple[Model, Spec]:
    """Return what an engine is compared with, and how: what it computes, at sizes of its profile, in its precision.

    TensorRT computes with exact inputs what our kernels compute with inputs rounded at run time, and on symmetric
    grids only.
    """
    from .tensorrt_compare import spec, truth

    exact = truth(model)
    return exact, spec(path, exact)


def decisions(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return how an engine holds each layer that was compressed or stays float32: layer, form, kept, reason."""
    from .tensorrt_engine import read_metadata

    return read_metadata(path).decisions


def examine() -> list[str]:
    """Return lines for `optimize doctor`: which libraries are installed, and what they can do here."""
    return tensorrt_library.examine()


def check_fp8(capabilities: Sequence[str]) -> None:
    """Raise RecipeError where a GPU of these has no floats of 8 bits."""
    for name in capabilities:
        if tuple(map(int, name.split("."))) < CAPABILITY:
            what = f"compute capability {name} has no floats of 8 bits, which came with 8.9"
            raise RecipeError(what, where="--fp8", fix="leave it out: int8 is what such a GPU has")


def _check_plugin(library: Library, options: Options) -> None:
    if not options.plugin:
        return
    if library.name == "rtx":
        raise RecipeError(f"{library.title} has no plugins", where="--plugin", fix="use --library tensorrt")
    if not tensorrt_library.embeds_plugins():
        fix = "use 10.9 or later, or optimize bundle, whose build script compiles the plugin to a library"
        raise RuntimeMissingError(f"{library.title} does not embed plugins", where="--plugin", fix=fix)


def _targets(library: Library, options: Options) -> tuple[str, ...]:
    """Return the compute capabilities to build for, none for any GPU."""
    wanted = tuple(_dotted(name) for name in options.sm)
    if library.name == "rtx":
        known = tensorrt_library.capabilities()
        for name in wanted:
            if name not in known:
                fix = f"use some of {', '.join(known)}; for another GPU build on it, with --library tensorrt"
                raise RecipeError(
                    f"{library.title} does not build for compute capability {name}", where="--sm", fix=fix
                )
        return wanted
    here = tensorrt_library.capability()
    if not here:
        fix = "run this on the machine that the engine is for, or use --library rtx, which builds without one"
        raise RuntimeMissingError(f"{library.title} builds on a GPU, and {tensorrt_library.NO_GPU}", fix=fix)
    if wanted not in ((), (here,)):
        what = f"{library.title} builds for the GPU that is there ({here}), not for {', '.join(wanted)}"
        raise RecipeError(what, where="--sm", fix="leave it out, or use --library rtx")
    return (here,)


def _dotted(name: str) -> str:
    digits = name.strip().replace(".", "")
    if not digits.isascii() or not digits.isdigit() or len(digits) < 2:
        raise RecipeError(f'"{name}" is no compute capability', where="--sm", fix="write them as in 86,89")
    return f"{digits[:-1]}.{digits[-1]}"


def _check_timing_cache(library: Library, path: Path | None) -> None:
    where = "--timing-cache"
    if path is None:
        return
    if library.name == "rtx":
        what = f"{library.title} times nothing while it builds, and keeps no such cache"
        raise RecipeError(what, where=where, fix="leave it out, or use --library tensorrt")
    if path.is_dir() or not path.parent.is_dir():
        what = f'"{path}" is a folder' if path.is_dir() else f'the folder "{path.parent}" does not exist'
        raise RecipeError(what, where=where, fix="name a file to write")
