"""A GPU for our operators on onnxruntime's CUDA provider: a driver that takes notes, or runs kernels in emulation."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paredown.kernels import layout
from paredown.kernels.cuda import cubins, launch, sources, units
from paredown.kernels.lut_spec import LutSpec

from .cuda_emulation import Emulator
from .ort_mock import BFLOAT16, FLOAT, FLOAT16, UINT8, Mock, Node, Value
from .ort_models import Case, Layer, Stored

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
KINDS = {"float32": FLOAT, "float16": FLOAT16, "bfloat16": BFLOAT16}
ELEMENTS = {torch.uint8: UINT8, torch.float32: FLOAT, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
ARCHITECTURES = {"sm_80": (12, 0), "sm_86": (12, 0), "sm_87": (12, 0), "sm_90a": (12, 0), "sm_110": (13, 0)} | {
    cubins.VIRTUAL: (12, 6)
}
"""What the cubins beside the library are for, and from which driver on."""
STREAM = 12345


@dataclass(frozen=True, slots=True)
class Start:
    """A launch as the driver saw it; arguments by name, pointers as addresses."""

    name: str
    sizes: tuple[int, ...]
    stream: int
    arguments: dict[str, int]


@dataclass(slots=True)
class Gpu:
    """A copy of our library beside cubins, with a driver of its own (or none), and what was launched.

    Kernels run where there is an emulator for them.
    """

    folder: Path
    fake: ctypes.CDLL | None
    mock: Mock = field(default_factory=Mock)
    starts: list[Start] = field(default_factory=list)
    emulator: Emulator | None = None
    kept: list[object] = field(default_factory=list)

    def open(self) -> None:
        """Register the operators, and be told of launches from now on."""
        types = (ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
        hook = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *types)(self._launched)
        self.kept.append(hook)
        if self.fake is not None:
            address = ctypes.cast(hook, ctypes.c_void_p).value
            ctypes.c_void_p.in_dll(self.fake, "paredown_fake_launch").value = address
        if not self.mock.operators:
            self.mock.register(self.folder / "libparedown.so")

    def memory(self) -> dict[int, int]:
        """Return the bytes at each address that is allocated."""
        assert self.fake is not None
        self.fake.paredown_fake_memory.restype = ctypes.POINTER(ctypes.c_size_t)
        found = self.fake.paredown_fake_memory()
        return {found[2 * i]: found[2 * i + 1] for i in range(1024) if found[2 * i]}

    def buffers(self) -> dict[int, int]:
        """Return all that kernels of a run may touch: memory of the device, x, t and y."""
        arrays = [value.array for value in self.mock.inputs if value is not None]
        arrays += [] if self.mock.output is None else [self.mock.output]
        return self.memory() | {array.ctypes.data: array.nbytes for array in arrays}

    def _launched(self, function: bytes, sizes: Sequence[int], stream: int, arguments: Sequence[int]) -> None:
        name = function.decode()
        names = launch.ARGUMENTS.get(name.removeprefix("paredown_"), launch.ARGUMENTS["linear"])
        values = {}
        for i, argument in enumerate(names):
            kind = ctypes.c_size_t if argument in launch.POINTERS else ctypes.c_int32
            values[argument] = kind.from_address(arguments[i]).value
        start = Start(name, tuple(sizes[i] for i in range(7)), stream or 0, values)
        self.starts.append(start)
        if self.emulator is not None:
            self._emulate(self.emulator, start)

    def _emulate(self, emulator: Emulator, start: Start) -> None:
        buffers = self.buffers()
        absent = torch.zeros(64)
        given: dict[str, Tensor | int] = {}
        for name, value in start.arguments.items():
            given[name] = value
            if name in launch.POINTERS:
                given[name] = absent if value == 0 else _at(value, buffers)
        unit = "prepare.cu" if start.name.removeprefix("paredown_") in launch.ARGUMENTS else _unit_of(start.name)
        how = launch.Launch(
            unit=unit, name=start.name, grid=start.sizes[:3], block=start.sizes[3:6], shared=start.sizes[6]
        )
        emulator.run(how, given)


def _unit_of(name: str) -> str:
    kind, bits = name.split("_")[-2:]
    return sources.unit_of(kind, int(bits[1:]))


def _at(address: int, buffers: Mapping[int, int]) -> Tensor:
    """Return the bytes from an address to the end of the buffer that holds it."""
    begin = max((start for start in buffers if start <= address), default=0)
    left = begin + buffers.get(begin, 0) - address
    assert left > 0, "a pointer is outside of all buffers"
    return torch.frombuffer((ctypes.c_uint8 * left).from_address(address), dtype=torch.uint8)


def write_cubins(folder: Path, **changed: object) -> None:
    """Put cubins of every unit, PTX and their manifest beside the library; a file starts with its architecture."""
    place = folder / "cuda" / "cubin"
    place.mkdir(parents=True, exist_ok=True)
    entries = []
    for unit in sources.UNITS:
        for target, driver in ARCHITECTURES.items():
            name = f"{Path(unit).stem}.{target}"
            (place / name).write_bytes(head(target).encode() + b"\0")
            entry = {"file": name, "unit": unit, "architecture": target, "compiler": "none", "generation": 12}
            entries.append(entry | {"driver": list(driver), "digest": units.digest(units.read(unit))} | changed)
    (place / cubins.MANIFEST).write_text(json.dumps(entries, indent=1) + "\n")


def head(architecture: str) -> str:
    """Return the first 4 characters of a file, which the driver notes."""
    return architecture.removeprefix("sm_")[:4].ljust(4)


_driver: list[ctypes.CDLL] = []


def fake_driver(folder: Path) -> ctypes.CDLL:
    """Compile and load fake_cuda.c as libfake.so.1, once in a process: the loader knows a library by that name."""
    if not _driver:
        _driver.append(_compiled_driver(folder))
    return _driver[0]


def _compiled_driver(folder: Path) -> ctypes.CDLL:
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C compiler for the driver that takes notes")
    made, source = folder / "libfake.so", Path(__file__).with_name("fake_cuda.c")
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,libfake.so.1"]
    subprocess.run([compiler, *options, "-o", made, source], check=True)
    return ctypes.CDLL(str(made))


def copy_library(library: Path, folder: Path, driver: bytes = b"libfake.so.1") -> Path:
    """Copy the library to a folder, with cubins, and return the folder.

    The copy asks for a driver of another name, since the real one could be in this process too.
    """
    data = library.read_bytes()
    assert data.count(b"libcuda.so.1\0") == 1
    (folder / "libparedown.so").write_bytes(data.replace(b"libcuda.so.1", driver))
    write_cubins(folder)
    return folder


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of a layer on the GPU."""

    gpu: Gpu
    operator: int
    handle: int
    case: Case

    def run(self, x: Tensor, t: Tensor | None) -> Tensor:
        """Return y; all inputs but x and t are in host memory, and stay out of reach of a run."""
        low = [] if t is None else [tensor_value(t), None, None, None]
        inputs = [tensor_value(x), None, None, None, None, *low]
        y = self.gpu.mock.compute(self.operator, self.handle, inputs, KINDS[self.case.dtype])
        return torch.from_numpy(y).view(getattr(torch, self.case.dtype))

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.gpu.mock.destroy(self.operator, self.handle)


def tensor_value(tensor: Tensor) -> Value:
    """Return a tensor as onnxruntime has it."""
    whole = tensor.contiguous()
    octets = whole.view(torch.uint16) if whole.dtype in (torch.float16, torch.bfloat16) else whole
    return Value(kind=ELEMENTS[tensor.dtype], array=octets.numpy())


def make(gpu: Gpu, one: Layer, **changed: object) -> Kernel:
    """Make the kernel of a layer; `changed` are other members of its node."""
    case = one.case
    attributes: dict[str, int | float | str] = {"n": case.spec.n, "k": case.spec.k, "layout": "c16"}
    attributes |= one.weight.attributes()
    constants: list[Value | None] = [None, *map(tensor_value, (*one.weight.parts, one.bias))]
    types = [KINDS[case.dtype], *(value.kind for value in constants[1:] if value is not None)]
    if one.left is not None:
        attributes |= one.left.attributes("left_") | {"rank": case.rank}
        left = [tensor_value(part) for part in one.left.parts]
        constants, types = [*constants, None, *left], [*types, KINDS[case.dtype], *(value.kind for value in left)]
    node = replace(Node(name="layer", attributes=attributes, constants=constants, types=types), **changed)
    operator = gpu.mock.operators[case.op, KINDS[case.dtype], CUDA]
    return Kernel(gpu, operator, gpu.mock.create(operator, node), case)


def draw_inputs(case: Case, m: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Return m rows of x and of t, if the case has it."""
    rng, dtype = torch.Generator().manual_seed(seed), getattr(torch, case.dtype)
    t = torch.randn(m, case.rank, generator=rng).to(dtype) if case.rank else None
    return torch.randn(m, case.spec.k, generator=rng).to(dtype), t


def quick_layer(case: Case, seed: int) -> Layer:
    """Return a layer of random numbers, without its values; `ort_models.layer` decodes them one by one.

    Scales of an odd seed are not all float16, unless that is their type.
    """
    rng = np.random.default_rng(seed)
    low = LutSpec(n=case.spec.n, k=max(1, case.rank), bits=8, zero=128.0, unit=1 / 127)
    bias = torch.from_numpy(rng.standard_normal(case.spec.n if case.biased else 1) * case.biased)
    shape = case.spec.scale_shape
    scale = torch.from_numpy(rng.uniform(1e-9, 2.0, shape) if seed % 2 else rng.integers(1, 9, shape) / 64)
    return Layer(
        case=case,
        weight=_quick_weight(case.spec, rng, scale, case),
        left=_quick_weight(low, rng, torch.full(low.scale_shape, 0.25), Case(spec=low)) if case.rank else None,
        bias=bias.to(getattr(torch, case.dtype)),
    )


def _quick_weight(spec: LutSpec, rng: np.random.Generator, scale: Tensor, case: Case) -> Stored:
    table = torch.from_numpy(rng.integers(0, 256, spec.table_shape, np.uint8))
    if case.table != torch.uint8:
        table = torch.from_numpy(rng.standard_normal(spec.table_shape)).to(case.table)
    return Stored(
        spec=spec,
        codes=layout.pack(torch.from_numpy(rng.integers(0, 2**spec.bits, (spec.n, spec.k), np.uint8)), spec),
        table=table,
        scale=layout.pack_scale(scale.to(case.scale), spec),
        values=np.empty(0),
    )
