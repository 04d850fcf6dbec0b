"""Lower a model, build its engine, and put the engine, its metadata and its ONNX file into place together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx
import onnx_ir as ir

from ..optimizer import activations
from ..optimizer.artifact import mark
from ..optimizer.errors import ExportError
from ..optimizer.model import Model
from ..optimizer.workspace import file_sha256
from . import (
    tensorrt_build,
    tensorrt_engine,
    tensorrt_library,
    tensorrt_plugin,
    tensorrt_profile,
    tensorrt_rounding,
    tensorrt_time,
)
from .tensorrt_build import Built
from .tensorrt_choice import is_packed
from .tensorrt_graph import GraphOptions, Lowered, lower
from .tensorrt_library import Library
from .tensorrt_profile import Sizes

if TYPE_CHECKING:
    from .tensorrt import Options

EXTERNAL_BYTES = 1_000_000_000
"""A file of protobuf holds two GiB; weights above this go beside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is built: everything that was asked for, checked. `folder` is empty, and may hold anything afterwards."""

    library: Library
    options: Options
    sizes: Mapping[str, Sizes]
    sm: tuple[str, ...]
    folder: Path


def write(model: Model, path: Path, order: Order) -> None:
    """Build in `order.folder`, then put everything into place: the engine last, so that what is beside it fits it."""
    options, made = order.options, order.folder / path.name
    how = GraphOptions(
        precision=options.precision,
        opset=options.opset,
        keep=options.keep,
        fp8=options.fp8,
        plugin=options.plugin,
    )
    how, measured = tensorrt_rounding.settle(model, how)
    name = tensorrt_engine.onnx_path(path).name
    lowered, built = best(
        model,
        how,
        lambda found, place: _built(model, order, found, order.folder / place / name),
        _better(model, order),
    )
    lowered = dataclasses.replace(lowered, decisions=(*lowered.decisions, *measured))
    graph = tensorrt_engine.onnx_path(made)
    save(lowered.proto, graph)
    built.engine.rename(made)
    metadata = _metadata(model, made, order, (lowered, built))
    metadata.write(tensorrt_engine.metadata_path(made))
    _put(order, path, built)


Pair: TypeAlias = tuple[Lowered, Built]
Better: TypeAlias = Callable[[Pair, Pair], tuple[int | None, str]]
"""Says which of two runs faster, None where that is not known, and a sentence on it."""


def best(
    model: Model, how: GraphOptions, build: Callable[[Lowered, str], Built], better: Better | None = None
) -> tuple[Lowered, Built]:
    """Return the graph and its engine, built with packed weights and with floats where `how` asks for the smallest.

    build: makes an engine, in a place of that name. better: where engines can run; the faster is returned then, the
    smaller where none is clearly faster.
    """
    lowered = lower(model, how)
    built = build(lowered, "packed")
    packed = {one.layer for one in lowered.decisions if is_packed(one.form)} - activations.layers(model)
    if how.plugin or how.forms != "smallest" or not packed:
        return lowered, built
    floats = lower(model, dataclasses.replace(how, forms="floats"))
    try:
        other = build(floats, "floats")
    except ExportError as error:
        refused = f"with floats no engine is built: {error.what}"
        return _told(lowered, packed, lambda reason: f"{reason}; {refused}"), built
    sizes = built.engine.stat().st_size, other.engine.stat().st_size
    faster, timed = better((lowered, built), (floats, other)) if better else (None, "")
    both = f"built both ways, the engine takes {sizes[0]} bytes with packed weights, {sizes[1]} with floats"
    both = f"{both}; {timed}" if timed else both
    if faster == 1 or (faster is None and sizes[1] < sizes[0]):
        return _told(floats, packed, lambda _: both), other
    return _told(lowered, packed, lambda reason: f"{reason}; {both}"), built


def _told(lowered: Lowered, layers: Container[str], change: Callable[[str], str]) -> Lowered:
    """Change the reasons that are given for some layers."""
    told = (
        dataclasses.replace(one, reason=change(one.reason)) if one.layer in layers else one for one in lowered.decisions
    )
    return dataclasses.replace(lowered, decisions=tuple(told))


def _better(model: Model, order: Order) -> Better:
    """Return what times engines of an order, or says why they are not timed here."""
    here = tensorrt_library.capability()
    if not here:
        return lambda *_: (None, "not timed: there is no GPU here")
    if order.sm and here not in order.sm:
        return lambda *_: (None, f"not timed: the GPU here ({here}) is none that it is for")
    judge = tensorrt_time.Judge(capability=here, inputs=model.inputs, sizes=order.sizes)

    def better(first: Pair, second: Pair) -> tuple[int | None, str]:
        return judge.judge([(pair[1].engine.read_bytes(), _described(model, order, pair)) for pair in (first, second)])

    return better


def _built(model: Model, order: Order, lowered: Lowered, graph: Path) -> Built:
    """Build an engine of a graph that is written to `graph`, in a new folder."""
    options, folder = order.options, graph.parent
    folder.mkdir()
    save(lowered.proto, graph)
    job = tensorrt_build.Job(
        library=order.library,
        onnx=graph,
        shapes=tensorrt_profile.shapes(model.inputs, order.sizes),
        sm=order.sm if order.library.name == "rtx" else (),
        timing_cache=options.timing_cache,
        memory_bytes=options.memory_bytes,
        plugin=folder / "kernels" if options.plugin else None,
    )
    if job.plugin is not None:
        tensorrt_plugin.write_kernels(lowered.proto, job.plugin)
    (work := folder / "build").mkdir()
    return tensorrt_build.build(job, work)


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph, with weights beside it where they are too many for one file."""
    total = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if total <= EXTERNAL_BYTES:
        onnx.save(proto, path)
    else:
        ir.save(ir.from_proto(proto), path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def _metadata(model: Model, made: Path, order: Order, results: Pair) -> tensorrt_engine.Metadata:
    cache, written = order.options.timing_cache, results[1].timing_cache
    return dataclasses.replace(
        _described(model, order, results),
        size_bytes=made.stat().st_size,
        onnx_sha256=mark(tensorrt_engine.onnx_path(made)),
        engine_sha256=file_sha256(made),
        timing_cache_read_sha256=file_sha256(cache) if cache and cache.is_file() else None,
        timing_cache_sha256=file_sha256(written) if written else None,
    )


def _described(model: Model, order: Order, results: Pair) -> tensorrt_engine.Metadata:
    """Return the metadata of an engine without what is said of its files."""
    (lowered, built), options = results, order.options
    return tensorrt_engine.Metadata(
        library=order.library.name,
        version=order.library.version,
        compute_capability=order.sm or (tensorrt_engine.PORTABLE,),
        precision=options.precision,
        plugin=options.plugin,
        fp8=options.fp8,
        opset=options.opset,
        profile={name: sizes.as_list() for name, sizes in order.sizes.items()},
        inputs=[{"name": s.name, "shape": list(s.shape), "dtype": s.dtype} for s in model.inputs],
        outputs=[value.name for value in lowered.proto.graph.output],
        layers=built.layers,
        size_bytes=0,
        onnx_sha256="",
        engine_sha256="",
        decisions=[dataclasses.asdict(decision) for decision in lowered.decisions],
    )


def _put(order: Order, path: Path, built: Built) -> None:
    """Move what was made beside its final name; weights of an older ONNX file go."""
    cache = order.options.timing_cache
    if cache and built.timing_cache:
        beside = cache.with_name(f".{cache.name}.new")
        beside.write_bytes(built.timing_cache.read_bytes())
        beside.replace(cache)
    made, graph = order.folder / path.name, tensorrt_engine.onnx_path(path)
    data = made.with_name(f"{graph.name}.data")
    if data.exists():
        data.replace(path.with_name(data.name))
    else:
        path.with_name(data.name).unlink(missing_ok=True)
    for name in (graph.name, tensorrt_engine.metadata_path(path).name, path.name):
        made.with_name(name).replace(path.with_name(name))
