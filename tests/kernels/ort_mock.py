"""An onnxruntime that has the CUDA provider but no GPU: as much of its C interface as the kernels of our library use.

Handles are numbers of Python objects, tensors lie in memory of numpy. A function that is not here aborts the test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Pointer: TypeAlias = Any
"""A pointer of ctypes, which has no type to name."""

FLOAT, UINT8, FLOAT16, BFLOAT16 = 1, 2, 10, 16
"""Element types of ONNX."""
HOST_INPUT = -2
"""OrtMemTypeCPUInput."""
MEMBERS, PLACES = 26, 300
NAME, PROVIDER, INPUT_TYPE, INPUTS, DESTROY, INPUT_MEMORY, CREATE, COMPUTE = 2, 3, 4, 5, 9, 12, 17, 18
"""Places in OrtCustomOp."""


class OrtError(Exception):
    """A status that is not success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A tensor: its ONNX element type, and bytes as numpy holds them (bfloat16 as uint16)."""

    kind: int
    array: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a kernel is made from. An input that is None is not constant; `types` are those of all inputs."""

    name: str
    attributes: Mapping[str, int | float | str]
    constants: Sequence[Value | None]
    types: Sequence[int]
    device: int = 0


@dataclass(slots=True)
class Mock:
    """An OrtApi, and what it was told."""

    providers: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider")
    stream: int = 0
    operators: dict[tuple[str, int, str], int] = field(default_factory=dict)
    _last: int = 0
    _objects: dict[int, object] = field(default_factory=dict)
    _kept: list[object] = field(default_factory=list)
    _table: ctypes.Array[c_void_p] = field(default_factory=lambda: (c_void_p * PLACES)())
    node: Node | None = None
    inputs: list[Value | None] = field(default_factory=list)
    output: np.ndarray | None = None
    output_kind: int = 0

    def register(self, library: Path) -> None:
        """Load our library, and take its operators by name, type of x and provider."""
        self._fill()
        base = (c_void_p * 2)(self._keep(c_void_p, [ctypes.c_uint32], lambda version: self._api()), None)
        loaded = ctypes.CDLL(str(library))
        loaded.RegisterCustomOps.restype = c_void_p
        self._check(loaded.RegisterCustomOps(c_void_p(1), base))

    def create(self, operator: int, node: Node) -> int:
        """Make a kernel; OrtError with its message where it refuses."""
        self.node, kernel = node, c_void_p()
        create = _member(operator, CREATE, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_void_p))
        self._check(create(operator, self._api(), 1, ctypes.byref(kernel)))
        return kernel.value or 0

    def compute(self, operator: int, kernel: int, inputs: Sequence[Value | None], kind: int) -> np.ndarray:
        """Run a kernel on inputs, None for those that it must not look at; return output 0, of this element type."""
        self._objects.clear()
        self.inputs, self.output, self.output_kind = list(inputs), None, kind
        self._check(_member(operator, COMPUTE, c_void_p, c_void_p, c_void_p)(kernel, 1))
        assert self.output is not None
        return self.output

    def destroy(self, operator: int, kernel: int) -> None:
        _member(operator, DESTROY, None, c_void_p)(kernel)

    def _api(self) -> int:
        return ctypes.addressof(self._table)

    def _check(self, status: int | None) -> None:
        if status:
            raise OrtError(str(self._objects.pop(status)))

    def _handle(self, value: object) -> int:
        self._last += 1
        self._objects[self._last] = value
        return self._last

    def _keep(self, result: type | None, arguments: Sequence[type], function: Callable[..., object]) -> int:
        made = ctypes.CFUNCTYPE(result, *arguments)(function)
        self._kept.append(made)
        return ctypes.cast(made, c_void_p).value or 0

    def _fill(self) -> None:
        for place, (arguments, function) in self._functions().items():
            self._table[place] = self._keep(c_void_p, arguments, function)

    def _functions(self) -> dict[int, tuple[Sequence[type], Callable[..., object]]]:
        """Return the functions by their places in OrtApi (onnxruntime_c_api.h)."""
        p, out = c_void_p, POINTER(c_void_p)
        return {
            0: ([c_int32, c_char_p], lambda code, text: self._handle(text.decode())),
            93: ([p], lambda status: self._objects.pop(status) and None),
            26: ([c_char_p, out], lambda name, made: _set(made, 1)),
            27: ([p, p], lambda domain, operator: self._add(operator)),
            28: ([p, p], lambda options, domain: None),
            125: ([POINTER(POINTER(c_char_p)), POINTER(c_int)], self._providers),
            126: ([p, c_int], lambda names, count: None),
            85: ([p, c_char_p, POINTER(c_float)], self._number),
            86: ([p, c_char_p, POINTER(c_int64)], self._number),
            87: ([p, c_char_p, p, POINTER(c_size_t)], self._text),
            244: ([p, p, POINTER(c_size_t)], lambda info, to, size: _copy(self._node.name, to)),
            234: ([p, c_size_t, out], lambda info, i, made: _set(made, self._handle(self._node.types[i]))),
            98: ([p], lambda described: self._objects.pop(described) and None),
            55: ([p, out], _set_first),
            249: ([p, c_size_t, POINTER(c_int), out], self._constant),
            278: ([p, c_int32, out], lambda info, kind, made: _set(made, 1)),
            132: ([p], lambda allocator: None),
            77: ([p, out], lambda allocator, made: _set(made, 1)),
            72: ([p, POINTER(c_int)], lambda memory, made: _set(made, self._node.device)),
            193: ([p, out], lambda context, made: _set(made, self.stream)),
            90: ([p, c_size_t, out], lambda context, i, made: _set(made, self._handle(self.inputs[i]))),
            91: ([p, c_size_t, POINTER(c_int64), c_size_t, out], self._output),
            51: ([p, out], lambda value, made: _set(made, self._value(value).array.ctypes.data)),
            65: ([p, out], _set_first),
            99: ([p], lambda shape: None),
            60: ([p, POINTER(c_int32)], lambda shape, made: _set(made, self._objects[shape])),
            61: ([p, POINTER(c_size_t)], lambda shape, made: _set(made, self._value(shape).array.ndim)),
            62: ([p, POINTER(c_int64), c_size_t], self._sizes),
        }

    @property
    def _node(self) -> Node:
        assert self.node is not None
        return self.node

    def _value(self, handle: int) -> Value:
        value = self._objects[handle]
        assert isinstance(value, Value), "the kernel looks at an input that it must leave alone"
        return value

    def _add(self, operator: int) -> None:
        name = _member(operator, NAME, c_char_p, c_void_p)(operator).decode()
        provider = _member(operator, PROVIDER, c_char_p, c_void_p)(operator)
        kind = _member(operator, INPUT_TYPE, c_int32, c_void_p, c_size_t)(operator, 0)
        key = (name, kind, (provider or b"CPUExecutionProvider").decode())
        assert key not in self.operators
        self.operators[key] = operator

    def _providers(self, made: Pointer, count: Pointer) -> None:
        names = (c_char_p * len(self.providers))(*(name.encode() for name in self.providers))
        self._kept.append(names)
        made[0], count[0] = ctypes.cast(names, POINTER(c_char_p)), len(self.providers)

    def _number(self, info: int, name: bytes, made: Pointer) -> int | None:
        return self._failed(name) if name.decode() not in self._node.attributes else _set(made, self._attribute(name))

    def _text(self, info: int, name: bytes, to: int, size: Pointer) -> int | None:
        found = self._node.attributes.get(name.decode())
        return _copy(found, to) if isinstance(found, str) else self._failed(name)

    def _attribute(self, name: bytes) -> int | float | str:
        return self._node.attributes[name.decode()]

    def _failed(self, name: bytes) -> int:
        return self._handle(f"no attribute {name.decode()}")

    def _constant(self, info: int, index: int, found: Pointer, made: Pointer) -> None:
        value = self._node.constants[index]
        found[0], made[0] = int(value is not None), None if value is None else self._handle(value)

    def _output(self, context: int, index: int, sizes: Pointer, rank: int, made: Pointer) -> None:
        dtype = np.float32 if self.output_kind == FLOAT else np.uint16
        self.output = np.full([sizes[i] for i in range(rank)], 0x7FFF, np.uint16).astype(dtype)
        made[0] = self._handle(Value(kind=self.output_kind, array=self.output))

    def _sizes(self, shape: int, made: Pointer, rank: int) -> None:
        made_of = self._value(shape).array.shape
        assert len(made_of) == rank
        for i, size in enumerate(made_of):
            made[i] = size


def input_memory(operator: int) -> list[int]:
    """Return for each input in which memory the operator asks for it."""
    count = _member(operator, INPUTS, c_size_t, c_void_p)(operator)
    ask = _member(operator, INPUT_MEMORY, c_int32, c_void_p, c_size_t)
    return [ask(operator, i) for i in range(count)]


def _member(operator: int, place: int, result: type | None, *arguments: type) -> Callable[..., int]:
    members = (c_void_p * MEMBERS).from_address(operator)
    return ctypes.CFUNCTYPE(result, *arguments)(members[place] or 0)


def _set(made: Pointer, value: object) -> None:
    made[0] = value


def _set_first(handle: int, made: Pointer) -> None:
    """A tensor's shape, and the shape of a type, have the handle of what they belong to."""
    made[0] = handle


def _copy(text: str, to: int) -> None:
    ctypes.memmove(to, text.encode() + b"\0", len(text) + 1)
