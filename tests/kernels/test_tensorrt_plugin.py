"""The plugin for TensorRT without TensorRT or a GPU: compiled against a header of our own, called as TensorRT calls it,
with a driver that takes notes and kernels that run in emulation.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paredown.exporters.board import plugin_aot
from paredown.kernels.cuda import launch, sources
from paredown.kernels.lut_spec import Activation, LutSpec
from paredown.kernels.tensorrt import node

from .cuda_emulation import Emulator
from .ort_gpu import Gpu, copy_library, fake_driver
from .ort_mock import Mock, Value

HERE = Path(__file__).resolve().parent
STREAM, PROCESSORS = 4321, 20
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
INT32, HALF, BF16, FLOAT, LINEAR, CHW2 = 3, 1, 7, 0, 0, 1
"""DataType and TensorFormat of TensorRT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A linear layer as a node has it, and its parts as numpy knows them."""

    spec: LutSpec
    dtype: torch.dtype = torch.float16
    after: node.Epilogue = field(default_factory=node.Epilogue)
    table: torch.dtype = torch.uint8
    scale: torch.dtype = torch.float16

    def kind(self) -> launch.Kind:
        return node.kind(self.spec, self.dtype, self.table)


def drawn(layer: Layer, m: int) -> tuple[dict[str, Tensor], np.ndarray, int]:
    """Return random inputs of a node, what numpy computes of them in float64, and the type of the scales."""
    spec, after, seeded = layer.spec, layer.after, torch.Generator().manual_seed(m)
    codes = torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=seeded, dtype=torch.uint8)
    table = torch.randint(0, 256, spec.table_shape, generator=seeded, dtype=torch.uint8)
    entries = table if layer.table == torch.uint8 else torch.randn(spec.table_shape, generator=seeded).half()
    scale = (0.5 + torch.rand(spec.scale_shape, generator=seeded)).to(layer.scale)
    x, bias, t, left = (
        torch.randn(*shape, generator=seeded).to(layer.dtype)
        for shape in ((m, spec.k), (spec.n,), (m, max(after.rank, 1)), (spec.n, max(after.rank, 1)))
    )
    rows, columns = np.arange(spec.n)[:, None], np.arange(spec.k)
    block = rows // spec.table_rows if spec.table_rows else rows * 0
    values = entries.double().numpy()[block, codes.numpy()] - spec.zero
    w = values * spec.unit * scale.double().numpy()[rows, columns // spec.group if spec.group else columns * 0]
    y = x.double().numpy() @ w.T + (bias.double().numpy() if after.biased else 0.0)
    y = y + (t.double().numpy() @ left.double().numpy().T if after.rank else 0.0)
    parts = node.pack(codes, entries, scale, spec, layer.dtype)
    none = torch.zeros(1, dtype=layer.dtype)
    inputs = {"codes": parts.codes, "table": parts.table, "scale": parts.scale, "x": x, "x_scale": none}
    inputs |= {"bias": bias if after.biased else none, "low_x": t if after.rank else none}
    inputs["low"] = node.pack_left(left, layer.dtype) if after.rank else none
    return inputs, np.maximum(y, 0) if after.activation == "relu" else y, parts.scale_type


# --- the library and its GPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the plugin and what calls it against the header of the tests, beside cubins of all units."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("plugin not compiled: there is no g++")
    made = tmp_path_factory.mktemp("plugin")
    sources = [node.KERNELS / name for name in node.SOURCES]
    flags = ["-std=c++17", "-O1", "-g0", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{HERE / 'nvinfer'}"]
    command = [compiler, *flags, "-o", made / "whole.so", *sources, HERE / "tensorrt_harness.cpp", "-ldl"]
    subprocess.run(command, check=True)
    return copy_library(made / "whole.so", made)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def gpu(folder: Path, fake: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    for name in ("CAPABILITY", "DRIVER", "FAILURE", "LOG"):
        monkeypatch.delenv(f"PAREDOWN_FAKE_{name}", raising=False)
    monkeypatch.setenv("PAREDOWN_FAKE_PROCESSORS", str(PROCESSORS))
    made = Gpu(folder, fake, Mock(operators={("", 0, ""): 0}))
    made.open()
    yield made
    assert made.memory() == {}


@dataclass(frozen=True, slots=True)
class Plugin:
    """The compiled plugin, and the handle of one layer of it."""

    library: ctypes.CDLL
    handle: int

    def said(self) -> str:
        self.library.harness_said.restype = ctypes.c_char_p
        return str(self.library.harness_said().decode())

    def configure(self, shapes: Sequence[Sequence[int]]) -> tuple[int, int, int]:
        """Return workspace, rank and last size of the output."""
        rank, last = ctypes.c_int64(), ctypes.c_int64()
        self.library.harness_configure.restype = ctypes.c_int64
        found = self.library.harness_configure(
            ctypes.c_void_p(self.handle), sized(shapes), ctypes.byref(rank), ctypes.byref(last)
        )
        return found, rank.value, last.value

    def attach(self) -> Plugin | None:
        self.library.harness_attach.restype = ctypes.c_void_p
        handle = self.library.harness_attach(ctypes.c_void_p(self.handle))
        return Plugin(self.library, handle) if handle else None

    def destroy(self) -> None:
        self.library.harness_destroy(ctypes.c_void_p(self.handle))


def sized(shapes: Sequence[Sequence[int]]) -> ctypes.Array[ctypes.c_void_p]:
    rows = [(ctypes.c_int64 * (len(shape) + 1))(*shape, -1) for shape in shapes]
    made = (ctypes.c_void_p * len(rows))(*(ctypes.addressof(row) for row in rows))
    made._kept = rows  # type: ignore[attr-defined]
    return made


def create(folder: Path, attributes: dict[str, int]) -> Plugin:
    """Create, serialize and deserialize a layer; handle 0 where it is refused."""
    library = ctypes.CDLL(str(folder / "libparedown.so"))
    library.harness_create.restype = ctypes.c_void_p
    names = (ctypes.c_char_p * len(attributes))(*(name.encode() for name in attributes))
    values = (ctypes.c_int32 * len(attributes))(*attributes.values())
    return Plugin(library, library.harness_create(names, values, len(attributes)) or 0)


def octets(tensor: Tensor) -> Value:
    """Return where a tensor lies, for the emulator."""
    return Value(kind=0, array=tensor.flatten().view(torch.uint8).numpy())


def attributes_of(layer: Layer, scale_type: int = 1) -> dict[str, int]:
    return node.attributes(layer.spec, layer.kind(), scale_type, layer.after)


def run(gpu: Gpu, layer: Layer, m: int, rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return y of the plugin and of numpy; x has `rank` dimensions."""
    inputs, wanted, scale_type = drawn(layer, m)
    shapes = [list(inputs[name].shape) for name in launch.INPUTS]
    shapes[launch.INPUTS.index("x")][:0] = [1] * (rank - 2)
    made = create(gpu.folder, attributes_of(layer, scale_type))
    assert made.handle, made.said()
    workspace, *output = made.configure(shapes)
    assert (workspace >= 0, output) == (True, [rank, layer.spec.n]), made.said()
    context = made.attach()
    assert context is not None, made.said()
    scratch = torch.full((max(workspace, 1),), 165, dtype=torch.uint8)
    y = torch.full((m, layer.spec.n), torch.nan, dtype=layer.dtype)
    gpu.mock.inputs = [octets(tensor) for tensor in (*inputs.values(), scratch)]
    gpu.mock.output = y.view(torch.uint16).numpy()
    pointers = (ctypes.c_void_p * 8)(*(inputs[name].data_ptr() for name in launch.INPUTS))
    place = [ctypes.c_void_p(p) for p in (y.data_ptr(), scratch.data_ptr(), STREAM)]
    status = made.library.harness_run(ctypes.c_void_p(context.handle), sized(shapes), pointers, *place)
    assert status == 0, made.said()
    context.destroy()
    made.destroy()
    return y.double().numpy(), wanted


# --- what it starts, and what it computes


LAYER = Layer(spec=LutSpec(n=40, k=160, bits=4, group=32, zero=128.0, unit=0.01))
FULL = node.Epilogue(biased=True, rank=5, activation="relu")


@pytest.mark.parametrize("m", [1, 9, 17, 33, 300])
@pytest.mark.parametrize(("n", "k"), [(40, 160), (2560, 64), (128, 4096)])
def test_products_are_cut_and_started_as_launch_says(gpu: Gpu, m: int, n: int, k: int) -> None:
    layer = Layer(spec=LutSpec(n=n, k=k, bits=4, zero=128.0, unit=0.01), after=FULL)
    run(gpu, layer, m, rank=3)
    form = launch.choose(layer.spec, m, PROCESSORS)
    parts = launch.splits(layer.spec, m, form, PROCESSORS)
    how = [launch.linear(layer.spec, m, layer.kind(), form, parts)] + [launch.reduce(n, m)] * (parts > 1)
    assert [start.name for start in gpu.starts] == [one.name for one in how]
    assert [start.sizes for start in gpu.starts] == [(*one.grid, *one.block, one.shared) for one in how]
    assert {start.stream for start in gpu.starts} == {STREAM}
    told = gpu.starts[0].arguments
    wanted = attributes_of(layer)
    assert {name: told[name] for name in wanted if name in told} == {n: v for n, v in wanted.items() if n in told}
    assert (told["m"], set(told) - set(wanted)) == (m, {"m", "x_scale", *launch.POINTERS} & set(told))


CASES = {
    "bytes": (LAYER, 3),
    "all": (Layer(spec=LutSpec(n=33, k=96, bits=4, group=32, zero=128.0, unit=0.01), after=FULL), 17),
}
SLOW_CASES = {
    "halves": (Layer(spec=LutSpec(n=33, k=72, bits=3), table=torch.float16, after=FULL), 5),
    "bfloat16": (Layer(spec=LutSpec(n=64, k=136, bits=2, table_rows=32, zero=2.0), dtype=torch.bfloat16), 20),
    "scales": (Layer(spec=LutSpec(n=20, k=64, bits=4, zero=128.0, unit=0.01), scale=torch.float32, after=FULL), 2),
    "parts": (Layer(spec=LutSpec(n=20, k=2304, bits=4, zero=128.0, unit=0.01), after=FULL), 18),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_products_are_those_of_numpy(gpu: Gpu, emulator: Emulator, name: str) -> None:
    layer, m = (CASES | SLOW_CASES)[name]
    gpu.emulator = emulator
    y, wanted = run(gpu, layer, m)
    assert_close(y, wanted, layer)


def assert_close(y: np.ndarray, wanted: np.ndarray, layer: Layer) -> None:
    """Hold y to numpy by the rounding of its type and of sums in float32."""
    terms = layer.spec.k + layer.after.rank + 8
    size = np.abs(wanted).max() * math.sqrt(terms)
    allowed = ROUNDING[layer.dtype] * (np.abs(wanted) + np.abs(wanted).max()) + terms * 2.0**-23 * size
    assert (np.abs(y - wanted) <= allowed).all()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernel of all batch sizes, compiled for emulation."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("CUDA kernels not emulated: there is no g++")
    made = Emulator(tmp_path_factory.mktemp("bucket"))
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    defines = ["-DPAREDOWN_EMULATED", "-DPD_BULK=0", f"-I{HERE}", "-DPAREDOWN_BITS=4"]
    defines += ["-DPAREDOWN_KIND=KindF16B", "-DPAREDOWN_NAME=f16b"]
    source = ["-x", "c++", node.KERNELS / node.BUCKET]
    subprocess.run([compiler, *flags, *defines, "-o", made.folder / "bucket.0.so", *source], check=True)
    return made


@pytest.mark.parametrize("m", [1, 9, 17, 40])
def test_one_kernel_has_all_batch_sizes(bucket: Emulator, m: int) -> None:
    """Started as `plugin_aot` starts it: the grid of the smallest blocks, whatever m is."""
    layer = Layer(spec=LutSpec(n=150, k=96, bits=4, group=32, zero=128.0, unit=0.01), after=FULL)
    inputs, wanted, scale_type = drawn(layer, m)
    told = attributes_of(layer, scale_type)
    grid = (math.ceil(layer.spec.n / plugin_aot.ROWS), math.ceil(m / plugin_aot.TOKENS), 1)
    name = plugin_aot.kernel_name(told["kind"], 4)
    how = launch.Launch(unit="bucket", name=name, grid=grid, block=(plugin_aot.THREADS, 1, 1), shared=told["shared"])
    y = torch.full((m, layer.spec.n), torch.nan, dtype=layer.dtype)
    values = {name: told[name] for name in plugin_aot.NUMBERS if name != "m"}
    bucket.run(how, {**values, "m": m, **inputs, "y": y})
    assert_close(y.double().numpy(), wanted, layer)


def test_the_embedded_plugin_knows_the_kernel() -> None:
    assert plugin_aot.INPUTS == launch.INPUTS
    assert (*plugin_aot.INPUTS, *plugin_aot.NUMBERS, "y") == launch.ARGUMENTS["linear"]
    assert set(plugin_aot.ATTRIBUTES) <= set(attributes_of(LAYER))
    assert f"{node.NAMESPACE}::{node.OP}" == plugin_aot.OP
    assert node.KINDS[: len(plugin_aot.KINDS)] == plugin_aot.KINDS == tuple(node.CLASSES)
    sizes = (min(form.rows for form in node.BUCKETS), node.BUCKETS[-1].tokens, launch.THREADS)
    assert sizes == (plugin_aot.ROWS, plugin_aot.TOKENS, plugin_aot.THREADS)


@pytest.mark.parametrize(("kind", "bits"), [pair for pair in sources.LINEAR if pair[0] != "s8"])
def test_an_embedded_kernel_needs_no_leave_for_its_shared_memory(kind: launch.Kind, bits: int) -> None:
    assert node.shared(LutSpec(n=16, k=64, bits=bits), kind) <= 48 * 1024


# --- what it tells TensorRT


def test_types_and_formats_are_those_of_the_graph(gpu: Gpu) -> None:
    for dtype, number, other in ((torch.float16, HALF, BF16), (torch.bfloat16, BF16, HALF)):
        made = create(gpu.folder, attributes_of(Layer(spec=LAYER.spec, dtype=dtype)))

        def allows(at: int, kind: int, form: int = LINEAR, made: Plugin = made) -> bool:
            return bool(made.library.harness_supports(ctypes.c_void_p(made.handle), at, kind, form))

        words = [name in node.WORDS for name in launch.INPUTS] + [False]
        assert [allows(i, INT32) for i in range(9)] == words
        assert [allows(i, number) for i in range(9)] == [not word for word in words]
        assert not any(allows(i, kind) for i in range(9) for kind in (other, FLOAT))
        assert not any(allows(i, kind, CHW2) for i in range(9) for kind in (INT32, number))
        made.destroy()


def test_fields_are_attributes_of_the_node(folder: Path) -> None:
    library = ctypes.CDLL(str(folder / "libparedown.so"))
    library.harness_field.restype = ctypes.c_char_p
    names = [found.decode() for i in range(40) if (found := library.harness_field(i))]
    assert len(names) == 12
    assert set(names) <= set(attributes_of(LAYER))


def test_arguments_of_the_kernels_are_attributes() -> None:
    """A plugin finds all that kernels are told but for pointers and m."""
    told = set(launch.ARGUMENTS["linear"]) - launch.POINTERS - {"m"}
    assert told <= set(attributes_of(LAYER))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": None}, "an attribute is missing; export the model again"),
        ({"bits": 5}, "no kernel of kind 1 has codes of 5 bits"),
        ({"kind": 3}, "no kernel of kind 3 has codes of 4 bits"),
        ({"k": 161}, "an attribute is out of range"),
        ({"group": 8}, "an attribute is out of range"),
        ({"activation": 9}, "an attribute is out of range"),
    ],
)
def test_a_node_that_is_none_is_refused(gpu: Gpu, changed: dict[str, int | None], said: str) -> None:
    attributes = {name: value for name, value in {**attributes_of(LAYER), **changed}.items() if value is not None}
    made = create(gpu.folder, attributes)
    assert (made.handle, said in made.said()) == (0, True), made.said()


@pytest.mark.parametrize("name", ["codes", "table", "scale", "bias", "low"])
def test_inputs_of_another_size_are_refused(gpu: Gpu, name: str) -> None:
    layer = Layer(spec=LAYER.spec, after=FULL)
    inputs, _, scale_type = drawn(layer, 2)
    shapes = [list(inputs[key].shape) for key in launch.INPUTS]
    at = launch.INPUTS.index(name)
    shapes[at][0] -= 1
    made = create(gpu.folder, attributes_of(layer, scale_type))
    assert made.configure(shapes)[0] == -1
    assert f"input {at} has " in made.said()
    made.destroy()


def test_a_driver_that_fails_is_reported(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create(gpu.folder, attributes_of(LAYER))
    monkeypatch.setenv("PAREDOWN_FAKE_FAILURE", "cuModuleLoadData")
    assert made.attach() is None
    assert "cuModuleLoadData of linear_f16b_4.cu: CUDA_ERROR_ILLEGAL_ADDRESS" in made.said()
    made.destroy()


def test_a_gpu_without_cubins_is_told_how_to_get_them(
    gpu: Gpu, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "libparedown.so", tmp_path / "libparedown.so")
    monkeypatch.setattr(gpu, "folder", tmp_path)
    made = create(tmp_path, attributes_of(LAYER))
    assert made.attach() is None
    assert "there are no CUDA kernels beside the library; build them with" in made.said()
    made.destroy()


# --- what a plugin takes


def test_what_the_kernels_do_not_take_has_a_reason() -> None:
    spec = LutSpec(n=16, k=64, bits=4, zero=128.0)

    def reason(spec: LutSpec, dtype: torch.dtype = torch.float16) -> str:
        return node.refusal(spec, dtype, torch.uint8)

    assert reason(spec) == reason(spec, torch.bfloat16) == ""
    assert "float16 and bfloat16 exactly, not float32" in reason(spec, torch.float32)
    assert reason(LutSpec(n=16, k=64, bits=8, zero=128.0)).startswith("codes of 8 bits")
    assert "not read in place" in reason(LutSpec(n=16, k=63, bits=4, zero=128.0))
    assert "not read in place" in reason(LutSpec(n=16, k=64, bits=4, group=16, zero=128.0))


def test_activations_are_numbered_as_the_kernels_number_them() -> None:
    numbers = {}
    names: tuple[Activation, ...] = ("", "relu", "gelu", "gelu_tanh", "silu")
    for name in names:
        layer = Layer(spec=LAYER.spec, after=node.Epilogue(activation=name))
        numbers[name] = attributes_of(layer)["activation"]
    assert numbers == {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


@pytest.mark.slow
def test_the_source_compiles_for_an_orin(tmp_path: Path) -> None:
    """By nvcc, as an object with the target of Jetson Orin, without a warning."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("plugin not compiled by nvcc: there is none")
    flags = ["-std=c++17", "-arch=sm_87", "-c", f"-I{HERE / 'nvinfer'}", "-Werror", "all-warnings"]
    command = [nvcc, *flags, "-o", tmp_path / "plugin.o", node.KERNELS / node.SOURCES[0]]
    subprocess.run(command, check=True)
    assert (tmp_path / "plugin.o").read_bytes()[:4] == b"\x7fELF"
