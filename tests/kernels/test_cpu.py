"""The CPU kernels by their C interface: every instruction set that this processor runs, against float64."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_ndtr

from paredown.kernels import native

from . import cpu_cases
from .cpu_cases import BF16, EXACT, F16, F32, GELU, GELU_TANH, INT8, RUN, SILU, U8, Case, Sizes, c16

HARNESS = Path(__file__).with_name("cpu_harness.cpp")
KERNELS = Path(native.__file__).parent
OK, BAD_WEIGHT, BAD_CALL, NO_ISA = range(4)
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def harness(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command of a program that runs files of calls, with the installed library."""
    program = tmp_path_factory.mktemp("harness") / "harness"
    link = [str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    return compiled([f"-I{KERNELS / 'cpu'}", str(HARNESS), *link], program)


@pytest.fixture(params=["avx512vnni", "avxvnni", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, library: Path) -> Iterator[str]:
    """Use one instruction set during a test; a skip where this processor or library has it not."""
    if request.param not in native.isas():
        pytest.skip(f"{request.param} not run: built and present are {', '.join(native.isas())}")
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


def compiled(arguments: Sequence[str], program: Path) -> list[str]:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("kernels not checked: no C++ compiler")
    subprocess.run([compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *arguments], check=True)
    return [str(program)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call by ctypes: arrays that live as long as it does, and the structs that point to them."""

    sizes: Sizes
    x: NDArray[np.generic]
    codes: NDArray[np.uint8]
    table: NDArray[np.generic]
    scale: NDArray[np.generic]
    mode: int = EXACT
    activation: int = 0
    threads: int = 1
    bias: Floats | None = None
    kept: list[object] = field(default_factory=list)

    def weight(self) -> native.Weight:
        s = self.sizes
        packed = np.frombuffer(c16(self.codes, s), np.uint8)
        self.kept.extend([packed])
        pointers = (packed.ctypes.data, self.table.ctypes.data, self.scale.ctypes.data)
        numbers = (s.n, s.k, s.group, s.table_rows, s.bits, s.table_type, s.scale_type, s.zero, s.unit)
        return native.Weight(*numbers, *pointers)

    def linear(self, y: NDArray[np.generic]) -> native.Linear:
        weight, m = self.weight(), len(self.x)
        bias = None if self.bias is None else self.bias.ctypes.data
        call = native.Linear(ctypes.pointer(weight), self.x.ctypes.data, y.ctypes.data, m, self.sizes.k, self.sizes.n)
        call.type, call.mode, call.activation, call.bias, call.threads = (
            F32,
            self.mode,
            self.activation,
            bias,
            self.threads,
        )
        call.scratch_bytes = native.library().paredown_scratch(ctypes.byref(call))
        scratch = np.zeros(call.scratch_bytes + 64, np.uint8)
        call.scratch = scratch.ctypes.data + -scratch.ctypes.data % 64
        self.kept.extend([weight, scratch])
        return call

    def run(self) -> Floats:
        y = np.full((len(self.x), self.sizes.n), np.nan, np.float32)
        assert native.library().paredown_run_linear(ctypes.byref(self.linear(y))) == OK
        return y

    def dense(self) -> NDArray[np.float64]:
        """Return W, of one table and one scale for each row and group."""
        values = (self.table.astype(np.float64)[self.codes] - self.sizes.zero) * self.sizes.unit
        groups = np.arange(self.sizes.k) // (self.sizes.group or self.sizes.k)
        scale = self.scale.reshape(-1, groups[-1] + 1, 16).transpose(0, 2, 1).reshape(-1, groups[-1] + 1)
        return values * scale.astype(np.float64)[: self.sizes.n, groups]


def call(n: int, k: int, bits: int, m: int, group: int = 0, seed: int = 0) -> Call:
    """Return a product of normal activations and a weight of rather normal values."""
    rng = np.random.default_rng(seed)
    sizes = Sizes(n=n, k=k, bits=bits, group=group, scale_type=F32)
    quantiles = np.sort(rng.standard_normal(2**bits))
    table = np.clip(np.rint(128 + 127 * quantiles / np.abs(quantiles).max()), 1, 255).astype(np.uint8)
    scale = rng.uniform(0.5, 2.0, -(-n // 16) * 16 * (math.ceil(k / group) if group else 1)).astype(np.float32)
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    return Call(sizes=sizes, x=rng.standard_normal((m, k)).astype(np.float32), codes=codes, table=table, scale=scale)


def test_decode_header_gives_the_codes_of_the_layout(tmp_path: Path) -> None:
    source = Path(__file__).with_name("decode_check.cpp")
    command = compiled([f"-I{KERNELS}", str(source), "-o", str(tmp_path / "check")], tmp_path / "check")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_every_instruction_set_is_within_the_bound_of_float64(harness: list[str], tmp_path: Path) -> None:
    cases = cpu_cases.grid() + tails()
    found = cpu_cases.run(harness, cases, tmp_path)
    assert list(found) == cpu_cases.isas(harness) == list(native.isas())
    assert list(cpu_cases.misses(cases, found)) == []
    fused = [results for name, results in found.items() if name != "portable"]
    for i, case in enumerate(cases):
        if case.mode == INT8:
            assert all(np.array_equal(fused[0][i], other[i]) for other in fused), f"int8 differs: {case}"


def tails() -> list[Case]:
    """Return every count of tokens up to 40, and every type with every type of scale and table."""
    out = []
    for bits in (1, 2, 3, 4, 6):
        weight = Sizes(n=50, k=161, bits=bits, group=64)
        out += [Case(weight=weight, mode=mode, m=m, seed=m) for mode in (EXACT, INT8) for m in range(1, 41)]
        for kind in (F16, BF16, F32):
            made = [replace(weight, scale_type=kind, table_type=table, table_rows=32) for table in (U8, F16)]
            out += [Case(weight=w, mode=mode, m=m, type=t, bias=True, rank=5, seed=m)
                    for w in made for t in (F16, BF16, F32) for m in (1, 14) for mode in (EXACT, INT8)
                    if mode == EXACT or w.table_type == U8]  # fmt: skip
        out += [Case(weight=weight, mode=mode, m=300, seed=1) for mode in (EXACT, INT8)]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("m", [1, 9])
def test_error_over_all_is_what_the_modes_promise(isa: str, bits: int, m: int) -> None:
    exact = call(n=128, k=2048, bits=bits, m=m, group=128)
    wanted = exact.x.astype(np.float64) @ exact.dense().T
    for mode, promised in ((EXACT, 2e-6), (INT8, 1e-2)):
        error = np.linalg.norm(replace(exact, mode=mode).run() - wanted) / np.linalg.norm(wanted)
        assert error <= promised, (isa, mode, error)


@pytest.mark.parametrize("mode", [EXACT, INT8])
@pytest.mark.parametrize("m", [1, 3, 30, 250])
def test_threads_change_no_bit(isa: str, mode: int, m: int) -> None:
    one = replace(call(n=400, k=1100, bits=4, m=m, group=100), mode=mode)
    y = one.run()
    for threads in (2, 3, 8):
        assert np.array_equal(y, replace(one, threads=threads).run()), (isa, threads)


@pytest.mark.parametrize("m", [2, 7, 26])
def test_tokens_do_not_depend_on_their_company_in_int8(isa: str, m: int) -> None:
    many = replace(call(n=70, k=300, bits=3, m=m, group=64), mode=INT8)
    alone = np.concatenate([replace(many, x=many.x[i : i + 1]).run() for i in range(m)])
    assert np.array_equal(many.run(), alone), isa


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
def test_int8_of_tiny_and_huge_inputs(isa: str, scale: float) -> None:
    base = replace(call(n=20, k=2 * RUN, bits=4, m=2), mode=INT8)
    x = base.x * np.float32(scale)
    x[:, :RUN] = 0  # a run of zeros beside it
    made = replace(base, x=x)
    wanted = x.astype(np.float64) @ base.dense().T
    size = np.abs(x).max() * np.abs(base.dense()).sum(1)
    assert (np.abs(made.run() - wanted) <= size / 127 + 1e-34).all(), isa


def test_what_is_no_number_stays_none_in_exact_mode(isa: str) -> None:
    base = call(n=20, k=40, bits=4, m=7)
    base.x[3, 5] = np.nan
    for activation in range(5):
        y = replace(base, activation=activation).run()
        undefined = np.zeros(y.shape, bool)
        undefined[3] = True
        assert np.array_equal(np.isnan(y), undefined), (isa, activation)


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * np.exp(log_ndtr(x))


def gelu_tanh(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return silu(x, math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def silu(x: NDArray[np.float64], s: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    s = x if s is None else s
    return np.where(s < 0, x * np.exp(np.minimum(s, 0)) / (1 + np.exp(np.minimum(s, 0))), x / (1 + np.exp(-np.abs(s))))


@pytest.mark.parametrize(("activation", "reference"), [(GELU, gelu), (GELU_TANH, gelu_tanh), (SILU, silu)])
def test_activations_are_accurate_relative_to_themselves(
    isa: str, activation: int, reference: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> None:
    rng = np.random.default_rng(activation)
    x = np.concatenate([rng.uniform(-12, 12, 30000), rng.standard_normal(30000), np.geomspace(1e-30, 12, 4000)])
    x = np.concatenate([x, -x]).astype(np.float32)
    base = call(n=len(x), k=1, bits=1, m=1)
    y = replace(base, x=np.zeros((1, 1), np.float32), bias=x, activation=activation).run()[0]
    wanted = reference(x.astype(np.float64))
    counts = np.abs(wanted) > 1e-36
    error = np.abs(y - wanted)[counts] / np.abs(wanted)[counts]
    assert error.max() <= 6e-7, (isa, error.max(), x[counts][error.argmax()])


@pytest.mark.parametrize("x", [-1e30, -200.0, -90.0, 90.0, 1e30])
def test_activations_of_extreme_values(isa: str, x: float) -> None:
    base = call(n=16, k=1, bits=1, m=1)
    for activation in (GELU, GELU_TANH, SILU):
        y = replace(base, x=np.zeros((1, 1), np.float32), bias=np.full(16, x, np.float32), activation=activation).run()
        assert np.allclose(y, max(x, 0.0), rtol=1e-6, atol=1e-34), (isa, activation)


def status(base: Call, **changes: object) -> int:
    linear = base.linear(np.zeros((len(base.x), base.sizes.n), np.float32))
    for name, value in changes.items():
        target = linear.weight.contents if name in dict(native.Weight._fields_) else linear
        setattr(target, name, value)
    return int(native.library().paredown_run_linear(ctypes.byref(linear)))


WRONG_WEIGHTS: list[dict[str, object]] = [
    *({"bits": bits} for bits in (0, 9, -1)),
    *({name: 0} for name in ("n", "k")),
    *({name: -1} for name in ("group", "table_rows")),
    *({name: 9} for name in ("table_type", "scale_type")),
    *({name: None} for name in ("codes", "table", "scale")),
    {"table_rows": 8},
    {"n": 2**40, "k": 2**40},
    {"mode": INT8, "table_type": F16},
    {"mode": INT8, "zero": 127.5},
    {"mode": INT8, "zero": 256.0},
]
WRONG_CALLS: list[dict[str, object]] = [
    *({name: 9} for name in ("type", "mode", "activation")),
    {"type": U8},
    *({name: None} for name in ("x", "y", "scratch")),
    *({name: -1} for name in ("m", "x_stride")),
    *({"m": m} for m in (2**40, 2**56, 2**62)),
    {"y_stride": 3},
    {"scratch_bytes": 64},
    {"low_x": 64},
]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("changes", "wanted"), [*((w, BAD_WEIGHT) for w in WRONG_WEIGHTS), *((c, BAD_CALL) for c in WRONG_CALLS)]
)
def test_a_call_that_does_not_fit_is_refused(changes: dict[str, object], wanted: int) -> None:
    base = call(n=20, k=300, bits=4, m=2)
    assert status(base) == OK
    assert status(base, **changes) == wanted, changes


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("m", [2**45, 2**56, 2**62, 2**63 - 1])
def test_rows_whose_bytes_overflow_take_no_scratch(m: int) -> None:
    linear = call(n=20, k=300, bits=4, m=2).linear(np.zeros((2, 20), np.float32))
    linear.m = m
    assert native.library().paredown_scratch(ctypes.byref(linear)) == 0


@pytest.mark.usefixtures("library")
def test_a_call_without_tokens_does_nothing() -> None:
    assert status(call(n=4, k=4, bits=4, m=1), m=0, x=None, y=None, scratch=None) == OK


@pytest.mark.usefixtures("library")
def test_gather_refuses_rows_that_are_not_there() -> None:
    weight, y = call(n=4, k=4, bits=4, m=1).weight(), np.zeros((1, 4), np.float32)
    for row, wanted in ((3, OK), (4, BAD_CALL), (-1, BAD_CALL)):
        rows = np.array([row], np.int64)
        pointers = (ctypes.byref(weight), rows.ctypes.data, 1, y.ctypes.data, F32)
        assert native.library().paredown_gather(*pointers) == wanted


@pytest.mark.usefixtures("library")
def test_sizes_are_those_of_the_layout() -> None:
    for n, k, bits, group in ((1, 1, 1, 0), (17, 33, 3, 0), (40, 300, 4, 128), (20, 70, 7, 25)):
        base = call(n=n, k=k, bits=bits, m=1, group=group)
        weight = base.weight()
        assert native.library().paredown_codes_bytes(ctypes.byref(weight)) == len(c16(base.codes, base.sizes))
        assert native.library().paredown_scale_count(ctypes.byref(weight)) == base.scale.size


@pytest.mark.usefixtures("library")
def test_an_unknown_instruction_set_is_refused() -> None:
    assert native.isas()[-1] == "portable"
    assert native.library().paredown_use_isa(b"mmx") == NO_ISA
