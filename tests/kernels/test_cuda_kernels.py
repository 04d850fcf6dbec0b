"""The CUDA kernels without a GPU: the whole source on an emulated warp, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from paredown.kernels import layout, layout_mma16
from paredown.kernels.cuda import launch, tables
from paredown.kernels.cuda.launch import FORMS, GEMVS, TILES, Form, Kind
from paredown.kernels.cuda.sources import LINEAR
from paredown.kernels.lut_spec import LutSpec

from ..strategies import SEEDS
from .cuda_emulation import EmulationError, Emulator, poisoned

Float64 = NDArray[np.float64]
TYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
DTYPE: dict[Kind, torch.dtype] = {
    "f16": torch.float16,
    "f16b": torch.float16,
    "bf16": torch.bfloat16,
    "s8": torch.float16,
}
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
ACTIVATIONS = range(5)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="session")
def emulator(folder: Path) -> Emulator:
    return Emulator(folder, bulk=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A weight in its parts, and W as numpy decodes it."""

    spec: LutSpec
    codes: Tensor
    table: Tensor
    scale: Tensor
    weight: Float64

    @classmethod
    def draw(cls, spec: LutSpec, *, halves: bool = False, scale: torch.dtype = torch.float16, seed: int = 0) -> Problem:
        rng = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=rng, dtype=torch.uint8)
        if halves:
            table = torch.randn(spec.table_shape, generator=rng).bfloat16().half()  # bf16 kernels round entries
        else:
            table = torch.randint(0, 256, spec.table_shape, generator=rng, dtype=torch.uint8)
        scales = (0.1 + torch.rand(spec.scale_shape, generator=rng)).to(scale)
        rows, columns = np.arange(spec.n), np.arange(spec.k)
        entries = (table.double().numpy() - spec.zero) * spec.unit
        values = entries[(rows // (spec.table_rows or spec.n))[:, None], codes.numpy()]
        weight = values * scales.double().numpy()[:, columns // (spec.group or spec.k)]
        return cls(spec=spec, codes=codes, table=table, scale=scales, weight=weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What else a product has: y's dtype, bias, activation and the low-rank term of some rank."""

    y: torch.dtype
    bias: bool = False
    activation: int = 0
    rank: int = 0


def product(
    emulator: Emulator, problem: Problem, x: Tensor, kind: Kind, form: Form, layer: Layer, parts: int = 1
) -> tuple[Tensor, Float64, Float64]:
    """Return y of the kernels, the same in float64, and how far each element may be off."""
    spec, m = problem.spec, len(x)
    inputs_of_x, x_used, columns, stride = prepared(emulator, problem, x, kind)
    y = poisoned(m, spec.n + 5, dtype=layer.y)
    target = poisoned(parts, m, spec.n, dtype=torch.float32) if parts > 1 else y
    values = linear_arguments(problem, kind, layer, m) | inputs_of_x | {"k": columns, "x_stride": stride}
    values |= {"y_stride": y.stride(0), "y": target}
    emulator.run(launch.linear(spec, m, kind, form, parts), values)
    if parts > 1:
        again = {name: values[name] for name in ("bias", "n", "m", "y_stride", "y_type", "activation", "has_bias")}
        emulator.run(launch.reduce(spec.n, m), again | {"partial": target, "splits": parts, "y": y})
    assert torch.isnan(y[:, spec.n :]).all()

    left, right = (values[name][:, : layer.rank].double().numpy() for name in ("low", "low_x"))
    bias = values["bias"].double().numpy() * layer.bias
    wanted = x_used @ problem.weight.T + right @ left.T + bias
    size = np.abs(x_used) @ np.abs(problem.weight).T + np.abs(right) @ np.abs(left).T + np.abs(bias)
    if kind == "s8":  # entries less by 128 are multiplied first, and 128 times the sum of x is added
        size += 128 * spec.unit * np.abs(x_used).sum(1, keepdims=True) * problem.scale.double().numpy().max()
    summing = size * 2.0**-24 * (spec.k / 16 + 2 * layout_mma16.shape(spec).slots + 24)
    wanted = activated(wanted, layer.activation)
    # No activation is steeper than 1.13; one rounding to the dtype of y, whose smallest halves are 2^-24 apart.
    return y[:, : spec.n], wanted, 1.2 * summing + np.abs(wanted) * 1.001 * ROUNDING[layer.y] + 2.0**-25


def linear_arguments(problem: Problem, kind: Kind, layer: Layer, m: int) -> dict[str, Tensor | int]:
    """Return all arguments but those that depend on where x and y are."""
    spec, rng = problem.spec, torch.Generator().manual_seed(m)
    low_type = layer.y if layer.y != torch.float32 else torch.float16
    low = torch.zeros(spec.n, max(32, math.ceil(layer.rank / 32) * 32), dtype=low_type)
    low[:, : layer.rank] = torch.randn(spec.n, layer.rank, generator=rng).to(low_type)
    low_x = torch.randn(m, layer.rank + 3, generator=rng).to(low_type)
    low_x[:, layer.rank :] = torch.nan
    return weight_arguments(problem, kind) | {
        "bias": torch.randn(spec.n, generator=rng).to(layer.y),
        "low": low,
        "low_x": low_x,
        "m": m,
        "y_type": TYPES[layer.y],
        "low_type": TYPES[low_type],
        "activation": layer.activation,
        "has_bias": int(layer.bias),
        "rank": layer.rank,
        "low_stride": low_x.stride(0),
        "unit_bits": tables.float_bits(spec.unit),
        "shift_bits": tables.shift_bits(spec, kind),
    }


def weight_arguments(problem: Problem, kind: Kind) -> dict[str, Tensor | int]:
    spec, sizes = problem.spec, layout_mma16.shape(problem.spec)
    return {
        "codes": layout_mma16.pack(problem.codes, spec),
        "table": tables.device_table(problem.table, spec, kind),
        "scale": layout_mma16.pack_scale(problem.scale, spec),
        "n": spec.n,
        "units": sizes.units,
        "slots": sizes.slots,
        "steps_per_slot": sizes.steps_per_slot,
        "units_per_slot": sizes.units_per_slot,
        "table_rows": spec.table_rows,
        "scale_type": TYPES[problem.scale.dtype],
    }


def prepared(
    emulator: Emulator, problem: Problem, x: Tensor, kind: Kind
) -> tuple[dict[str, Tensor], Float64, int, int]:
    """Return x as the kernel takes it, its values in float64, and its columns and stride."""
    spec, m = problem.spec, len(x)
    sizes = layout_mma16.shape(spec)
    common = {"m": m, "k": spec.k, "group": spec.group_columns, "group_steps": sizes.group_steps, "units": sizes.units}
    if kind == "s8":
        octets, floats = launch.quantized_sizes(spec, m)
        q, q_scale = poisoned(octets, dtype=torch.int8), poisoned(floats, dtype=torch.float32)
        options = {"steps_per_slot": sizes.steps_per_slot, "x_stride": x.stride(0), "x_type": TYPES[x.dtype]}
        emulator.run(launch.quantize(spec, m), {"x": x, **common, **options, "q": q, "q_scale": q_scale})
        return {"x": q, "x_scale": q_scale}, rounded(x, spec), spec.k, 0
    if launch.reads_in_place(spec, x.stride(0), x.data_ptr()):
        return {"x": x, "x_scale": x}, x.double().numpy(), spec.k, x.stride(0)
    columns = launch.padded_columns(spec)
    out = poisoned(m, columns, dtype=x.dtype)
    emulator.run(launch.pad(spec, m), {"x": x, **common, "x_stride": x.stride(0), "out": out})
    return {"x": out, "x_scale": x}, x.double().numpy(), columns, columns


def rounded(x: Tensor, spec: LutSpec) -> Float64:
    """Return x as int8 mode rounds it: runs of up to 128 inputs in each group, in float32, half to even."""
    values, out = x.float().numpy(), np.empty(x.shape)
    for group in range(0, spec.k, spec.group_columns):
        end = min(group + spec.group_columns, spec.k)
        for begin in range(group, end, 128):
            run = values[:, begin : min(begin + 128, end)]
            most = np.abs(run).max(1, keepdims=True)
            inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
            out[:, begin : begin + run.shape[1]] = np.rint(run * inverse).astype(np.float64) * (most / np.float32(127))
    return out


def activated(y: Float64, activation: int) -> Float64:
    if activation == 0:
        return y
    if activation == 1:
        return np.maximum(y, 0)
    if activation == 2:
        return y * (1 + scipy.special.erf(y / math.sqrt(2))) / 2
    if activation == 3:
        return y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
    return y * scipy.special.expit(y)


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within(found: Tensor, wanted: Float64, bound: Float64) -> None:
    off = np.abs(found.double().numpy() - wanted) - bound
    assert (off <= 0).all(), f"{(~(off <= 0)).sum()} of {off.size} off by up to {off.max()}"


UNITS: list[tuple[Kind, int, bool]] = [("f16b", 4, False), ("s8", 3, False), ("bf16", 2, True)]
"""(kind, bits, with bulk copies) that every run compiles; the others take a minute together."""
OTHERS = [(kind, bits, bulk) for bulk in (False, True) for kind, bits in LINEAR if (kind, bits, bulk) not in UNITS]
EVERY = [*UNITS, *(pytest.param(*unit, marks=pytest.mark.slow) for unit in OTHERS)]


@pytest.mark.parametrize(("kind", "bits", "bulk"), EVERY)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_kernel_multiplies(folder: Path, kind: Kind, bits: int, bulk: bool, form: Form) -> None:
    """Rows of W, inputs and rows of x that fill up neither blocks nor units; a table for every 32 rows."""
    spec = LutSpec(n=150, k=712, bits=bits, group=128, table_rows=32, zero=128.0, unit=1 / 127)
    layer = Layer(y=DTYPE[kind], bias=True, activation=2, rank=40)
    x = inputs(form.tokens - 3, spec.k, DTYPE[kind])
    assert_within(*product(Emulator(folder, bulk), Problem.draw(spec), x, kind, form, layer))


@st.composite
def problems(draw: st.DrawFn, bits: int, kind: Kind) -> tuple[Problem, Layer, int]:
    spec = LutSpec(
        n=draw(st.integers(1, 70)),
        k=draw(st.integers(1, 700)),
        bits=bits,
        group=draw(st.sampled_from((0, 0, 8, 32, 40, 64, 96, 128, 160, 192, 256, 1000))),
        table_rows=draw(st.sampled_from((0, 16, 48))),
        zero=draw(st.sampled_from((128.0, 0.0, 100.0, 255.0))),
        unit=draw(st.sampled_from((0.125, 1 / 127))),
    )
    y = draw(st.sampled_from(list(TYPES))) if kind == "s8" else DTYPE[kind]
    layer = Layer(
        y=y, bias=draw(st.booleans()), activation=draw(st.integers(0, 4)), rank=draw(st.sampled_from((0, 5, 64)))
    )
    halves = kind in ("f16", "bf16") and draw(st.booleans())
    spec = replace(spec, zero=0.0, unit=1.0) if halves else spec
    scale = draw(st.sampled_from((torch.float16, torch.float16, torch.bfloat16, torch.float32)))
    return Problem.draw(spec, halves=halves, scale=scale, seed=draw(SEEDS)), layer, draw(st.integers(1, 20))


@pytest.mark.parametrize(("kind", "bits", "bulk"), EVERY)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_weight_and_form_of_layer(folder: Path, kind: Kind, bits: int, bulk: bool, data: st.DataObject) -> None:
    """Every group, scale, table, epilogue and dtype; x in place or filled up first; inputs cut into parts, or not."""
    problem, layer, m = data.draw(problems(bits, kind))
    fitting = [form for form in FORMS if form.tokens >= m and not (form.rows == 32 and problem.spec.table_rows % 32)]
    form = data.draw(st.sampled_from(fitting))
    parts = data.draw(st.integers(1, 3)) if form in TILES else 1
    dtype = data.draw(st.sampled_from(list(TYPES))) if kind == "s8" else DTYPE[kind]
    stride = problem.spec.k + data.draw(st.sampled_from((0, 1, 8)))
    x = inputs(m, stride, dtype, data.draw(SEEDS))[:, : problem.spec.k]
    assert_within(*product(Emulator(folder, bulk), problem, x, kind, form, layer, parts))


@pytest.mark.parametrize("form", TILES, ids=lambda form: form.name)
def test_more_rows_of_x_than_a_block_takes(emulator: Emulator, form: Form) -> None:
    spec = LutSpec(n=20, k=200, bits=3, group=64, zero=128.0)
    x = inputs(2 * form.tokens + 9, spec.k, torch.float32)
    assert_within(*product(emulator, Problem.draw(spec), x, "s8", form, Layer(y=torch.float32), parts=2))


def test_the_identity_gives_the_weight_exactly(emulator: Emulator) -> None:
    """This separates decoding from adding: a single product is exact, so y is W rounded once."""
    spec = LutSpec(n=40, k=32, bits=4, table_rows=16, zero=128.0)
    problem = Problem.draw(spec)
    y, _, _ = product(emulator, problem, torch.eye(32).half(), "f16b", TILES[0], Layer(y=torch.float16))
    assert torch.equal(y, torch.from_numpy(problem.weight.T).half())


def test_the_same_bits_in_whatever_order_threads_run(emulator: Emulator) -> None:
    spec = LutSpec(n=40, k=600, bits=4, zero=128.0)
    problem, x = Problem.draw(spec), inputs(5, spec.k, torch.float16)
    found = {
        product(replace(emulator, seed=seed), problem, x, "f16b", GEMVS[0], Layer(y=torch.float16))[0].numpy().tobytes()
        for seed in range(3)
    }
    assert len(found) == 1


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_dense_is_the_weight_rounded_once(emulator: Emulator, data: st.DataObject) -> None:
    problem, _, _ = data.draw(problems(data.draw(st.sampled_from((2, 3, 4))), "s8"))
    spec, dtype = problem.spec, data.draw(st.sampled_from(list(TYPES)))
    w = poisoned(spec.n, spec.k, dtype=dtype)
    values = weight_arguments(problem, "s8") | {"table": tables.dense_table(problem.table, spec), "bits": spec.bits}
    values |= {"group": spec.group_columns, "group_steps": layout_mma16.shape(spec).group_steps, "k": spec.k}
    emulator.run(launch.dense(spec), values | {"w_type": TYPES[dtype], "w": w})
    entries = ((problem.table.float() - spec.zero) * torch.tensor(spec.unit)).numpy()
    rows, columns = np.arange(spec.n), np.arange(spec.k)
    picked = entries[(rows // (spec.table_rows or spec.n))[:, None], problem.codes.numpy()]
    wanted = picked * problem.scale.float().numpy()[:, columns // spec.group_columns]
    assert torch.equal(w, torch.from_numpy(wanted).to(dtype))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_repack_is_the_packer(emulator: Emulator, data: st.DataObject) -> None:
    problem, _, _ = data.draw(problems(data.draw(st.sampled_from((2, 3, 4))), "s8"))
    spec, wanted = problem.spec, layout_mma16.pack(problem.codes, problem.spec)
    found, sizes = torch.full_like(wanted, 85), layout_mma16.shape(spec)
    values = {"c16": layout.pack(problem.codes, spec), "n": spec.n, "bits": spec.bits, "steps": layout.steps(spec)}
    emulator.run(launch.repack(spec), values | {"units": sizes.units, "codes": found})
    assert torch.equal(found, wanted)


def test_a_run_of_zeros_and_one_of_tiny_numbers(emulator: Emulator) -> None:
    spec = LutSpec(n=16, k=300, bits=3, zero=128.0)
    x = inputs(3, spec.k, torch.float32)
    x[1, :128] = 0
    x[2, 128:] = 1e-30
    assert_within(*product(emulator, Problem.draw(spec), x, "s8", GEMVS[0], Layer(y=torch.float32)))


def test_a_read_beyond_a_buffer_is_noticed(emulator: Emulator) -> None:
    """An emulator that forgives proves nothing."""
    spec = LutSpec(n=16, k=256, bits=4, zero=128.0)
    problem = Problem.draw(spec)
    start = launch.linear(spec, 1, "f16b", GEMVS[0])
    x, y = inputs(1, spec.k, torch.float16), poisoned(1, 16, dtype=torch.float16)
    values = linear_arguments(problem, "f16b", Layer(y=torch.float16), 1) | {"y": y, "y_stride": 16, "x_scale": x}
    short = x[:, :128].clone()
    with pytest.raises(EmulationError, match="outside of every buffer"):
        emulator.run(start, values | {"x": short, "k": spec.k, "x_stride": 256})
    with pytest.raises(EmulationError, match="not aligned"):
        emulator.run(start, values | {"x": inputs(1, 300, torch.float16)[:, 1:], "k": spec.k, "x_stride": 256})
    emulator.run(start, values | {"x": x, "k": spec.k, "x_stride": 256})
    assert torch.isfinite(y).all()
