"""Bytes of the engines that TensorRT-RTX builds of every network in every form, without a GPU: no speed is measured.

    .venv/bin/python tests/real/tensorrt_table.py real [NETWORK ...]    the real checkpoints
    .venv/bin/python tests/real/tensorrt_table.py zoo [NETWORK ...]     the networks of tests/zoo
    .venv/bin/python tests/real/tensorrt_table.py layers                single products, dense against codebooks
    .venv/bin/python tests/real/tensorrt_table.py equal [NETWORK ...]   what the graphs compute, in onnxruntime

Writes bench/results/tensorrt_<what>.json; rows of networks that are not named stay in it. Each engine is for SM86 and
any batch of 1 to 32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from paredown.exporters import onnx as onnx_target
from paredown.exporters import tensorrt_build, tensorrt_library, tensorrt_profile, tensorrt_rounding
from paredown.exporters.difference import difference
from paredown.exporters.tensorrt_build import Built
from paredown.exporters.tensorrt_graph import GraphOptions, Lowered, lower
from paredown.exporters.tensorrt_integer import symmetric
from paredown.exporters.tensorrt_write import best, save
from paredown.optimizer import data, planning, quantize, recipe
from paredown.optimizer.codes import Format
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import Error
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.quantizers import kmeans, uniform
from paredown.optimizer.residual import Residual
from paredown.optimizer.steps import Ground, Hooks
from paredown.optimizer.walk import trace

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "bench" / "results"
SM = ("8.6",)
SAMPLES = 16
BATCH = 2
SIZES = {"height": "32:64:96", "width": "32:64:96"} | dict.fromkeys(("time", "seq", "queries", "keys"), "8:16:32")
"""Of dimensions beside the batch; bytes of an engine hardly depend on them."""
FORMS: Mapping[str, tuple[Any, Any]] = {
    "int8 Q/DQ": (uniform, {"bits": 8, "activations": "int8"}),
    "int4 uniform": (uniform, {"bits": 4}),
    "codebook 4": (kmeans, {"bits": 4}),
    "codebook 3": (kmeans, {"bits": 3}),
    "codebook 2": (kmeans, {"bits": 2}),
    "codebook 4 + rank 4": (kmeans, {"bits": 4, "residual": Residual(rank=4, bits=8)}),
}


def main() -> None:
    what, *names = sys.argv[1:]
    rows = {"real": _real, "zoo": _zoo, "layers": _layers, "equal": _equal}[what](names)
    path, found = RESULTS / f"tensorrt_{what}.json", list[dict[str, Any]]()
    if names and path.is_file():
        found = [row for row in json.loads(path.read_text()) if row["network"] not in names]
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def _real(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for file in sorted((HERE / "recipes").glob("*.yaml")):
        if not names or file.stem in names:
            job = planning.load(recipe.read(file, [f"data.samples={SAMPLES}"]))
            yield from _rows(file.stem, job.model, job.calibration)


def _equal(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield how far the graph of each form is from the portable file, and what float16 does to the dense one."""
    for file in sorted((HERE / "recipes").glob("*.yaml")):
        if names and file.stem not in names:
            continue
        job = planning.load(recipe.read(file, [f"data.samples={SAMPLES}"]))
        for form, (quantizer, fields) in {"dense": (None, {}), **FORMS}.items():
            model = job.model if quantizer is None else _quantized(job.model, job.calibration, quantizer, fields)
            row = {"network": file.stem, "form": form, "difference": _difference(model, job.calibration)}
            yield row | (_rounded(model) if quantizer is None else {})


def _rounded(model: Model) -> dict[str, Any]:
    """Return what float16 does to the outputs of a dense graph, and which modules stay float32 for it."""
    found = tensorrt_rounding.measure(model, GraphOptions(precision="fp16"))
    names = list(found.keep)
    return {"fp16_error": found.error, "fp16_error_before": found.before, "float32_by_measure": names}


def _difference(model: Model, calibration: Calibration) -> float:
    """Return the largest difference of an output between both files, over its largest value, on real inputs."""
    exact = symmetric(replace(model, dynamic=frozenset()))
    inputs = data.rebatch(calibration, BATCH).batches[0]
    feeds = {spec.name: x.numpy(force=True) for spec, x in zip(model.inputs, inputs, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        portable, graph = Path(folder) / "portable.onnx", Path(folder) / "graph.onnx"
        onnx_target.export(exact, portable)
        save(lower(model, GraphOptions(precision="fp32", forms="stored")).proto, graph)
        pairs = zip(_outputs(portable, feeds), _outputs(graph, feeds), strict=True)
        return max(difference(want, have)[1] for want, have in pairs)


def _outputs(path: Path, feeds: Mapping[str, Any]) -> list[Any]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.disable_quant_qdq", "1")  # floats between grids, as in the graph
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def _zoo(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(HERE.parent))
    from zoo.nets import NETS

    for net in NETS:
        if names and net.name not in names:
            continue
        model = net.model()
        yield from _rows(net.name, model, data.batches(net.batch(SAMPLES, seed=4), model.inputs, SAMPLES))


def _layers(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for size in (256, 512, 1024, 2048):
        module = nn.Sequential(nn.Linear(size, size))
        inputs = (InputSpec(name="x", shape=("batch", size)),)
        model = from_module(module, inputs, Source(entry="layers"))
        yield from _rows(f"{size} x {size}", model, data.batches((torch.randn(SAMPLES, size),), inputs, SAMPLES))


def _rows(network: str, model: Model, calibration: Calibration) -> Iterator[dict[str, Any]]:
    dense = {precision: _built(model, GraphOptions(precision=precision)) for precision in ("fp32", "fp16")}
    for precision, row in dense.items():
        yield {"network": network, "form": f"dense {precision}", **row}
    bytes_of = {f"dense_{precision}_bytes": row["engine_bytes"] for precision, row in dense.items()}
    for form, (quantizer, fields) in FORMS.items():
        try:
            small = _quantized(model, calibration, quantizer, fields)
        except Error as error:
            yield {"network": network, "form": form, "error": str(error)}
            continue
        for choice in ("stored", "smallest"):
            row = _built(small, GraphOptions(forms=choice))  # "smallest" is built both ways, as by the export
            yield {"network": network, "form": form, "choice": choice, **row, **bytes_of}


def _quantized(model: Model, calibration: Calibration, quantizer: Any, fields: Mapping[str, Any]) -> Model:
    fields = dict(fields)
    activations = fields.pop("activations", "float")
    spec = quantize.Spec(
        quantizer=quantizer.__name__.rpartition(".")[2],
        activations=activations,
        feedback=False,
        correct_bias=False,
        reestimate=False,
    )
    ground = Ground(graph=trace(model.module(), calibration.batches[:1]).graph, calibration=calibration)
    decisions = quantize.plan(model, spec, (quantizer.Spec(format=Format(**fields)),), ground)
    return quantize.apply(model, spec, decisions, calibration, Hooks()).model


def _built(model: Model, options: GraphOptions) -> dict[str, Any]:
    """Return bytes and seconds of an engine, how it holds the weights, or why there is none."""
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            lowered, built = best(model, options, lambda found, name: _engine(model, found, Path(folder) / name))
            return {**_row(lowered, built), "seconds": round(time.monotonic() - start, 1)}
    except Error as error:
        return {"engine_bytes": None, "error": str(error)}


def _engine(model: Model, lowered: Lowered, folder: Path) -> Built:
    named = {size for spec in model.inputs for size in spec.shape if isinstance(size, str)}
    sizes = tensorrt_profile.parse([f"{name}={SIZES[name]}" for name in sorted(named & SIZES.keys())])
    (work := folder / "build").mkdir(parents=True)
    save(lowered.proto, graph := folder / "net.onnx")
    job = tensorrt_build.Job(
        library=tensorrt_library.find("rtx"),
        onnx=graph,
        shapes=tensorrt_profile.shapes(model.inputs, tensorrt_profile.complete(model.inputs, sizes)),
        sm=SM,
    )
    return tensorrt_build.build(job, work)


def _row(lowered: Lowered, built: Built) -> dict[str, Any]:
    return {
        "engine_bytes": built.engine.stat().st_size,
        "onnx_bytes": lowered.proto.ByteSize(),
        "kept": sum(decision.kept for decision in lowered.decisions),
        "fallback": sum(not decision.kept for decision in lowered.decisions),
        "forms": dict(sorted(Counter(one.form for one in lowered.decisions).items())),
    }


if __name__ == "__main__":
    main()
