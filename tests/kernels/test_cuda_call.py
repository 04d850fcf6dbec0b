"""Calls of the CUDA kernels from torch: the same Python, the kernels on an emulated warp, against float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.kernels import layout, layout_mma16, lut_linear
from paredown.kernels.cuda import call, driver, launch, load, op
from paredown.kernels.lut_spec import ACTIVATIONS, Activation, LutParts, LutSpec, Mode

from .cuda_emulation import Emulator

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@dataclass(frozen=True, slots=True)
class Started:
    """Kernels by name, in the order in which they were started."""

    names: list[str]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"), bulk=False)


@pytest.fixture
def started(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Started:
    """Run kernels on the emulated warp, on a GPU of 3 multiprocessors whose tensors are those of the CPU."""
    found = Started([])

    def start(kernel: str, how: launch.Launch, values: Mapping[str, Tensor | int], place: call.Place) -> None:
        absent = torch.zeros(64)
        given = {name: values[name] for name in launch.ARGUMENTS[kernel]}
        pointers = {name: absent for name, value in given.items() if name in launch.POINTERS and isinstance(value, int)}
        emulator.run(how, given | pointers)
        found.names.append(how.name.removeprefix("paredown_"))

    monkeypatch.setattr(call, "_start", start)
    monkeypatch.setattr(call, "_place", lambda x: call.Place(device=0, processors=3, stream=0))
    return found


@dataclass(frozen=True, slots=True)
class Problem:
    """A weight of layout c16, and W as numpy decodes it."""

    spec: LutSpec
    parts: LutParts
    dense: NDArray[np.float64]


def draw(spec: LutSpec, *, halves: bool = False, seed: int = 0) -> Problem:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=rng, dtype=torch.uint8)
    octets = torch.randint(0, 256, spec.table_shape, generator=rng, dtype=torch.uint8)
    table = torch.randn(spec.table_shape, generator=rng).half() if halves else octets
    scale = (0.1 + torch.rand(spec.scale_shape, generator=rng)).half()
    rows, columns = np.arange(spec.n), np.arange(spec.k)
    entries = (table.double().numpy() - spec.zero) * spec.unit
    values = entries[(rows // (spec.table_rows or spec.n))[:, None], codes.numpy()]
    dense = values * scale.double().numpy()[:, columns // (spec.group or spec.k)]
    parts = LutParts(codes=layout.pack(codes, spec), table=table, scale=layout.pack_scale(scale, spec))
    return Problem(spec, parts, dense)


def packed(problem: Problem, mode: Mode, dtype: torch.dtype, low: Tensor | None = None) -> call.DeviceWeight:
    table = problem.parts.table.dtype
    assert call.refusal(problem.spec, mode, dtype, table) == ""
    kind = launch.kind_of(problem.spec, table, dtype, mode)
    assert kind is not None
    return call.pack(problem.parts, problem.spec, kind, low)


def rounded(x: Tensor, spec: LutSpec) -> NDArray[np.float64]:
    """Round as cpu/paredown.h says, in numpy."""
    values = x.float().numpy().copy()
    for group in range(0, spec.k, spec.group_columns):
        for run in range(group, min(group + spec.group_columns, spec.k), 128):
            part = values[:, run : min(run + 128, group + spec.group_columns, spec.k)]
            most = np.abs(part).max(1, keepdims=True)
            by = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
            part[:] = np.rint(part * by) * (most / np.float32(127))
    return values.astype(np.float64)


def activated(y: NDArray[np.float64], activation: Activation) -> NDArray[np.float64]:
    if activation == "relu":
        return np.maximum(y, 0)
    if activation == "gelu":
        return torch.nn.functional.gelu(torch.from_numpy(y)).numpy()
    if activation == "gelu_tanh":
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y / (1 + np.exp(-y)) if activation == "silu" else y


CASES = [
    (LutSpec(n=40, k=160, bits=4, group=32, zero=128.0, unit=0.01), "exact", torch.float16),
    (LutSpec(n=16, k=128, bits=4, zero=100.0, unit=0.01), "int8", torch.float16),
]
MORE_CASES = [
    (LutSpec(n=33, k=200, bits=3, group=64, zero=3.5, unit=0.02), "exact", torch.float16),
    (LutSpec(n=64, k=136, bits=2, table_rows=32, zero=2.0, unit=0.01), "exact", torch.bfloat16),
    (LutSpec(n=50, k=90, bits=3, group=40, zero=128.0, unit=0.01), "int8", torch.float32),
    (LutSpec(n=20, k=300, bits=2, group=128, table_rows=16, zero=0.0, unit=0.01), "int8", torch.bfloat16),
]
"""Each takes another unit, which is compiled for the emulation in some 4 s."""


@pytest.mark.parametrize(
    ("spec", "mode", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)]
)
@pytest.mark.parametrize("m", [1, 9, 20, 130])
def test_a_product_is_that_of_float64(spec: LutSpec, mode: Mode, dtype: torch.dtype, m: int, started: Started) -> None:
    if mode == "int8" and m == 130:
        spec = replace(spec, n=16)  # the emulated warp is slow, and int8 goes on with tiles
    rng = torch.Generator().manual_seed(m)
    rank, activation = (5, ACTIVATIONS[m % 5]) if m != 9 else (0, ACTIVATIONS[1])
    problem = draw(spec, seed=m)
    left = torch.randn(spec.n, rank, generator=rng).to(dtype) if rank else None
    low_x = torch.randn(m, rank, generator=rng).to(dtype) if rank else None
    x, bias = torch.randn(m, spec.k, generator=rng).to(dtype), torch.randn(spec.n, generator=rng).to(dtype)
    weight = packed(problem, mode, dtype, left)
    y = call.linear(x, weight, bias=bias, activation=activation, low_x=low_x)
    assert (y.dtype, y.shape) == (dtype, (m, spec.n))

    read = rounded(x, spec) if mode == "int8" else x.double().numpy()
    wanted, size = read @ problem.dense.T, np.abs(read) @ np.abs(problem.dense).T
    if left is not None and low_x is not None:
        wanted += low_x.double().numpy() @ left.double().numpy().T
        size += np.abs(low_x.double().numpy()) @ np.abs(left.double().numpy()).T
    wanted, size = wanted + bias.double().numpy(), size + np.abs(bias.double().numpy())
    # Table entries of bfloat16 are rounded, and beyond TILE_M W and the steps after the product are rounded too.
    decoded = mode == "exact" and m > launch.TILE_M
    entries = ROUNDING[dtype] if decoded or launch.kind_of(spec, torch.uint8, dtype, mode) in ("bf16", "f16") else 0.0
    sums = 2.0**-24 * (spec.k / 16 + 64) + entries + (4 * ROUNDING[dtype] if decoded else 0.0)
    wanted_y = activated(wanted, activation)
    bound = 1.2 * size * sums + 1.001 * np.abs(wanted_y) * ROUNDING[dtype] + 2.0**-24
    assert (np.abs(y.double().numpy() - wanted_y) <= bound).all()
    assert started.names[0] == "repack"


def test_few_many_and_very_many_rows_take_their_kernels(started: Started) -> None:
    problem = draw(LutSpec(n=32, k=256 * 8, bits=4, zero=128.0, unit=0.01))
    weight = packed(problem, "exact", torch.float16)
    for m in (1, 16, 17, 129):
        call.linear(torch.randn(m, problem.spec.k).half(), weight)
    assert started.names == [
        "repack",
        "gemv_r16_m8_f16b_b4",
        "gemv_r16_m16_f16b_b4",
        *("tile_r128_m32_f16b_b4", "reduce"),
        "dense",
    ]


def test_unaligned_rows_are_filled_up_first_and_give_the_same(started: Started) -> None:
    problem = draw(LutSpec(n=16, k=64, bits=4, zero=128.0, unit=0.01))
    weight = packed(problem, "exact", torch.float16)
    wide = torch.randn(3, 65).half()
    shifted = call.linear(wide[:, 1:], weight)
    assert started.names == ["repack", "pad", "gemv_r16_m8_f16b_b4"]
    assert torch.equal(shifted, call.linear(wide[:, 1:].contiguous(), weight))
    assert "pad" not in started.names[3:]
    transposed = torch.randn(64, 3).half().T
    assert torch.equal(call.linear(transposed, weight), call.linear(transposed.contiguous(), weight))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (2, 3, 64)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...], started: Started) -> None:
    problem = draw(LutSpec(n=16, k=64, bits=4, zero=1.0, unit=0.01))
    weight = packed(problem, "exact", torch.float16)
    x = torch.randn(shape).half()
    y = call.linear(x, weight)
    assert y.shape == (*shape[:-1], 16)
    assert torch.equal(y.reshape(-1, 16), call.linear(x.reshape(-1, 64), weight))


def test_codes_are_packed_on_the_device_as_in_python(started: Started) -> None:
    for bits in (2, 3, 4):
        spec = LutSpec(n=35, k=100, bits=bits, group=48)
        problem = draw(spec, halves=True)
        weight = packed(problem, "exact", torch.float16)
        codes = layout.unpack(problem.parts.codes, spec)
        assert torch.equal(weight.codes, layout_mma16.pack(codes, spec))
        assert weight.kind == "f16"


@pytest.mark.parametrize(
    ("spec", "mode", "dtype", "table", "reason"),
    [
        (LutSpec(n=1, k=1, bits=5), "exact", torch.float16, torch.uint8, "codes of 5 bits, the CUDA kernels have 2, 3"),
        (LutSpec(n=1, k=1, bits=4), "exact", torch.float32, torch.uint8, "float32 in int8 mode only; use float16 or"),
        (LutSpec(n=1, k=1, bits=4), "exact", torch.float64, torch.uint8, "no activations of float64"),
        (LutSpec(n=1, k=1, bits=4), "int8", torch.float16, torch.float16, "a table of bytes, this one is float16"),
        (LutSpec(n=1, k=1, bits=4, zero=0.5), "int8", torch.float16, torch.uint8, "zero point 0.5 is not whole"),
        (LutSpec(n=9, k=1, bits=4, table_rows=8), "exact", torch.bfloat16, torch.uint8, "each table serves 8 rows"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused_with_its_reason(
    spec: LutSpec, mode: Mode, dtype: torch.dtype, table: torch.dtype, reason: str
) -> None:
    assert reason in call.refusal(spec, mode, dtype, table)


def test_a_wrong_tensor_that_is_not_on_a_gpu_is_refused() -> None:
    empty = {name: torch.zeros(0, dtype=torch.uint8) for name in ("codes", "table")}
    weight = call.DeviceWeight(
        spec=LutSpec(n=16, k=64, bits=4), kind="f16", **empty, scale=torch.zeros(0), values=torch.zeros(0)
    )
    with pytest.raises(ValueError, match="take tensors on a GPU, this one is on cpu"):
        call.linear(torch.zeros(1, 64).half(), weight)


def test_arguments_reach_the_driver_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    function = driver.Function("paredown_pad", 1, 7, 0)
    monkeypatch.setattr(load, "function", lambda *asked: seen.append(asked) or function)
    monkeypatch.setattr(driver, "launch", lambda *given: seen.append(given))
    call._function.cache_clear()
    spec, x, out = LutSpec(n=16, k=70, bits=4), torch.zeros(2, 70).half(), torch.zeros(2, 128).half()
    start = launch.pad(spec, 2)
    values = {"x": x, "m": 2, "k": 70, "group": 70, "group_steps": 3, "units": 1, "x_stride": 70, "out": out, "n": 0}
    for _ in range(2):
        call._start("pad", start, values, call.Place(device=1, processors=3, stream=55))
    arguments = [x.data_ptr(), 2, 70, 70, 3, 1, 70, out.data_ptr()]
    given = (function, start.grid, start.block, arguments, 55)
    assert seen == [("prepare.cu", "paredown_pad", 1, 0), given, given]
    call._function.cache_clear()


def test_a_kernel_is_not_loaded_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call._function.cache_clear()
    with pytest.raises(driver.CudaError, match="cannot be while a graph is captured: call it once before"):
        call._function("prepare.cu", "paredown_pad", 0, 0)


# --- the operator


def operation(
    problem: Problem, x: Tensor, mode: Mode = "exact", low: lut_linear.LowRank | None = None
) -> lut_linear.Call:
    return lut_linear.Call(
        x=x, parts=problem.parts, spec=problem.spec, mode=mode, activation="relu", bias=None, low=low
    )


SPEC = LutSpec(n=16, k=64, bits=4, zero=128.0, unit=0.01)


def test_the_operator_packs_a_weight_once_and_again_when_it_was_written(started: Started) -> None:
    problem, other = draw(SPEC), draw(SPEC, seed=1)
    x = torch.randn(2, 64).half()
    first = op.run(operation(problem, x))
    assert torch.equal(op.run(operation(problem, x)), first)
    assert started.names == ["repack", "gemv_r16_m8_f16b_b4", "gemv_r16_m8_f16b_b4"]
    problem.parts.codes.copy_(other.parts.codes)
    problem.parts.table.copy_(other.parts.table)
    problem.parts.scale.copy_(other.parts.scale)
    assert torch.equal(op.run(operation(problem, x)), op.run(operation(other, x)))
    assert started.names.count("repack") == 3
    assert len(op._PACKED[problem.parts.codes]) == 1


def test_a_packed_weight_goes_with_its_codes(started: Started) -> None:
    before = len(op._PACKED)
    problem = draw(SPEC)
    op.run(operation(problem, torch.randn(1, 64).half()))
    assert len(op._PACKED) == before + 1
    del problem
    assert len(op._PACKED) == before


def test_weights_of_inference_mode_have_no_versions_and_work(started: Started) -> None:
    with torch.inference_mode():
        problem = draw(SPEC)
        x = torch.randn(1, 64).half()
        assert torch.equal(op.run(operation(problem, x)), op.run(operation(problem, x)))
    assert started.names.count("repack") == 1


@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_the_operator_is_the_reference_within_rounding(mode: Mode, started: Started) -> None:
    problem, left = draw(SPEC), draw(LutSpec(n=16, k=5, bits=8, zero=128.0, unit=0.01), seed=3)
    x, t = torch.randn(3, 64).half(), torch.randn(3, 5).half()
    low = lut_linear.LowRank(t=t, parts=left.parts, spec=left.spec)
    call_ = operation(problem, x, mode, low)
    y, wanted = op.run(call_), lut_linear.reference(call_)
    torch.testing.assert_close(y, wanted, rtol=2e-3, atol=2e-2)
    assert y.dtype == torch.float16


def test_what_has_no_kernel_is_computed_by_the_reference_with_a_warning(started: Started) -> None:
    problem = draw(replace(SPEC, bits=8))
    call_ = operation(problem, torch.randn(1, 64).half())
    op._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="decodes W at every call on this GPU: codes of 8 bits, the CUDA kernels"):
        assert torch.equal(op.run(call_), lut_linear.reference(call_))
    op.run(call_)
    assert started.names == []


def test_where_no_code_can_be_loaded_the_reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise load.NoKernelsError("no CUDA kernels for compute capability 7.5")

    monkeypatch.setattr(call, "_start", nothing)
    monkeypatch.setattr(call, "_place", lambda x: call.Place(device=0, processors=3, stream=0))
    op._warn.cache_clear()
    call_ = operation(draw(SPEC), torch.randn(1, 64).half())
    with pytest.warns(RuntimeWarning, match=r"no CUDA kernels for compute capability 7\.5"):
        assert torch.equal(op.run(call_), lut_linear.reference(call_))


def test_a_weight_is_not_packed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(driver.CudaError, match="a weight is not packed yet, and cannot be while a graph is captured"):
        op.run(operation(draw(SPEC), torch.randn(1, 64).half()))


def test_the_dispatcher_has_a_kernel_for_cuda() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("paredown::lut_linear", "CUDA")
