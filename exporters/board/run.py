#!/usr/bin/env python3
"""Build, check and run the engine of this bundle, with TensorRT and numpy alone, in Python 3.8 and later.

    python3 run.py build [library|aot]           an engine for this GPU, into build/
    python3 run.py check [library|aot]           run it on the examples, and compare with onnxruntime's outputs
    python3 run.py run IN.npz OUT.npz [library|aot]
    python3 run.py bench [library|aot]           time each example, with and without transfers, by the host's clock
    python3 run.py capability                    the compute capability of this GPU, as 87

Without a word the graph of TensorRT's own operators is meant; library and aot are graphs with nodes of the plugin,
compiled to a library by build.sh, or embedded into the engine as PTX (TensorRT 10.9 and later).
Exit codes: 2 usage, 3 a file is missing or has changed, 6 building, running or comparing failed, 7 no GPU or library.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
USAGE, MISSING, FAILED, NO_RUNTIME = 2, 3, 6, 7
PLUGINS = ("library", "aot")
CUDART = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "/usr/local/cuda/lib64/libcudart.so")
TYPES = {"FLOAT": "float32", "HALF": "float16", "BOOL": "bool"}
TYPES.update({name.upper(): name for name in ("int8", "int32", "int64", "uint8")})
MAJOR, MINOR = 75, 76
"""Attributes of a device, as cuda.h numbers them."""
TO_DEVICE, TO_HOST = 1, 2
"""Directions of cudaMemcpy."""


class BoardError(Exception):
    """What was wrong and what to do, with the exit code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def read_settings() -> dict[str, Any]:
    """Return what the bundle was made for; every file of it must be as it was made."""
    listed = HERE / "SHA256SUMS"
    if not listed.is_file():
        raise BoardError(MISSING, "SHA256SUMS is missing; copy the bundle again")
    for line in listed.read_text().splitlines():
        digest, _, name = line.partition("  ")
        path = HERE / name
        if not path.is_file():
            raise BoardError(MISSING, f"{name} is missing; copy the bundle again")
        if file_digest(path) != digest:
            raise BoardError(MISSING, f"{name} has changed since the bundle was made; copy the bundle again")
    settings: dict[str, Any] = json.loads((HERE / "bundle.json").read_text())
    return settings


def file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


def engine_path(plugin: str) -> Path:
    return HERE / "build" / (f"model.{plugin}.engine" if plugin else "model.engine")


def graph_path(plugin: str) -> Path:
    path = HERE / ("model.plugin.onnx" if plugin else "model.onnx")
    if not path.is_file():
        raise BoardError(USAGE, f"this bundle has no layer for a plugin, README.md says why; leave out {plugin}")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    os.replace(str(beside), str(path))


class Cuda:
    """The CUDA runtime by ctypes; memory is freed with `close`."""

    def __init__(self) -> None:
        self._library = _load_cudart()
        self._held: list[ctypes.c_void_p] = []
        count = ctypes.c_int()
        if self._library.cudaGetDeviceCount(ctypes.byref(count)) or count.value < 1:
            raise BoardError(NO_RUNTIME, "there is no GPU here, or no driver for it")

    def capability(self) -> str:
        """Return "8.7" for an Orin."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("cudaDeviceGetAttribute", ctypes.byref(major), MAJOR, 0)
        self._check("cudaDeviceGetAttribute", ctypes.byref(minor), MINOR, 0)
        return f"{major.value}.{minor.value}"

    def allocate(self, count: int) -> int:
        """Return the address of memory on the GPU, aligned to 256 bytes."""
        pointer = ctypes.c_void_p()
        self._check("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(count, 1)))
        self._held.append(pointer)
        return int(pointer.value or 0)

    def upload(self, array: Any) -> int:
        address = self.allocate(array.nbytes)
        self._copy(ctypes.c_void_p(address), ctypes.c_void_p(array.ctypes.data), array.nbytes, TO_DEVICE)
        return address

    def download(self, array: Any, address: int) -> None:
        self._copy(ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(address), array.nbytes, TO_HOST)

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self._check("cudaStreamCreate", ctypes.byref(handle))
        return int(handle.value or 0)

    def wait(self, stream: int) -> None:
        self._check("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def close(self) -> None:
        while self._held:
            self._library.cudaFree(self._held.pop())

    def _copy(self, to: ctypes.c_void_p, origin: ctypes.c_void_p, count: int, kind: int) -> None:
        self._check("cudaMemcpy", to, origin, ctypes.c_size_t(count), kind)

    def _check(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            self._library.cudaGetErrorString.restype = ctypes.c_char_p
            text = self._library.cudaGetErrorString(status).decode()
            raise BoardError(FAILED, f"{name}: {text} ({status})")


def _load_cudart() -> ctypes.CDLL:
    tried = []
    for name in CUDART:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            tried.append(str(error))
    raise BoardError(NO_RUNTIME, f"the CUDA runtime does not load ({tried[0]}); install it, it comes with JetPack")


def load_tensorrt(settings: dict[str, Any]) -> Any:
    """Import TensorRT, of a version that the bundle is for."""
    try:
        trt = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        fix = "a Jetson has it with JetPack, in environments made with --system-site-packages"
        raise BoardError(NO_RUNTIME, f"TensorRT does not load: {error}; install it, {fix}") from error
    least, below = settings["tensorrt"]
    if not _numbers(least) <= _numbers(trt.__version__) < _numbers(below):
        text = f"TensorRT {trt.__version__} is installed, this bundle is for {least} and later, below {below}"
        raise BoardError(NO_RUNTIME, text)
    return trt


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def check_gpu(cuda: Cuda, settings: dict[str, Any]) -> str:
    """Return the compute capability of the GPU, which the bundle must be for."""
    here = cuda.capability()
    if here not in settings["capabilities"]:
        wanted = " and ".join(settings["capabilities"])
        text = f"this GPU has compute capability {here}, the bundle is for {wanted}; make one with another --target"
        raise BoardError(NO_RUNTIME, text)
    return here


def load_plugin(trt: Any, plugin: str, settings: dict[str, Any], phase: str) -> None:
    """Make the nodes of the plugin known; an engine with an embedded plugin needs nothing once it is built."""
    if plugin == "aot" and phase == "build":
        try:
            sys.path.insert(0, str(HERE))
            importlib.import_module("plugin_aot").register(HERE / "build" / "ptx")
        except (ImportError, AttributeError) as error:
            text = f"TensorRT {trt.__version__} embeds no plugins: {error}; use 10.9 or later, or library for aot"
            raise BoardError(NO_RUNTIME, text) from error
    if plugin != "library":
        return
    path = HERE / "build" / "libparedown_tensorrt.so"
    if not path.is_file():
        raise BoardError(MISSING, f"build/{path.name} is missing; run ./build.sh library")
    registry = trt.get_plugin_registry()
    name, version, space = settings["plugin"]["creator"]
    if registry.load_library(str(path)) is None or registry.get_creator(name, version, space) is None:
        raise BoardError(FAILED, f"TensorRT does not load {path.name}; run ./build.sh library again")


def build(plugin: str, settings: dict[str, Any]) -> None:
    """Build the engine and write it with what it was built of and for beside it."""
    graph = graph_path(plugin)
    trt, cuda = load_tensorrt(settings), Cuda()
    here = check_gpu(cuda, settings)
    load_plugin(trt, plugin, settings, "build")
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        refused = "; ".join(_refusals(parser))
        raise BoardError(FAILED, f"TensorRT {trt.__version__} refuses the graph: {refused}")
    config = builder.create_builder_config()
    if settings["shapes"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in settings["shapes"].items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BoardError(FAILED, f"TensorRT {trt.__version__} does not build the engine; its messages are above")
    path, content = engine_path(plugin), bytes(memoryview(plan))
    known = {"tensorrt": trt.__version__, "capability": here, "graph_sha256": file_digest(graph)}
    known["engine_sha256"] = hashlib.sha256(content).hexdigest()
    write_whole(path, content)
    write_whole(path.with_name(path.name + ".json"), (json.dumps(known, indent=1) + "\n").encode())
    size = len(content)
    sys.stdout.write(f"{path.name}: {size} bytes, TensorRT {trt.__version__}, compute capability {here}\n")


def _refusals(parser: Any) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reason = " ".join(error.desc().split())
        yield f"{error.node_name()}: {error.node_operator()}: {reason}"


class Engine:
    """An engine that is ready to run."""

    def __init__(self, plugin: str, settings: dict[str, Any]) -> None:
        self._numpy = importlib.import_module("numpy")
        path, trt = engine_path(plugin), load_tensorrt(settings)
        self._cuda = Cuda()
        _check_engine(path, graph_path(plugin), trt.__version__, check_gpu(self._cuda, settings))
        load_plugin(trt, plugin, settings, "run")
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._context: Any = self._engine.create_execution_context() if self._engine is not None else None
        if self._context is None:
            raise BoardError(FAILED, f"TensorRT does not load {path.name}; its messages are above")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self._stream = self._cuda.stream()

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Return one array per output."""
        if sorted(feeds) != sorted(self.inputs):
            wanted, given = ", ".join(self.inputs), ", ".join(sorted(feeds)) or "none"
            raise BoardError(USAGE, f"the engine takes the inputs {wanted}, given are {given}")
        try:
            for name, array in feeds.items():
                self._feed(name, array)
            missing = ", ".join(self._context.infer_shapes())
            if missing:
                raise BoardError(FAILED, f"the sizes of {missing} are not known before it runs")
            made = {name: self._output(name) for name in self.outputs}
            self._compute()
            for array, address in made.values():
                self._cuda.download(array, address)
            return {name: array for name, (array, _) in made.items()}
        finally:
            self._cuda.close()

    def _compute(self) -> None:
        start = time.perf_counter()
        if not self._context.execute_async_v3(self._stream):
            raise BoardError(FAILED, "TensorRT stopped while running the engine; its messages are above")
        self._cuda.wait(self._stream)
        self.compute_seconds = time.perf_counter() - start

    def timed(self, feeds: dict[str, Any]) -> tuple[float, float]:
        """Return the seconds of a run with transfers and without."""
        start = time.perf_counter()
        self.run(feeds)
        return time.perf_counter() - start, self.compute_seconds

    def _feed(self, name: str, array: Any) -> None:
        wanted = self._dtype(name)
        if str(array.dtype) != wanted:
            raise BoardError(USAGE, f'input "{name}" is of type {wanted}, given is {array.dtype}')
        if not self._context.set_input_shape(name, tuple(array.shape)):
            text = f'input "{name}": the engine was not built for shape {list(array.shape)}'
            raise BoardError(USAGE, f"{text}; make a bundle with another --profile")
        self._bind(name, self._cuda.upload(self._numpy.ascontiguousarray(array)))

    def _output(self, name: str) -> tuple[Any, int]:
        array = self._numpy.empty(tuple(self._context.get_tensor_shape(name)), self._dtype(name))
        address = self._cuda.allocate(array.nbytes)
        self._bind(name, address)
        return array, address

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise BoardError(FAILED, f'the memory of "{name}" is refused')

    def _dtype(self, name: str) -> str:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in TYPES:
            raise BoardError(FAILED, f'"{name}" is of type {kind}, which numpy does not have')
        return TYPES[kind]


def _check_engine(path: Path, graph: Path, version: str, capability: str) -> None:
    """Refuse an engine that is missing, or was built of or for something else."""
    beside = path.with_name(path.name + ".json")
    if not path.is_file() or not beside.is_file():
        raise BoardError(MISSING, f"build/{path.name} is missing; run ./build.sh")
    known = json.loads(beside.read_text())
    here = {"tensorrt": version, "capability": capability, "graph_sha256": file_digest(graph)}
    here["engine_sha256"] = file_digest(path)
    for name, value in here.items():
        if known.get(name) != value:
            text = f"build/{path.name} is stale ({name} was {known.get(name)}, is {value}); run ./build.sh again"
            raise BoardError(MISSING, text)


def use_examples(verb: str, plugin: str, settings: dict[str, Any]) -> None:
    """Compare or time the engine on every example of the bundle, by a function of examples.py."""
    sys.path.insert(0, str(HERE))
    found = getattr(importlib.import_module("examples"), verb)(Engine(plugin, settings), settings, HERE)
    if found:
        raise BoardError(FAILED, f"the engine does not compute what the model does: {found}")


def run(given: str, out: str, plugin: str, settings: dict[str, Any]) -> None:
    """Run the engine on the arrays of a file, and write its outputs to another."""
    numpy = importlib.import_module("numpy")
    if not Path(given).is_file():
        raise BoardError(MISSING, f"{given} is missing")
    try:
        arrays = dict(numpy.load(given))
    except Exception as error:  # zip, pickle, type: whatever a file of something else gives
        raise BoardError(MISSING, f"{given} holds no arrays; write it with numpy.savez") from error
    found = Engine(plugin, settings).run(arrays)
    beside = out + ".new"
    with open(beside, "wb") as file:
        numpy.savez(file, **found)
    os.replace(beside, out)


def main(arguments: Sequence[str]) -> None:
    """Run a command; BoardError where it cannot."""
    plugin = arguments[-1] if arguments and arguments[-1] in PLUGINS else ""
    words = list(arguments[:-1] if plugin else arguments)
    if words == ["capability"] and not plugin:
        sys.stdout.write(Cuda().capability().replace(".", "") + "\n")
    elif words == ["build"]:
        build(plugin, read_settings())
    elif words in (["check"], ["bench"]):
        use_examples(words[0], plugin, read_settings())
    elif len(words) == 3 and words[0] == "run":
        run(words[1], words[2], plugin, read_settings())
    else:
        raise BoardError(
            USAGE, "usage: run.py build|check|bench|run IN.npz OUT.npz [library|aot], or run.py capability"
        )


def status(arguments: Sequence[str]) -> int:
    """Run a command; return its exit code, with what was wrong on stderr."""
    try:
        main(arguments)
    except BoardError as error:
        sys.stderr.write(f"run.py: {error}\n")
        return error.code
    except MemoryError:
        sys.stderr.write("run.py: there is not enough memory; stop other programs\n")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(status(sys.argv[1:]))
