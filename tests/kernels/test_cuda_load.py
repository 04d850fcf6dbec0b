"""Loading CUDA kernels without a GPU: cubins, NVRTC, the cache, and a driver that only takes notes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown.kernels.cuda import cubins, disk_cache, driver, image, load, nvrtc, sources, state, units

TOY = """
#include "toy.cuh"
extern "C" __global__ void toy(const float *x, float *y, int n) {
  const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = twice(x[i]);
}
"""
HEADERS = {
    "toy.cuh": '#include "inner/deep.h"\n',
    "inner/deep.h": '#pragma once\n#include "beside.h"\n',
    "inner/beside.h": "#pragma once\n__device__ inline float twice(float x) { return 2 * x; }\n",
}
COMPILERS = nvrtc.compilers()

needs_nvrtc = pytest.mark.skipif(not COMPILERS, reason="NVRTC is absent: pip install nvidia-cuda-nvrtc")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the path")
needs_compiler = pytest.mark.skipif(
    not (COMPILERS or shutil.which("nvcc")), reason="neither nvcc nor NVRTC is here to compile CUDA"
)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put one small unit in the place of ours; return the folder of its sources."""
    folder = tmp_path / "kernels" / "cuda"
    for name, text in {**HEADERS, "toy.cu": TOY}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(units, "FOLDER", folder)
    monkeypatch.setattr(cubins, "FOLDER", folder / "cubin")
    monkeypatch.setattr(cubins, "UNITS", ("toy.cu",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


# --- sources


def test_a_unit_is_read_with_all_that_it_includes(toy: Path) -> None:
    source = units.read("toy.cu")
    assert source.text == TOY
    assert source.headers == {
        "toy.cuh": HEADERS["toy.cuh"],
        "inner/deep.h": HEADERS["inner/deep.h"],
        "beside.h": HEADERS["inner/beside.h"],
    }


def test_a_change_of_any_header_changes_the_digest(toy: Path) -> None:
    before = units.digest(units.read("toy.cu"))
    (toy / "inner/beside.h").write_text(HEADERS["inner/beside.h"] + "\n")
    assert units.digest(units.read("toy.cu")) != before


@needs_compiler
def test_the_compiler_names_a_header_that_is_missing(toy: Path) -> None:
    (toy / "inner/beside.h").unlink()
    assert "beside.h" not in units.read("toy.cu").headers
    with pytest.raises(cubins.CubinError, match=r"beside\.h"):
        cubins.build(toy / "cubin", ("sm_80",))


@pytest.mark.parametrize("unit", sources.UNITS)
def test_our_units_need_no_header_of_cuda(unit: str) -> None:
    """NVRTC has none: cuda_fp16.h comes with another wheel, which need not be there."""
    source = units.read(unit)
    included = {
        name for text in (source.text, *source.headers.values()) for name in re.findall("#include <(.*)>", text)
    }
    assert included <= {"stdint.h"}


# --- what an image says of itself


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_110", "sm_120"])
def test_the_head_of_a_cubin_names_its_architecture_and_generation(toy: Path, architecture: str) -> None:
    made = toy / "toy.cubin"
    subprocess.run(["nvcc", "-cubin", f"-arch={architecture}", "-o", made, toy / "toy.cu"], check=True)
    (nvcc,) = [found for found in cubins.compilers() if isinstance(found, cubins.Nvcc)][:1]
    header = image.read_header(made.read_bytes())
    assert (header.capability, header.generation) == (image.capability(architecture), nvcc.version[0])


def test_the_heads_of_cubins_of_both_generations() -> None:
    """As NVRTC 12.6 and 13.0 wrote them for sm_87 and sm_90a."""
    for text, capability, generation in [
        ("7f454c460201013307000000000000000200be007e0000000000000000000000800b0000000000008008000000000000", 87, 12),
        ("7f454c460201014108000000000000000200be00010000000000000000000000000d0000000000008009000000000000", 87, 13),
    ]:
        flags = {12: "57055700", 13: "04570006"}[generation]
        header = image.read_header(bytes.fromhex(text + flags))
        assert (header.capability, header.generation) == (capability, generation)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"MZ" + bytes(80), b".version 8.5\n" * 9])
def test_what_is_no_cubin_is_refused(data: bytes) -> None:
    with pytest.raises(image.ImageError, match="no cubin"):
        image.read_header(data)


def test_a_generation_that_we_do_not_know_is_refused() -> None:
    head = b"\x7fELF\x02\x01\x01\x50\x09" + bytes(9) + (190).to_bytes(2, "little") + bytes(40)
    with pytest.raises(image.ImageError, match="OS/ABI 0x50, version 9 is unknown"):
        image.read_header(head)


@pytest.mark.parametrize(
    ("architecture", "runs", "runs_not"),
    [
        ("sm_80", {80, 86, 89}, {75, 87, 90, 110}),
        ("sm_86", {86, 89}, {80, 87, 90}),
        ("sm_87", {87}, {80, 86, 89, 90}),
        ("sm_90a", {90}, {89, 100, 120}),
        ("sm_110", {110}, {100, 120}),
        ("sm_120", {120, 121}, {110, 90}),
    ],
)
def test_which_devices_run_an_architecture(architecture: str, runs: set[int], runs_not: set[int]) -> None:
    assert {device for device in runs | runs_not if image.runs_on(architecture, device)} == runs


@pytest.mark.parametrize("name", ["80", "sm_8", "compute_80", "sm_90x", ""])
def test_a_bad_architecture_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no architecture"):
        image.capability(name)


# --- the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "paredown" / "cuda"


def test_what_was_made_once_is_read_afterwards(cache: Path) -> None:
    made: list[int] = []
    for _ in range(3):
        assert disk_cache.cached("a", lambda: made.append(0) or b"code") == b"code"  # type: ignore[func-returns-value]
    assert len(made) == 1
    assert [path.name for path in cache.iterdir()] == ["a.image"]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_made_anew(cache: Path, damage: bytes | None) -> None:
    disk_cache.cached("a", lambda: b"old code")
    whole = (cache / "a.image").read_bytes()
    (cache / "a.image").write_bytes(whole[:-1] + b"?" if damage is None else damage)
    assert disk_cache.cached("a", lambda: b"new code") == b"new code"
    assert disk_cache.cached("a", lambda: b"unused") == b"new code"


def test_nothing_is_left_where_making_fails(cache: Path) -> None:
    def fail() -> bytes:
        raise nvrtc.NvrtcError("refused")

    with pytest.raises(nvrtc.NvrtcError):
        disk_cache.cached("a", fail)
    assert not cache.exists()


def test_the_cache_keeps_what_was_read_last_within_its_limit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "LIMIT", 3 * 132)
    for age, name in enumerate("abc"):
        disk_cache.cached(name, lambda: bytes(100))
        os.utime(cache / f"{name}.image", (age, age))
    disk_cache.cached("a", lambda: b"not made")
    disk_cache.cached("d", lambda: bytes(100))
    assert sorted(path.name for path in cache.iterdir()) == ["a.image", "c.image", "d.image"]


def test_a_folder_that_cannot_be_written_is_said_and_not_fatal(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "paredown").write_text("a file in the way")
    with pytest.warns(RuntimeWarning, match="compiled CUDA kernels are not kept"):
        assert disk_cache.cached("a", lambda: b"code") == b"code"


def test_threads_read_whole_files_only(cache: Path) -> None:
    wanted = {name: name.encode() * 10000 for name in "abcd"}
    found: list[bool] = []

    def read_all() -> None:
        found.extend(disk_cache.cached(name, lambda name=name: wanted[name]) == wanted[name] for name in wanted)

    threads = [threading.Thread(target=read_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 32
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize("base", ["", "relative/path"])
def test_the_folder_is_in_home_where_no_absolute_one_is_named(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert disk_cache.folder() == Path.home() / ".cache" / "paredown" / "cuda"


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(RuntimeWarning, match=r"not kept: .*; set XDG_CACHE_HOME"):
        assert disk_cache.cached("a", lambda: b"code") == b"code"


@given(st.lists(st.binary(max_size=4), max_size=5), st.lists(st.binary(max_size=4), max_size=5))
def test_different_parts_have_different_keys(first: list[bytes], second: list[bytes]) -> None:
    assert (disk_cache.key(*first) == disk_cache.key(*second)) == (first == second)


# --- NVRTC


@needs_nvrtc
@pytest.mark.parametrize("compiler", COMPILERS, ids=lambda found: ".".join(map(str, found.version)))
def test_nvrtc_compiles_without_a_driver(toy: Path, compiler: nvrtc.Compiler) -> None:
    for architecture in ("sm_80", "sm_90a"):
        data = nvrtc.compile_cubin(units.read("toy.cu"), architecture, sources.FLAGS, compiler)
        header = image.read_header(data)
        assert (header.capability, header.generation) == (image.capability(architecture), compiler.version[0])
    assert b".entry toy" in nvrtc.compile_ptx(units.read("toy.cu"), "compute_80", sources.FLAGS, compiler)


@needs_nvrtc
def test_what_nvrtc_refuses_is_shown_with_its_log(toy: Path) -> None:
    (toy / "toy.cu").write_text('extern "C" __global__ void toy() { int broken = ; }')
    with pytest.raises(nvrtc.NvrtcError, match=r"does not compile toy\.cu for sm_80:\n(.|\n)*expected an expression"):
        nvrtc.compile_cubin(units.read("toy.cu"), "sm_80", sources.FLAGS, COMPILERS[0])
    with pytest.raises(nvrtc.NvrtcError, match=r"does not compile toy\.cu for sm_20:\n(.|\n)*architecture"):
        nvrtc.compile_cubin(units.read("toy.cu"), "sm_20", sources.FLAGS, COMPILERS[0])


@needs_nvrtc
@pytest.mark.parametrize("unit", sources.UNITS)
@pytest.mark.slow
def test_nvrtc_compiles_every_unit(unit: str) -> None:
    for compiler in COMPILERS:
        data = nvrtc.compile_cubin(units.read(unit), "sm_80", sources.FLAGS, compiler)
        assert image.read_header(data).capability == 80


@needs_nvrtc
def test_without_cubins_a_device_gets_what_nvrtc_compiles_and_keeps(toy: Path, tmp_path: Path) -> None:
    device = load.Device(capability=80, driver=(COMPILERS[0].version[0], 0))
    first = load.find_image("toy.cu", device)
    assert first.origin == f"sm_80, compiled here by NVRTC {'.'.join(map(str, COMPILERS[0].version))}"
    assert len(list((tmp_path / "cache/paredown/cuda").glob("*.image"))) == 1
    assert load.find_image("toy.cu", device) == first


def test_wheels_are_looked_for_in_every_folder_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia/cu13/lib").mkdir(parents=True)
    (tmp_path / "nvidia/cuda_nvrtc/lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert nvrtc.library_folders()[:2] == [tmp_path / "nvidia/cu13/lib", tmp_path / "nvidia/cuda_nvrtc/lib"]


def test_a_library_of_another_machine_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for major in nvrtc.MAJORS:
        (tmp_path / f"libnvrtc.so.{major}").write_bytes(b"not for this processor")
    monkeypatch.setattr(nvrtc, "library_folders", lambda: [tmp_path])
    monkeypatch.setattr(nvrtc, "NAME", "libnvrtc.so")
    nvrtc.compilers.cache_clear()
    assert all(str(tmp_path) not in found.path for found in nvrtc.compilers())
    nvrtc.compilers.cache_clear()


# --- ahead of time


@needs_compiler
def test_cubins_are_built_named_and_loaded(toy: Path) -> None:
    (toy / "cubin").mkdir()
    (toy / "cubin/old.sm_70.cubin").write_bytes(b"of an earlier build")
    made = cubins.build(toy / "cubin", ("sm_80", "sm_86", "sm_90a"))
    assert [entry.file for entry in made] == [
        *("toy.sm_80.cubin", "toy.sm_86.cubin", "toy.sm_90a.cubin"),
        "toy.compute_80.ptx",
    ]
    assert sorted(path.name for path in (toy / "cubin").iterdir()) == sorted(
        ["manifest.json", *(entry.file for entry in made)]
    )
    assert cubins.manifest(toy / "cubin") == made
    for entry in made[:3]:
        header = image.read_header((toy / "cubin" / entry.file).read_bytes())
        assert (header.capability, header.generation) == (image.capability(entry.architecture), entry.generation)
    code = load.find_image("toy.cu", load.Device(capability=89, driver=(13, 0)))
    assert code.origin == f"sm_86, built ahead by {made[1].compiler}"
    assert code.data == (toy / "cubin/toy.sm_86.cubin").read_bytes()


@needs_compiler
def test_cubins_of_other_sources_are_not_used(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.build(toy / "cubin", ("sm_80",))
    monkeypatch.setattr(nvrtc, "compilers", lambda: ())
    device = load.Device(capability=80, driver=(13, 0))
    assert load.find_image("toy.cu", device).origin.startswith("sm_80, built ahead by")
    (toy / "toy.cu").write_text(TOY + "// changed\n")
    with pytest.raises(load.NoKernelsError, match="no cubins were built"):
        load.find_image("toy.cu", device)


@needs_compiler
def test_ptx_is_the_last_resort(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cubins.build(toy / "cubin", ("sm_80",))
    monkeypatch.setattr(nvrtc, "compilers", lambda: ())
    code = load.find_image("toy.cu", load.Device(capability=103, driver=(99, 0)))
    assert code.origin == f"compute_80, built ahead by {made[-1].compiler}"
    assert b".target sm_80" in code.data
    with pytest.raises(load.NoKernelsError, match="none of the built cubins suits it; there is no NVRTC"):
        load.find_image("toy.cu", load.Device(capability=75, driver=(99, 0)))


def test_without_a_compiler_the_build_says_what_to_install(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "compilers", lambda: ())
    with pytest.raises(cubins.CubinError, match=r"no CUDA compiler; put nvcc on the path, or: pip install nvidia-cuda"):
        cubins.build(toy / "cubin")


def test_cuda_12_compiles_for_jetpack_6_and_cuda_13_for_what_came_later() -> None:
    old = nvrtc.Compiler(path="old", version=(12, 6))
    new = cubins.Nvcc(path="new", version=(13, 0))
    chosen = {name: cubins.compiler_for(name, (old, new)) for name in (*sources.ARCHITECTURES, cubins.VIRTUAL)}
    assert {name for name, compiler in chosen.items() if compiler is new} == {"sm_110", "sm_120"}
    assert cubins.compiler_for("sm_87", (new,)) is new
    with pytest.raises(cubins.CubinError, match="sm_110 needs a compiler of CUDA 13"):
        cubins.compiler_for("sm_110", (old,))


ENTRIES = [
    cubins.Made(
        file="",
        unit="toy.cu",
        architecture=name,
        compiler="",
        generation=generation,
        driver=(generation, 0),
        digest="",
    )
    for name in (*sources.ARCHITECTURES, cubins.VIRTUAL)
    for generation in (12, 13)
]


@given(
    st.lists(st.sampled_from(ENTRIES)),
    st.sampled_from([75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121]),
    st.sampled_from([(11, 8), (12, 2), (12, 6), (13, 0), (13, 1)]),
)
def test_the_cubin_is_one_that_device_and_driver_take(
    entries: list[cubins.Made], capability: int, version: tuple[int, int]
) -> None:
    chosen = load.best_cubin(entries, load.Device(capability=capability, driver=version))
    usable = {
        image.capability(entry.architecture)
        for entry in entries
        if entry.architecture.startswith("sm_")
        and entry.generation <= version[0]
        and image.runs_on(entry.architecture, capability)
    }
    assert (chosen is None) == (not usable)
    if chosen is not None:
        assert image.capability(chosen.architecture) == max(usable)
        assert chosen in entries
        assert chosen.generation <= version[0]


def test_where_nothing_can_run_the_message_says_what_to_install(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = nvrtc.Compiler(path="libnvrtc.so.13", version=(13, 0))
    monkeypatch.setattr(nvrtc, "compilers", lambda: (newer,))
    with pytest.raises(load.NoKernelsError) as caught:
        load.find_image("toy.cu", load.Device(capability=87, driver=(12, 6)))
    assert str(caught.value) == (
        "no CUDA kernels for compute capability 8.7 with a driver of CUDA 12.6: no cubins were built; NVRTC 13.0 is "
        "too new for the driver. pip install nvidia-cuda-nvrtc-cu12, or build the cubins"
    )


# --- the driver


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C compiler for the driver that takes notes")
    out = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", out, source], check=True)
    return out


@pytest.fixture
def notes(fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the driver that takes notes in the place of the real one; return the file of its notes."""
    log = tmp_path / "notes"
    log.touch()
    monkeypatch.setattr(driver, "LIBRARY", str(fake_library))
    monkeypatch.setenv("PAREDOWN_FAKE_LOG", str(log))
    forget()
    yield log
    forget()


def forget() -> None:
    for function in (driver._driver, driver._handle, driver._context, load._loaded, load.function):
        function.cache_clear()


def start(function: driver.Function, *arguments: int, stream: int = 0) -> None:
    driver.launch(function, (5, 2, 1), (256, 1, 1), arguments, stream)


def test_a_launch_gives_the_driver_each_argument(notes: Path) -> None:
    start(
        driver.load(b"code", 1).function("kernel__pipi", shared=1000), 2**40 + 8, -7, 2**63 + 16, 2**31 - 1, stream=77
    )
    assert notes.read_text().splitlines() == [
        "load in 1616: code",
        f"launch kernel__pipi in 1616 on 77: 5 2 1, 256 1 1, 1000: {2**40 + 8} -7 {2**63 + 16} {2**31 - 1}",
    ]


def test_much_shared_memory_is_asked_for(notes: Path) -> None:
    driver.load(b"code", 0).function("kernel__", shared=driver.STATIC_SHARED_LIMIT + 1)
    assert notes.read_text().splitlines()[1:] == ["attribute 8 of kernel__: 49153"]


def test_the_context_of_another_library_is_put_back(notes: Path, fake_library: Path) -> None:
    library, now = ctypes.CDLL(str(fake_library)), ctypes.c_void_p()
    library.cuCtxPushCurrent_v2(ctypes.c_void_p(42))
    function = driver.load(b"code", 0).function("kernel__")
    start(function)
    library.cuCtxPopCurrent_v2(ctypes.byref(now))
    assert now.value == 42
    assert "launch kernel__ in 1600 on 0" in notes.read_text()


def test_what_the_driver_says_of_a_device(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_FAKE_CAPABILITY", "121")
    monkeypatch.setenv("PAREDOWN_FAKE_DRIVER", "12060")
    assert (driver.capability(1), driver.version(), driver.device_count()) == (121, (12, 6), 2)
    assert driver.device_name(1) == "Fake GPU 1"
    with pytest.raises(driver.CudaError, match=r"^cuDeviceGet: status 101$"):
        driver.capability(2)


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuLaunchKernel"])
def test_a_failure_names_the_call_and_what_the_driver_said(
    name: str, notes: Path, fake_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAREDOWN_FAKE_FAILURE", name)
    with pytest.raises(driver.CudaError, match=rf"^{name}.*: CUDA_ERROR_ILLEGAL_ADDRESS, as the test asked$"):
        start(driver.load(b"code", 0).function("kernel__"))
    left = ctypes.c_void_p(1)
    ctypes.CDLL(str(fake_library)).cuCtxGetCurrent(ctypes.byref(left))
    assert left.value is None


def test_a_kernel_that_is_not_there_is_named(notes: Path) -> None:
    with pytest.raises(driver.CudaError, match=r"cuModuleGetFunction of absent_kernel: CUDA_ERROR_NOT_FOUND"):
        driver.load(b"code", 0).function("absent_kernel")


def test_without_a_driver_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-is-absent.so.1")
    driver._driver.cache_clear()
    with pytest.raises(driver.NoDriverError, match=r"there is no CUDA driver here: libcuda-that-is-absent\.so\.1"):
        driver.version()


def test_a_driver_that_does_not_start_is_no_driver(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAREDOWN_FAKE_FAILURE", "cuInit")
    with pytest.raises(driver.NoDriverError, match="does not start: CUDA_ERROR_ILLEGAL_ADDRESS"):
        driver.device_count()


@needs_compiler
def test_a_unit_is_loaded_once_for_each_device(toy: Path, notes: Path) -> None:
    cubins.build(toy / "cubin", ("sm_90a",))
    names = [load.function("toy.cu", "toy__", device, 0).device for device in (0, 1, 0, 1)]
    assert names == [0, 1, 0, 1]
    assert notes.read_text().splitlines() == ["load in 1600: ELF\x02", "load in 1616: ELF\x02"]
    assert load.loaded("toy.cu", 1).origin.startswith("sm_90a, built ahead by ")


# --- what doctor says


def test_doctor_says_that_there_is_no_driver_and_that_nothing_was_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-is-absent.so.1")
    driver._driver.cache_clear()
    lines = state.examine()
    assert lines[0].startswith("--  CUDA kernels: there is no CUDA driver here: libcuda-that-is-absent.so.1")
    assert lines[-1] == f"--  {state.NEVER_RUN}"
    assert "never executed on a GPU" in lines[-1]


def test_doctor_names_each_gpu_and_where_its_kernels_come_from(toy: Path, notes: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(state, "UNITS", ("toy.cu",))
    monkeypatch.setattr(nvrtc, "compilers", lambda: ())
    nothing = "no CUDA kernels; pip install nvidia-cuda-nvrtc, or build the cubins. All runs on the reference"
    assert state.examine()[:2] == [
        f"--  GPU {index}, Fake GPU {index} (9.0, driver of CUDA 13.0): {nothing}" for index in range(2)
    ]
    monkeypatch.setattr(nvrtc, "compilers", lambda: (nvrtc.Compiler(path="", version=(12, 6)),))
    assert state.examine()[0].endswith("CUDA kernels compiled at first use by NVRTC 12.6")
    monkeypatch.setenv("PAREDOWN_FAKE_DRIVER", "11080")
    assert "pip install nvidia-cuda-nvrtc-cu11" in state.examine()[0]


@needs_compiler
def test_doctor_tells_current_cubins_from_stale_ones(toy: Path, notes: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(state, "UNITS", ("toy.cu",))
    made = cubins.build(toy / "cubin", ("sm_90a",))
    lines = state.examine()
    assert lines[0] == "ok  GPU 0, Fake GPU 0 (9.0, driver of CUDA 13.0): CUDA kernels from cubins"
    makers = ", ".join(sorted({entry.compiler for entry in made}))
    assert f"ok  CUDA cubins: sm_90a, compute_80, by {makers}" in lines
    (toy / "toy.cu").write_text(TOY + "// changed\n")
    assert any(line.startswith("--  CUDA cubins: 2 of 2 were made of other sources") for line in state.examine())


def test_the_manifest_outlives_a_round_trip(tmp_path: Path) -> None:
    entry = replace(ENTRIES[0], file="toy.sm_80.cubin")
    (tmp_path / cubins.MANIFEST).write_text(json.dumps([{**_fields(entry), "driver": [12, 0]}]))
    assert cubins.manifest(tmp_path) == (entry,)
    assert cubins.manifest(tmp_path / "absent") == ()


def _fields(entry: cubins.Made) -> dict[str, object]:
    return {name: getattr(entry, name) for name in cubins.Made.__slots__}
