"""How an engine is proven equal to its model: at sizes of its profile, and by engines of prefixes where it is not.

An engine keeps no inner values. To see some, the part of its ONNX file that computes them is built as an engine of its
own, with a bounded number of them as outputs.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch.utils import _pytree as pytree

from ..optimizer.artifact import at_sizes
from ..optimizer.model import Model
from . import tensorrt_build, tensorrt_engine, tensorrt_library, tensorrt_plugin, tensorrt_profile
from .difference import difference
from .runner import Open, Runner, RunnerOptions, arrays
from .tensorrt_engine import PORTABLE, Metadata
from .tensorrt_integer import symmetric
from .tensorrt_profile import Sizes
from .tensorrt_rounding import plain_outputs
from .verify import SLACK, TOLERANCE, Graph, Spec, tolerance

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
AT_ONCE = 4
"""Values that one engine of a search gives out: they stay in memory together, and keep layers from being fused."""
ROWS = 3
"""Samples that an engine is compared on, where its profile has room for them."""


def spec(path: Path, model: Model) -> Spec:
    """Return how the engine at `path` is compared: the least size of its batch and ROWS, other sizes as usual."""
    metadata = tensorrt_engine.read_metadata(path)
    profile = {name: Sizes(*sizes) for name, sizes in metadata.profile.items()}
    batch = next(iter(profile.values()), None)
    batches = sorted({batch.least, min(max(ROWS, batch.least), batch.most)}) if batch else [1]
    sizes = {name: batches[-1] if i == 0 else known.usual for i, (name, known) in enumerate(profile.items())}
    inputs = at_sizes(model.inputs, sizes)
    graph = tensorrt_engine.onnx_path(path)
    dtype = DTYPES.get(metadata.precision)
    least = [tolerance(model, Spec()), *([TOLERANCE[dtype]] if dtype else [])]
    if metadata.fp8 and graph.is_file():
        least.append(SLACK * moved(model, graph, inputs))
    return Spec(
        batches=tuple(batches),
        rel=max(least) if len(least) > 1 else None,
        inputs=inputs,
        graph=Graph(path=graph, open_=opener(metadata), at_once=AT_ONCE) if graph.is_file() else None,
    )


def moved(model: Model, graph: Path, inputs: tuple[torch.Tensor, ...]) -> float:
    """Return how far floats of 8 bits move the outputs from those of int8 grids, as ONNX Runtime runs the graph."""
    fed = arrays(model.inputs, inputs)
    with torch.no_grad():
        leaves = [x for x in pytree.tree_leaves(model.module()(*inputs)) if isinstance(x, torch.Tensor)]
    pairs = zip(leaves, plain_outputs(graph, fed), strict=True)
    return max((difference(want.numpy(), value)[1] for want, value in pairs if want.is_floating_point()), default=0.0)


def truth(model: Model) -> Model:
    """Return the model that the lowering expresses, as one that torch can run."""
    return symmetric(replace(model, dynamic=frozenset()))


def opener(metadata: Metadata) -> Open:
    """Return what builds an ONNX file as the engine of `metadata` was built, and opens it; no file is left."""

    def open_(path: Path, options: RunnerOptions) -> Runner:
        proto = onnx.load(path, load_external_data=False)
        fed = {value.name for value in proto.graph.input}
        part = replace(
            metadata,
            inputs=[known for known in metadata.inputs if known["name"] in fed],
            outputs=[value.name for value in proto.graph.output],
        )
        sizes = {name: Sizes(*known) for name, known in metadata.profile.items()}
        with tempfile.TemporaryDirectory(prefix=".paredown-", dir=path.parent) as folder:
            kernels = Path(folder) / "kernels" if metadata.plugin else None
            if kernels is not None:
                tensorrt_plugin.write_kernels(proto, kernels)
            job = tensorrt_build.Job(
                library=tensorrt_library.find(metadata.library),
                onnx=path,
                shapes=tensorrt_profile.shapes(part.specs(), sizes),
                sm=_sm(metadata),
                plugin=kernels,
            )
            content = tensorrt_build.build(job, Path(folder)).engine.read_bytes()
        return tensorrt_engine.open_plan(content, part)

    return open_


def _sm(metadata: Metadata) -> tuple[str, ...]:
    if metadata.library != "rtx" or PORTABLE in metadata.compute_capability:
        return ()
    return tuple(metadata.compute_capability)
