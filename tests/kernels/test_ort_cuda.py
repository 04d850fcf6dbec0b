"""Our operators on onnxruntime's CUDA provider, without a GPU: a driver that takes notes, kernels in emulation.

The kernels are started as torch starts them (kernels/cuda/call.py, which test_cuda_call.py proves), launch by launch.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from paredown.kernels import layout, layout_mma16
from paredown.kernels.cuda import cubins, launch, launch_header, load
from paredown.kernels.lut_spec import LutSpec
from paredown.kernels.onnx_ops import LINEAR_OPS

from .cuda_emulation import Emulator
from .ort_gpu import (
    CPU,
    CUDA,
    KINDS,
    STREAM,
    Gpu,
    copy_library,
    draw_inputs,
    fake_driver,
    head,
    make,
    quick_layer,
    tensor_value,
    write_cubins,
)
from .ort_gpu_starts import assert_same_starts, torch_starts
from .ort_mock import FLOAT16, HOST_INPUT, Mock, OrtError, input_memory
from .ort_models import ROUNDING, SMALLEST, Case, layer

SMALL = Case(spec=LutSpec(n=16, k=32, bits=4, zero=128.0), dtype="float16")
DYNAMIC = Case(spec=LutSpec(n=40, k=160, bits=4, group=32, zero=128.0), dtype="float16", int8=True)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def module_gpu(library: Path, fake: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    return Gpu(copy_library(library, tmp_path_factory.mktemp("gpu")), fake)


@pytest.fixture
def gpu(module_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Give the one GPU of all tests, which must have its memory back when a test is over."""
    for name in ("CAPABILITY", "DRIVER", "PROCESSORS", "FAILURE", "LOG"):
        monkeypatch.delenv(f"PAREDOWN_FAKE_{name}", raising=False)
    module_gpu.starts.clear()
    module_gpu.mock.stream = STREAM
    module_gpu.open()
    yield module_gpu
    module_gpu.emulator = None
    assert module_gpu.memory() == {}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"), bulk=False)


# --- against torch


@st.composite
def cases(draw: st.DrawFn) -> Case:
    int8 = draw(st.booleans())
    dtype = draw(st.sampled_from(("float16", "bfloat16", "float32") if int8 else ("float16", "bfloat16")))
    n, k = draw(st.sampled_from(((37, 70), (300, 96), (16, 1024), (2100, 40), (128, 3000), (64, 4100))))
    table_rows = draw(st.sampled_from((0, 16, 48, 64)))
    spec = LutSpec(
        n=n,
        k=k,
        bits=draw(st.sampled_from((2, 3, 4))),
        group=draw(st.sampled_from((0, 20, 32, 64, 96, 128, 160, 256, 5000))),
        table_rows=table_rows,
        zero=draw(st.sampled_from((128.0, 0.0, 7.0))) if int8 else draw(st.sampled_from((128.0, 1.5))),
        unit=1 / 127,
    )
    return Case(
        spec=spec,
        dtype=dtype,
        int8=int8,
        activation=draw(st.sampled_from(("", "Relu", "Gelu", "GeluTanh", "Silu"))),
        rank=0 if dtype == "float32" else draw(st.sampled_from((0, 1, 32, 40))),
        biased=draw(st.booleans()),
        scale=draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))),
        table=torch.uint8 if int8 else draw(st.sampled_from((torch.uint8, torch.float16))),
    )


@given(case=cases(), m=st.sampled_from((1, 8, 9, 16, 17, 32, 33, 128)), processors=st.sampled_from((1, 8, 20, 132)))
@example(case=replace(SMALL, spec=replace(SMALL.spec, zero=1.5)), m=1, processors=1)
@example(case=replace(SMALL, spec=replace(SMALL.spec, k=100)), m=1, processors=1)
@example(case=replace(SMALL, spec=replace(SMALL.spec, k=4100)), m=17, processors=132)
@example(case=replace(DYNAMIC, spec=replace(SMALL.spec, k=4096)), m=128, processors=132)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels_are_started_as_torch_starts_them(gpu: Gpu, case: Case, m: int, processors: int) -> None:
    gpu.starts.clear()
    one, (x, t) = quick_layer(case, m), draw_inputs(case, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAREDOWN_FAKE_PROCESSORS", str(processors))
        with make(gpu, one) as kernel:
            kernel.run(x, t)
            assert_same_starts(gpu, torch_starts(one, x, t, processors))


@pytest.mark.parametrize("m", [129, 1000])
def test_more_rows_than_torch_gives_to_the_tiles_take_them_too(gpu: Gpu, m: int) -> None:
    case = Case(spec=LutSpec(n=300, k=96, bits=4, zero=128.0, unit=0.01), dtype="float16", activation="Silu")
    with make(gpu, quick_layer(case, 2)) as kernel:
        kernel.run(*draw_inputs(case, m))
    how = launch.linear(case.spec, m, "f16b", launch.TILES[1])
    assert [start.name for start in gpu.starts] == ["paredown_repack", how.name]
    assert gpu.starts[1].sizes == (*how.grid, *how.block, how.shared)
    assert (gpu.starts[1].arguments["m"], gpu.starts[1].arguments["activation"]) == (m, 4)


# --- what it computes


FAST = (Case(spec=LutSpec(n=40, k=150, bits=4, group=40, zero=128.0, unit=0.01), dtype="float16", rank=5),)
SLOW = (
    Case(spec=LutSpec(n=33, k=90, bits=3, group=40, zero=128.0, unit=0.01), dtype="float32", int8=True),
    Case(spec=LutSpec(n=64, k=136, bits=2, table_rows=32, zero=2.0, unit=0.02), dtype="bfloat16", rank=33),
)
"""Each takes another unit, which is compiled for the emulation in some 4 s."""


@pytest.mark.parametrize("case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_product_is_that_of_float64(gpu: Gpu, emulator: Emulator, case: Case) -> None:
    gpu.emulator = emulator
    for m, activation in ((1, "GeluTanh"), (11, ""), (20, "Relu")):
        one = layer(replace(case, activation=activation), m)
        x, t = draw_inputs(case, m, m)
        with make(gpu, one) as kernel:
            codes = next(start.arguments["codes"] for start in gpu.starts)
            packed = layout_mma16.pack(layout.unpack(one.weight.codes, case.spec), case.spec)
            assert ctypes.string_at(codes, packed.numel()) == packed.numpy().tobytes()
            y = kernel.run(x, t).double().numpy()
        low = np.zeros((m, 1)) if t is None else t.double().numpy()
        wanted, bound = one.expected(x.double().numpy(), low)
        if one.left is not None:  # its entries are rounded to the type of x
            bound = bound + 1.2 * ROUNDING[case.dtype] * np.abs(low) @ np.abs(one.left.values).T
        assert (np.abs(y - wanted) <= bound + SMALLEST[case.dtype]).all()
        gpu.starts.clear()


# --- what onnxruntime is told


def test_every_operator_is_there_for_both_providers(gpu: Gpu) -> None:
    """But float32, which the kernels multiply only rounded to bytes and without a low-rank term."""
    found = {key[:2] for key in gpu.mock.operators if key[2] == CUDA}
    wanted = {
        (name, kind)
        for name, op in LINEAR_OPS.items()
        for dtype, kind in KINDS.items()
        if dtype != "float32" or (op.mode == "int8" and not op.low_rank)
    }
    assert found == wanted
    assert {key[:2] for key in gpu.mock.operators if key[2] == CPU} >= {(n, k) for n in LINEAR_OPS for k in (1, 10, 16)}


def test_weights_are_asked_for_in_host_memory(gpu: Gpu) -> None:
    host, device = HOST_INPUT, 0
    for name, wanted in {
        "LutLinear": [device, host, host, host, host],
        "LutPlanesLinearInt8LowRankSilu": [device, host, host, host, host, device, host, host, host],
    }.items():
        assert input_memory(gpu.mock.operators[name, FLOAT16, CUDA]) == wanted
        assert set(input_memory(gpu.mock.operators[name, FLOAT16, CPU])) == {device}


def test_without_the_provider_there_are_no_operators_for_it(library: Path) -> None:
    mock = Mock(providers=(CPU,))
    mock.register(library)
    assert {key[2] for key in mock.operators} == {CPU}


# --- memory and code


def test_a_run_allocates_only_when_it_is_the_largest_of_its_stream(gpu: Gpu) -> None:
    one = quick_layer(DYNAMIC, 0)
    with make(gpu, one) as kernel:
        held = len(gpu.memory())
        for m, stream, more in ((20, 1, 1), (3, 1, 1), (20, 1, 1), (20, 2, 2), (100, 1, 3), (101, 1, 3)):
            gpu.mock.stream = stream
            kernel.run(*draw_inputs(DYNAMIC, m))
            assert len(gpu.memory()) == held + more, m


def test_weights_share_code_and_scratch(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_FAKE_LOG", str(tmp_path / "notes"))
    with make(gpu, quick_layer(DYNAMIC, 0)) as first, make(gpu, quick_layer(DYNAMIC, 1)) as second:
        first.run(*draw_inputs(DYNAMIC, 2))
        second.run(*draw_inputs(DYNAMIC, 2))
        assert len(gpu.memory()) == 3
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes.count("load in 1600: 90a ") == 2


def test_kernels_have_leave_for_their_shared_memory(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_FAKE_LOG", str(tmp_path / "notes"))
    with make(gpu, quick_layer(SMALL, 0)):
        notes = (tmp_path / "notes").read_text().splitlines()
    large = {form.name: launch.shared(form, 4, "f16b") for form in launch.FORMS}
    wanted = [f"attribute 8 of paredown_{name}_f16b_b4: {size}" for name, size in large.items() if size > 48 * 1024]
    assert [note for note in notes if note.startswith("attribute")] == wanted != []


def test_rows_that_are_not_aligned_are_filled_up_first(gpu: Gpu) -> None:
    x = torch.randn(33, generator=torch.Generator().manual_seed(0)).half()[1:].reshape(1, 32)
    with make(gpu, quick_layer(SMALL, 0)) as kernel:
        kernel.run(x, None)
        kernel.run(draw_inputs(SMALL, 1)[0], None)
    names = [start.name for start in gpu.starts]
    assert names == ["paredown_repack", "paredown_pad", *["paredown_gemv_r16_m8_f16b_b4"] * 2]


def test_the_gpu_is_that_of_the_session(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_FAKE_LOG", str(tmp_path / "notes"))
    with make(gpu, quick_layer(SMALL, 0), device=1):
        assert set((tmp_path / "notes").read_text().split(": ")[0].splitlines()) == {"load in 1616"}
    with pytest.raises(OrtError, match='LutLinear "layer": cuDeviceGet of GPU 7: status 101'):
        make(gpu, quick_layer(SMALL, 0), device=7)


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 89, 90, 100, 110])
@pytest.mark.parametrize("version", [11080, 12000, 12060, 13000])
def test_the_same_code_is_chosen_as_for_torch(
    gpu: Gpu, capability: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CAPABILITY", capability), ("DRIVER", version), ("LOG", tmp_path / "notes")):
        monkeypatch.setenv(f"PAREDOWN_FAKE_{name}", str(value))
    device = load.Device(capability=capability, driver=(version // 1000, version % 1000 // 10))
    built = [entry for entry in cubins.manifest(gpu.folder / "cuda" / "cubin") if entry.unit == "prepare.cu"]
    cubin = load.best_cubin(built, device)
    ptx = device.driver >= (12, 6) and capability >= 80
    if cubin is None and not ptx:
        wanted = f"none of the built CUDA kernels suits compute capability {capability / 10:.1f} with a driver of CUDA "
        with pytest.raises(OrtError, match=wanted + ".".join(map(str, device.driver))):
            make(gpu, quick_layer(SMALL, 0))
        return
    with make(gpu, quick_layer(SMALL, 0)):
        notes = (tmp_path / "notes").read_text().splitlines()
    wanted = cubins.VIRTUAL if cubin is None else cubin.architecture
    assert [note for note in notes if note.startswith("load")] == [f"load in 1600: {head(wanted)}"] * 2


def test_what_is_missing_is_named_with_what_to_do(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    one = quick_layer(SMALL, 0)
    place = gpu.folder / "cuda" / "cubin"
    tell = "build them with python -m paredown.kernels.cuda.cubins"
    try:
        (place / cubins.MANIFEST).write_text('[{"file": "a"}]')
        with pytest.raises(
            OrtError, match='"layer": the manifest of the CUDA kernels has an entry without unit; ' + tell
        ):
            make(gpu, one)
        write_cubins(gpu.folder, digest="another")
        with pytest.raises(OrtError, match="were made of other sources than the library; " + tell):
            make(gpu, one)
        write_cubins(gpu.folder)
        (place / "prepare.sm_90a").unlink()
        with pytest.raises(OrtError, match=r"cannot read prepare\.sm_90a; " + tell):
            make(gpu, one)
        shutil.rmtree(place)
        with pytest.raises(OrtError, match="there are no CUDA kernels beside the library; " + tell):
            make(gpu, one)
    finally:
        write_cubins(gpu.folder)
    monkeypatch.setenv("PAREDOWN_FAKE_FAILURE", "cuMemAlloc_v2")
    with pytest.raises(OrtError, match=r"cuMemAlloc of \d+ bytes: CUDA_ERROR_ILLEGAL_ADDRESS, as the test asked"):
        make(gpu, one)


def test_a_launch_that_fails_is_named(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(gpu, quick_layer(SMALL, 0)) as kernel:
        monkeypatch.setenv("PAREDOWN_FAKE_FAILURE", "cuLaunchKernel")
        with pytest.raises(
            OrtError, match="cuLaunchKernel of paredown_gemv_r16_m8_f16b_b4: CUDA_ERROR_ILLEGAL_ADDRESS"
        ):
            kernel.run(*draw_inputs(SMALL, 1))
        monkeypatch.delenv("PAREDOWN_FAKE_FAILURE")
        assert kernel.run(*draw_inputs(SMALL, 1)).shape == (1, 16)
        with pytest.raises(OrtError, match="the last size of x is 31, W takes 32 inputs"):
            kernel.run(torch.zeros(1, 31).half(), None)
        assert kernel.run(torch.zeros(0, 32).half(), None).shape == (0, 16)


def test_a_machine_without_driver_says_so(library: Path, tmp_path: Path) -> None:
    gpu = Gpu(copy_library(library, tmp_path, driver=b"libnone.so.1"), None)
    gpu.open()
    with pytest.raises(OrtError, match=r'paredown::LutLinear "layer": there is no CUDA driver here: libnone\.so\.1'):
        make(gpu, quick_layer(SMALL, 0))


def test_a_driver_that_does_not_start_is_asked_again(
    library: Path, fake: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(copy_library(library, tmp_path), fake)
    gpu.open()
    monkeypatch.setenv("PAREDOWN_FAKE_FAILURE", "cuInit")
    with pytest.raises(OrtError, match="cuInit: CUDA_ERROR_ILLEGAL_ADDRESS"):
        make(gpu, quick_layer(SMALL, 0))
    monkeypatch.delenv("PAREDOWN_FAKE_FAILURE")
    with make(gpu, quick_layer(SMALL, 0)):
        assert [start.name for start in gpu.starts] == ["paredown_repack"]


def test_what_the_kernels_do_not_have_is_refused_at_load(gpu: Gpu) -> None:
    eight = quick_layer(Case(spec=LutSpec(n=16, k=32, bits=8, zero=128.0), dtype="float16"), 0)
    with pytest.raises(OrtError, match="codes of 8 bits, the CUDA kernels have 2, 3 and 4; run the model without the"):
        make(gpu, eight)
    one = quick_layer(SMALL, 0)
    for missing in range(1, 5):
        constants = [tensor_value(part) for part in (one.bias, *one.weight.parts, one.bias)]
        constants[missing] = None
        with pytest.raises(OrtError, match="take codes, tables, scales and bias that are constants of the same graph"):
            make(gpu, one, constants=constants)


def test_the_header_is_what_the_generator_writes() -> None:
    assert launch_header.PATH.read_text() == launch_header.text(), (
        "run python -m paredown.kernels.cuda.launch_header, then build the library again"
    )
