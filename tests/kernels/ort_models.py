"""Models of the operators of our library for onnxruntime, and what numpy says that they compute."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from paredown.exporters.onnx_session import session_options
from paredown.kernels import layout
from paredown.kernels.lut_spec import LutSpec

DOMAIN = "paredown"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
ROUNDING = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}
ACTIVATIONS = ("", "Relu", "Gelu", "GeluTanh", "Silu")
SPEC = LutSpec(n=37, k=70, bits=4, group=32, zero=128.0, unit=1 / 127)
TOKENS = 5
SMALLEST = {"float32": 0.0, "float16": 2**-25, "bfloat16": 0.0}
"""Half of the smallest step of a type: the rounding error of a subnormal number."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight as an operator takes it, and as numbers."""

    spec: LutSpec
    codes: torch.Tensor
    table: torch.Tensor
    scale: torch.Tensor
    values: np.ndarray

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.codes, self.table, self.scale

    def attributes(self, prefix: str = "") -> dict[str, int | float]:
        spec = self.spec
        whole = {"bits": spec.bits, "group": spec.group, "table_rows": spec.table_rows}
        return {prefix + name: value for name, value in (whole | {"zero": spec.zero, "unit": spec.unit}).items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One node Lut...Linear...; `rank` 0 = no low-rank term."""

    spec: LutSpec
    dtype: str = "float32"
    int8: bool = False
    activation: str = ""
    rank: int = 0
    biased: bool = True
    scale: torch.dtype = torch.float16
    table: torch.dtype = torch.uint8

    @property
    def op(self) -> str:
        planes, int8 = "Planes" * (self.spec.bits == 3), "Int8" * self.int8
        return f"Lut{planes}Linear{int8}{'LowRank' * bool(self.rank)}{self.activation}"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A case with numbers: what a node takes, and its result in float64 with a bound of its error."""

    case: Case
    weight: Stored
    left: Stored | None
    bias: torch.Tensor

    def expected(self, x: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return y (.., n) of float32 x and t, and how far from it a kernel that sums in float32 may be."""
        dtype = getattr(torch, self.case.dtype)
        x, t = (torch.from_numpy(value).to(dtype).double().numpy() for value in (x, t))
        if self.case.int8:
            x = rounded(x.astype(np.float32), self.weight.spec)
        terms = [(x, self.weight.values)] + ([(t, self.left.values)] if self.left else [])
        bias = self.bias.double().numpy()
        summed = sum((inputs @ w.T for inputs, w in terms), start=bias)
        size = sum((np.abs(inputs) @ np.abs(w).T for inputs, w in terms), start=np.abs(bias))
        y = activated(summed, self.case.activation)
        # Three roundings make an entry of W, one its scaled input, one each sum; no activation is steeper than 1.13.
        sums = 1.13 * (self.case.spec.k + self.case.rank + 8) * 2**-24 * size
        return y, sums + 2**-21 * np.abs(summed) + 2 * ROUNDING[self.case.dtype] * np.abs(y) + SMALLEST[self.case.dtype]


def every_form() -> list[Layer]:
    """Return a layer of every name and type of x; other properties take turns."""
    made = []
    for i, form in enumerate(itertools.product((3, 4), (False, True), (0, 5), ACTIVATIONS, TYPES)):
        bits, int8, rank, activation, dtype = form
        group, table_rows = (0, 32, 7)[i % 3], 16 * (i // 2 % 2)
        spec = LutSpec(n=37, k=70, bits=bits, group=group, table_rows=table_rows, zero=128.0, unit=1 / 127)
        scale = (torch.float16, torch.float32, torch.bfloat16)[i // 3 % 3]
        table = torch.uint8 if int8 or i % 5 else torch.float16
        case = Case(spec=spec, dtype=dtype, int8=int8, activation=activation, rank=rank, scale=scale, table=table)
        made.append(layer(dataclasses.replace(case, biased=i % 4 > 0), i))
    return made


def stored(spec: LutSpec, rng: np.random.Generator, scale: torch.dtype, table: torch.dtype) -> Stored:
    """Return a random weight whose entries are of the size of 1 / sqrt(k)."""
    codes = rng.integers(0, 2**spec.bits, (spec.n, spec.k)).astype(np.uint8)
    if table == torch.uint8:
        entries = torch.from_numpy(rng.integers(0, 256, spec.table_shape).astype(np.uint8))
    else:
        entries = torch.from_numpy(rng.standard_normal(spec.table_shape) / spec.unit + spec.zero).to(table)
    scales = torch.from_numpy(rng.uniform(0.5, 2.0, spec.scale_shape) / math.sqrt(spec.k)).to(scale)
    values = np.empty((spec.n, spec.k))
    levels, steps = entries.double().numpy(), scales.double().numpy()
    unit = float(np.float32(spec.unit))
    for r in range(spec.n):
        row = levels[r // spec.table_rows if spec.table_rows else 0]
        for c in range(spec.k):
            values[r, c] = (row[codes[r, c]] - spec.zero) * unit * steps[r, c // spec.group if spec.group else 0]
    packed = layout.pack(torch.from_numpy(codes), spec)
    return Stored(spec=spec, codes=packed, table=entries, scale=layout.pack_scale(scales, spec), values=values)


def layer(case: Case, seed: int = 0) -> Layer:
    """Return the case with numbers of this seed."""
    rng = np.random.default_rng(seed)
    left = None
    if case.rank:
        spec = LutSpec(n=case.spec.n, k=case.rank, bits=4, zero=128.0, unit=1 / 127)
        left = stored(spec, rng, torch.float16, torch.uint8)
    bias = rng.standard_normal(case.spec.n) if case.biased else np.zeros(1)
    return Layer(
        case=case,
        weight=stored(case.spec, rng, case.scale, case.table),
        left=left,
        bias=torch.from_numpy(bias).to(getattr(torch, case.dtype)),
    )


def rounded(x: np.ndarray, spec: LutSpec) -> np.ndarray:
    """Return x with each run of up to 128 inputs of a group rounded to signed bytes, as cpu/paredown.h says."""
    group, y = spec.group or spec.k, np.empty(x.shape)
    for start in range(0, spec.k, group):
        stop = min(start + group, spec.k)
        for first in range(start, stop, 128):
            run = x[..., first : min(first + 128, stop)]
            most = np.abs(run).max(-1, keepdims=True)
            factor = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
            bytes_of_run = np.rint(run * factor)
            y[..., first : first + run.shape[-1]] = bytes_of_run.astype(np.float64) * (most / np.float32(127))
    return y


def activated(y: np.ndarray, name: str) -> np.ndarray:
    match name:
        case "Relu":
            return np.maximum(y, 0)
        case "Gelu":
            return y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        case "GeluTanh":
            return y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
        case "Silu":
            return y / (1 + np.exp(-y))
        case _:
            return y


def initializer(name: str, values: torch.Tensor) -> onnx.TensorProto:
    if values.dtype == torch.bfloat16:
        raw = values.contiguous().view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, list(values.shape), raw, raw=True)
    return onnx.numpy_helper.from_array(values.contiguous().numpy(), name)


def linear_node(given: Layer, x: str, t: str, y: str, prefix: str) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """Return the node of a layer and its initializers, whose names start with `prefix`."""
    case = given.case
    tensors = dict(zip(("codes", "table", "scale"), given.weight.parts, strict=True)) | {"bias": given.bias}
    inputs = [x, *(prefix + name for name in tensors)]
    attributes: dict[str, int | float | str] = {"n": case.spec.n, "k": case.spec.k, "layout": "c16"}
    attributes |= given.weight.attributes()
    if given.left:
        left = dict(zip(("left_codes", "left_table", "left_scale"), given.left.parts, strict=True))
        inputs += [t, *(prefix + name for name in left)]
        attributes |= given.left.attributes("left_") | {"rank": case.rank}
        tensors |= left
    node = helper.make_node(case.op, inputs, [y], domain=DOMAIN, name=f"{prefix}node", **attributes)
    return node, [initializer(prefix + name, values) for name, values in tensors.items()]


def linear_model(layers: Sequence[Layer], sizes: Sequence[int | str | None] = ("batch",)) -> onnx.ModelProto:
    """Return a model of float32 inputs x (*sizes, k) and t (*sizes, rank) with an output y0, y1, .. of each layer."""
    first = layers[0].case
    nodes, tensors, outputs = [], [], []
    for dtype in sorted({given.case.dtype for given in layers}):
        nodes += [helper.make_node("Cast", [name], [f"{name}_{dtype}"], to=TYPES[dtype]) for name in ("x", "t")]
    for i, given in enumerate(layers):
        dtype = given.case.dtype
        node, mine = linear_node(given, f"x_{dtype}", f"t_{dtype}", f"raw{i}", f"l{i}_")
        nodes += [node, helper.make_node("Cast", [f"raw{i}"], [f"y{i}"], to=TensorProto.FLOAT)]
        tensors += mine
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None))
    rank = max(given.case.rank for given in layers) or 1
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [*sizes, first.spec.k]),
        helper.make_tensor_value_info("t", TensorProto.FLOAT, [*sizes, rank]),
    ]
    return model(nodes, inputs, outputs, tensors)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    tensors: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Return a model of opset 20, which onnxruntime 1.20 loads too."""
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(tensors))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def open_session(
    source: onnx.ModelProto | Path, library: Path | None, threads: int = 1
) -> onnxruntime.InferenceSession:
    options = session_options(threads=threads, library=library)
    options.log_severity_level = 4
    given = str(source) if isinstance(source, Path) else source.SerializeToString()
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def feeds_of(case: Case, sizes: tuple[int, ...] = (TOKENS,), seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"x": (*sizes, case.spec.k), "t": (*sizes, case.rank or 1)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def assert_close(found: np.ndarray, one: Layer, feeds: dict[str, np.ndarray]) -> None:
    y, bound = one.expected(feeds["x"], feeds["t"])
    assert found.shape == y.shape
    worst = np.max(np.abs(found - y) - bound, initial=-1.0)
    assert worst <= 0, f"{one.case}: {worst:g} beyond the bound"
