"""The process in which an engine is built: it reads a job from a file, and writes the engine and an answer beside it.

TensorRT may run out of memory, abort or be killed; then this process ends, and `tensorrt_build` says why.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, cast

from . import tensorrt_library
from .board import plugin_aot
from .tensorrt_api import Builder, IBuilderConfig, OnnxParser, RtxIBuilderConfig

JOB, ANSWER = "job.json", "answer.json"
ENGINE, TIMING_CACHE = "engine", "timing.cache"
_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def main(folder: Path) -> None:
    """Build what `folder`/job.json asks for, and write `folder`/answer.json."""
    job: dict[str, Any] = json.loads((folder / JOB).read_text())
    _end_with(job["parent"])
    if job["memory_bytes"]:
        _limit_memory(job["memory_bytes"])
    (folder / ANSWER).write_text(json.dumps(build(job, folder)))


def build(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Build one engine; return {"layers", "inputs"}, {"refused": parser errors} or {"failed": what failed}."""
    trt = tensorrt_library.module(job["library"])
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if job["plugin"] is not None:
        plugin_aot.register(Path(job["plugin"]))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        return {"refused": _refusals(parser)}
    config = builder.create_builder_config()
    _profile(builder, config, job["shapes"])
    if job["sm"]:
        _capabilities(cast(RtxIBuilderConfig, config), job["sm"])
    if job["timing_cache"] is not None and not _use_timing_cache(config, job["timing_cache"]):
        return {"failed": "timing cache"}
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"failed": "build"}
    (folder / ENGINE).write_bytes(memoryview(plan))
    if job["timing_cache"] is not None:
        (folder / TIMING_CACHE).write_bytes(memoryview(config.get_timing_cache().serialize()))
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    return {"layers": network.num_layers, "inputs": names}


def _refusals(parser: OnnxParser) -> list[dict[str, str]]:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [{"node": e.node_name(), "operator": e.node_operator(), "reason": e.desc()} for e in errors]


def _profile(builder: Builder, config: IBuilderConfig, shapes: dict[str, list[list[int]]]) -> None:
    if not shapes:
        return
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, least, usual, most)
    if config.add_optimization_profile(profile) < 0:
        raise ValueError(f"the optimization profile is refused: {shapes}")


def _capabilities(config: RtxIBuilderConfig, wanted: list[str]) -> None:
    known = tensorrt_library.rtx_module().ComputeCapability.__members__
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        if not config.set_compute_capability(known[f"SM{name.replace('.', '')}"], index):
            raise ValueError(f"the compute capability {name} is refused")


def _use_timing_cache(config: IBuilderConfig, path: str) -> bool:
    """Read the cache of a file, or begin one; whether it is of this library and GPU."""
    cache = config.create_timing_cache(Path(path).read_bytes() if path else b"")
    return cache is not None and config.set_timing_cache(cache, False)


def _end_with(parent: int) -> None:
    """Let this process end when its parent does, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
        if os.getppid() != parent:
            sys.exit(1)


def _limit_memory(most: int) -> None:
    """Bound the private memory; not the address space, of which CUDA reserves far more than it uses."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # stderr is what a failure is explained from
    main(Path(sys.argv[1]))
