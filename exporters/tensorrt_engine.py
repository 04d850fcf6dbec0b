"""An engine on disk and in a runtime: the metadata beside it, whether it fits what is installed here, running it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..optimizer.artifact import mark
from ..optimizer.errors import ExportError, InputError, RuntimeMissingError
from ..optimizer.model import InputSpec
from ..optimizer.workspace import file_sha256
from . import tensorrt_library
from .tensorrt_api import ICudaEngine, IExecutionContext, TensorRT
from .tensorrt_library import NO_GPU, TITLES, Name

SCHEMA = "paredown.engine/1"
PORTABLE = "portable"
"""The compute capability of an engine of TensorRT-RTX that is for none in particular."""
AGAIN = "export it again"
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What an engine was made of and for, kept as JSON beside it.

    compute_capability: "8.7", or PORTABLE. profile: least, usual and largest size of each named dimension.
    timing_cache_sha256: of the cache that was read, and of that written back; None without one.
    decisions: what became of each layer, and why. plugin: whether kernels of ours are embedded. fp8: whether layers
    between int8 grids compute in floats of 8 bits.
    """

    library: Name
    version: str
    compute_capability: tuple[str, ...]
    precision: str
    opset: int
    profile: Mapping[str, Sequence[int]]
    inputs: Sequence[Mapping[str, Any]]
    outputs: Sequence[str]
    layers: int
    size_bytes: int
    onnx_sha256: str
    engine_sha256: str
    timing_cache_read_sha256: str | None = None
    timing_cache_sha256: str | None = None
    decisions: Sequence[Mapping[str, Any]] = ()
    plugin: bool = False
    fp8: bool = False

    def specs(self) -> tuple[InputSpec, ...]:
        return tuple(InputSpec(name=i["name"], shape=tuple(i["shape"]), dtype=i["dtype"]) for i in self.inputs)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n")


def metadata_path(engine: Path) -> Path:
    """Return where the metadata of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def onnx_path(engine: Path) -> Path:
    """Return where the ONNX file that an engine was built from lies."""
    return engine.with_suffix(".tensorrt.onnx")


def read_metadata(engine: Path) -> Metadata:
    """Return the metadata of an engine; ExportError where it is missing or is none."""
    path = metadata_path(engine)
    try:
        data = json.loads(path.read_text())
        if data.pop("schema") != SCHEMA:
            raise KeyError("schema")
        if data["library"] not in TITLES:
            raise ValueError(f"there is no library {data['library']}")
        return Metadata(**{**data, "compute_capability": tuple(data["compute_capability"])})
    except FileNotFoundError:
        what = "the metadata is missing, so that nothing says what the engine is for"
        raise ExportError(what, where=path.name, fix=AGAIN) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"this is no metadata of an engine ({error})", where=path.name, fix=AGAIN) from error


def check_files(engine: Path, metadata: Metadata) -> None:
    """Raise ExportError where the engine, or the ONNX file beside it, is not what the metadata was written for."""
    if file_sha256(engine) != metadata.engine_sha256:
        raise _stale(engine, f"it is not the file that {metadata_path(engine).name} was written for")
    graph = onnx_path(engine)
    if graph.exists() and mark(graph) != metadata.onnx_sha256:
        raise _stale(engine, f"{graph.name} has changed since it was built")


def check_machine(engine: Path, metadata: Metadata) -> None:
    """Raise where an engine cannot run here: another library, version or GPU, or none."""
    library = tensorrt_library.find(metadata.library)
    if library.version != metadata.version:
        built = f"{TITLES[metadata.library]} {metadata.version}"
        raise _stale(engine, f"it was built with {built}, installed is {library.version}")
    here = tensorrt_library.capability()
    if not here:
        fix = f"run it on a GPU of compute capability {' or '.join(metadata.compute_capability)}"
        fix = "run it on a machine with one" if PORTABLE in metadata.compute_capability else fix
        raise RuntimeMissingError(NO_GPU, where=engine.name, fix=fix)
    if here not in metadata.compute_capability and PORTABLE not in metadata.compute_capability:
        built = " and ".join(metadata.compute_capability)
        raise _stale(engine, f"it was built for compute capability {built}, this GPU has {here}")


def _stale(engine: Path, why: str) -> ExportError:
    return ExportError(f"the engine is stale: {why}", where=engine.name, fix=AGAIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an engine runs: the device of its tensors, and the stream, None where nothing is asynchronous."""

    device: torch.device
    stream: torch.cuda.Stream | None

    @property
    def handle(self) -> int:
        return 0 if self.stream is None else int(self.stream.cuda_stream)

    def wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def place() -> Place:
    """Return the first GPU with a stream of its own; RuntimeMissingError where torch cannot use one."""
    if not torch.cuda.is_available():
        what = f"torch {torch.__version__} uses no GPU here, and engines are run in its memory"
        raise RuntimeMissingError(what, fix="install a CUDA build of torch")
    device = torch.device("cuda", 0)
    return Place(device=device, stream=torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class EngineRunner:
    """An engine that is ready to run; inputs and outputs are copied between arrays and the GPU's memory."""

    def __init__(self, library: tuple[TensorRT, str], content: bytes, metadata: Metadata, place: Place) -> None:
        trt, title = library
        self._name, self._metadata, self._place = title, metadata, place
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine = self._runtime.deserialize_cuda_engine(content)
        context = engine.create_execution_context() if engine is not None else None
        if engine is None or context is None:
            fix = "export it again on this machine; its messages are above"
            raise ExportError("it does not load the engine", where=title, fix=fix)
        self._context: IExecutionContext = context
        self._engine: ICudaEngine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._dtypes = {name: _dtype(engine.get_tensor_dtype(name).name, name) for name in names}
        self._fed = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self._given = [name for name in metadata.outputs if name in self._dtypes]

    @property
    def name(self) -> str:
        return self._name

    @property
    def inputs(self) -> Sequence[InputSpec]:
        return tuple(spec for spec in self._metadata.specs() if spec.name in self._fed)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return one array per output, bfloat16 ones as float32; InputError where the feeds do not fit the inputs."""
        held = self._held(feeds)
        self._execute()
        return {name: _array(held[name]) for name in self._given}

    def seconds(self, feeds: dict[str, np.ndarray], runs: int) -> float:
        """Return what one of `runs` runs takes, all of the same feeds: inputs and outputs stay where they are."""
        held = self._held(feeds)
        start = time.perf_counter()
        for _ in range(runs):
            self._execute()
        taken = (time.perf_counter() - start) / runs
        del held  # until here, as the engine reads and writes there
        return taken

    def _held(self, feeds: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Bind inputs and outputs, and return the memory of all."""
        if feeds.keys() != self._fed:
            have, want = ", ".join(sorted(feeds)) or "none", ", ".join(sorted(self._fed))
            raise InputError(f"the engine takes the inputs {want}", where=f"feeds {have}", fix="pass exactly those")
        held = {name: self._feed(name, array) for name, array in feeds.items()}
        missing = self._context.infer_shapes()
        if missing:
            raise ExportError(f"the sizes of {', '.join(missing)} are not known before it runs", where=self._name)
        for name in self._given:
            held[name] = self._output(name)
        return held

    def _feed(self, name: str, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(array))
        where = f'input "{name}"'
        if tensor.dtype != self._dtypes[name]:
            have, want = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, self._dtypes[name]))
            raise InputError(f"dtype {have} was fed, the engine takes {want}", where=where)
        if not self._context.set_input_shape(name, tuple(tensor.shape)):
            ranges = ", ".join(f"{dim} {low} to {high}" for dim, (low, _, high) in self._metadata.profile.items())
            what = f"shape {list(tensor.shape)} was fed, the engine was built for {ranges or 'fixed sizes'}"
            raise InputError(what, where=where, fix="build it with another --profile")
        return self._bind(name, tensor.to(self._place.device))

    def _output(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise ExportError(f'the output "{name}" has no size before it runs: {list(shape)}', where=self._name)
        return self._bind(name, torch.empty(shape, dtype=self._dtypes[name], device=self._place.device))

    def _bind(self, name: str, tensor: Tensor) -> Tensor:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise ExportError(f'the memory of "{name}" is refused', where=self._name)
        return tensor

    def _execute(self) -> None:
        if self._place.stream is not None:  # the copies of the inputs were put on the stream of torch
            self._place.stream.wait_stream(torch.cuda.current_stream(self._place.device))
        if not self._context.execute_async_v3(self._place.handle):
            raise ExportError("it stopped while running the engine; its messages are above", where=self._name)
        self._place.wait()


def load(engine: Path, metadata: Metadata) -> EngineRunner:
    """Return an engine ready to run; ExportError or RuntimeMissingError where it is stale or cannot run here."""
    check_files(engine, metadata)
    check_machine(engine, metadata)
    return open_plan(engine.read_bytes(), metadata)


def open_plan(content: bytes, metadata: Metadata) -> EngineRunner:
    """Return the bytes of an engine ready to run; they must fit this machine, or the library may end the process."""
    trt, title = tensorrt_library.module(metadata.library), f"{TITLES[metadata.library]} {metadata.version}"
    return EngineRunner((trt, title), content, metadata, place())


def _dtype(name: str, tensor: str) -> torch.dtype:
    if name not in DTYPES:
        raise ExportError(f'"{tensor}" is of type {name}, which arrays do not have')
    return DTYPES[name]


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)
