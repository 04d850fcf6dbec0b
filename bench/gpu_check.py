"""Are the CUDA kernels right? Every width, group, dtype and batch against float64, with poisoned memory.

The reference is float64 in plain torch, from the drawn codes, table and scales; none of the kernels' own code decodes
for it. Scratch and outputs are filled with "not a number" before each call (torch does so in its deterministic mode).
`device` is "cuda"; tests run the same functions with the kernels in emulation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels import layout
from ..kernels.cuda import call, driver, launch
from ..kernels.lut_spec import ACTIVATIONS, RUN, Activation, LutParts, LutSpec, Mode

ALL_ROWS = tuple(range(1, 301))
SOME_ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 300)
FEW_ROWS = (1, 9, 17, 33, 130)
BITS = (2, 3, 4)
GROUPS = (0, 128, 64, 32, 96, 40)
SHAPES = ((256, 1024), (250, 1000), (33, 136), (4096, 4096), (12301, 264))
"""(n, k): whole tiles, tails of both, less than a tile, a real layer, which is cut into parts, and one so wide that
GPUs of up to 192 multiprocessors take it by blocks of 32 rows, the last without a half. The first is checked with
ALL_ROWS.
"""
KINDS: tuple[tuple[torch.dtype, Mode], ...] = (
    (torch.float16, "exact"),
    (torch.bfloat16, "exact"),
    (torch.float16, "int8"),
    (torch.bfloat16, "int8"),
    (torch.float32, "int8"),
)
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
REPEATS = 100
CASE_SECONDS = 90.0
"""Far more than a check should take, with what NVRTC compiles for it; compute-sanitizer has a limit of its own."""
EVERY = 13
"""Each so manyth case is repeated and captured: prime, so that every width, group and kind comes up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One weight, what is added to its products, and the batches to multiply it with."""

    spec: LutSpec
    dtype: torch.dtype
    mode: Mode
    halves: bool
    bias: bool
    activation: Activation
    rank: int
    rows: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        spec, dtype = self.spec, str(self.dtype).removeprefix("torch.")
        table = "halves" if self.halves else "bytes"
        extra = f"{' bias' * self.bias} {self.activation}{f' rank {self.rank}' * bool(self.rank)}".rstrip()
        sizes = f"{spec.n} x {spec.k}, {spec.bits} bits, group {spec.group}, a table of {table} for {spec.table_rows}"
        return f"{sizes} rows, {dtype} {self.mode}{extra}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a check found: `worst` is the largest error as a share of its bound, None where equality was asked."""

    name: str
    worst: float | None
    failure: str = ""

    def row(self) -> dict[str, object]:
        return {"name": self.name, "worst": self.worst, "failure": self.failure}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A case with its tensors, ready to be called; for the largest batch y in float64, and the sums of |products|."""

    case: Case
    weight: call.DeviceWeight
    x: Tensor
    bias: Tensor | None
    low_x: Tensor | None
    wanted: Tensor
    size: Tensor
    exact_table: bool

    def product(self, m: int) -> Tensor:
        low_x = None if self.low_x is None else self.low_x[:m]
        return call.linear(self.x[:m], self.weight, bias=self.bias, activation=self.case.activation, low_x=low_x)


def cases(*, small: bool) -> list[Case]:
    """Return the weights to check; `small` for compute-sanitizer, which runs some hundred times slower."""
    found: list[Case] = []
    for shape in SHAPES[2::2] if small else SHAPES:
        wide = small and shape == SHAPES[-1]
        groups, kinds = (GROUPS[1:2], KINDS[::2]) if wide else (GROUPS[1:4:2] if small else GROUPS, KINDS)
        for bits in BITS:
            for group in groups:
                for dtype, mode in kinds:
                    found.append(_case(len(found), shape, bits, group, dtype, mode, small))
    return found


def run(*, small: bool, device: str = "cuda") -> Iterator[Outcome]:
    """Make all checks, one outcome after the other."""
    chosen = cases(small=small)
    jobs: list[tuple[Case, Callable[[Problem], Outcome]]] = [(case, check) for case in chosen]
    if not small:
        jobs += [(case, make) for case in chosen[::EVERY] for make in (repeat, replay)]
        jobs += [(chosen[0], place), (chosen[0], operator)]
    with _poisoned():
        for i, (case, make) in enumerate(jobs):
            outcome = _guarded(case, device, make)
            yield outcome
            if outcome.failure and not _alive(device):
                left = f"the GPU answers no longer: {len(jobs) - i - 1} checks were not made"
                yield Outcome(name="all that follows", worst=None, failure=left)
                return


def check(problem: Problem) -> Outcome:
    """Multiply every batch of a case and hold each element of y against its bound."""
    ratios = torch.stack([_ratio(problem, m) for m in problem.case.rows])
    worst, index = ratios.max(0)
    failure = "" if worst <= 1 else f"m = {problem.case.rows[int(index)]}: the error is {worst:.3g} of its bound"
    return Outcome(name=problem.case.name, worst=None if worst.isinf() else float(worst), failure=failure)


def repeat(problem: Problem) -> Outcome:
    """Ask for the same bits REPEATS times."""
    wrong = []
    for m in (1, 16, 33, 64):
        first = problem.product(m)
        same = torch.stack([(problem.product(m) == first).all() for _ in range(REPEATS)])
        wrong += [] if same.all() else [f"{int((~same).sum())} of {REPEATS} runs at m = {m}"]
    failure = f"{', '.join(wrong)} gave other bits" if wrong else ""
    return Outcome(name=f"{problem.case.name}: {REPEATS} times", worst=None, failure=failure)


def replay(problem: Problem) -> Outcome:
    """Capture a product in a CUDA graph, replay it on other inputs, and ask for the bits of a plain call."""
    wrong = []
    for m in (1, 16, 64, 130):
        x, other = problem.x[:m].clone(), problem.x.flip(1)[:m].contiguous()
        moved = replace(problem, x=x)
        moved.product(m)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moved.product(m)
        x.copy_(other)
        graph.replay()
        if not torch.equal(y, moved.product(m)):
            wrong.append(m)
    failure = f"the replayed graph gave other bits at m = {wrong}" if wrong else ""
    return Outcome(name=f"{problem.case.name}: graph", worst=None, failure=failure)


def place(problem: Problem) -> Outcome:
    """Ask for the same bits on another stream, from x with gaps, from x that is not aligned and from 3 dimensions."""
    first, wrong = problem.product(6), []
    x = problem.x[:6]
    wide = torch.full((6, x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 1:-2] = x
    for name, other in (("unaligned", wide[:, 1:-2]), ("transposed", x.T.contiguous().T), ("3 dimensions", x[None])):
        y = call.linear(
            other, problem.weight, bias=problem.bias, activation=problem.case.activation, low_x=problem.low_x
        )
        if not torch.equal(y.reshape(first.shape), first):
            wrong.append(name)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = problem.product(6)
    stream.synchronize()
    wrong += [] if torch.equal(y, first) else ["another stream"]
    empty = problem.product(0)
    wrong += [] if empty.shape == (0, problem.case.spec.n) else ["no rows"]
    return Outcome(name="places of x", worst=None, failure=", ".join(wrong))


def operator(problem: Problem) -> Outcome:
    """Call paredown::lut_linear on the GPU, also compiled, and let torch check its registration."""
    from ..kernels import lut_linear

    parts, spec, mode = _parts(problem.case, problem.x.device)[0], problem.case.spec, problem.case.mode
    x = problem.x[:3]
    wanted = lut_linear.lut_linear(x, parts, spec, mode=mode)
    module = lut_linear.LutLinear(parts, spec, mode=mode)
    compiled = torch.compile(module, backend="aot_eager")
    torch.library.opcheck(torch.ops.paredown.lut_linear.default, _operands(parts, spec, x))
    right = torch.equal(module(x), wanted) and torch.equal(compiled(x), wanted)
    return Outcome(name="paredown::lut_linear", worst=None, failure="" if right else "other bits than the call")


def draw(case: Case, device: str) -> Problem:
    """Draw a weight and inputs, pack the weight, and compute y and its bound in float64."""
    spec, most = case.spec, max(case.rows)
    parts, dense = _parts(case, torch.device(device))
    rng = torch.Generator().manual_seed(case.seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device, case.dtype)

    x, bias = normal(most, spec.k), normal(spec.n) if case.bias else None
    low, low_x = (normal(spec.n, case.rank), normal(most, case.rank)) if case.rank else (None, None)
    kind = launch.kind_of(spec, parts.table.dtype, case.dtype, case.mode)
    if kind is None:
        raise ValueError(f"no kernel for {case.name}")
    read = rounded(x, spec) if case.mode == "int8" else x.double()
    wanted, size = read @ dense.T, read.abs() @ dense.abs().T
    if low is not None and low_x is not None:
        wanted, size = wanted + low_x.double() @ low.double().T, size + low_x.double().abs() @ low.double().abs().T
    if bias is not None:
        wanted, size = wanted + bias.double(), size + bias.double().abs()
    y = activated(wanted, case.activation)
    return Problem(
        case=case,
        weight=call.pack(parts, spec, kind, low),
        x=x,
        bias=bias,
        low_x=low_x,
        wanted=y,
        size=size,
        exact_table=kind in ("s8", "f16b") or (kind == "f16" and case.halves),
    )


def rounded(x: Tensor, spec: LutSpec) -> Tensor:
    """Round inputs to signed bytes and back, in runs of up to 128 within each group, as cpu/paredown.h says."""
    values = x.float().clone()
    for group in range(0, spec.k, spec.group_columns):
        end = min(group + spec.group_columns, spec.k)
        for run in range(group, end, RUN):
            part = values[:, run : min(run + RUN, end)]
            most = part.abs().amax(1, keepdim=True)
            # Not 127 / most: that is 127 times a rounded inverse in torch.
            by = torch.where(most > 0, torch.full_like(most, 127) / most, 0.0)
            part.copy_((part * by).round() * (most / 127))
    return values.double()


def activated(y: Tensor, activation: Activation) -> Tensor:
    """Return act(y)."""
    match activation:
        case "relu":
            return functional.relu(y)
        case "gelu":
            return functional.gelu(y)
        case "gelu_tanh":
            return functional.gelu(y, approximate="tanh")
        case "silu":
            return functional.silu(y)
        case _:
            return y


def device_fingerprint() -> dict[str, object]:
    """Return what the figures depend on beyond `environment.fingerprint`: the GPU, its driver, CUDA."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "gpu_memory_bytes": properties.total_memory,
        "driver_cuda": ".".join(map(str, driver.version())),
        "torch_cuda": torch.version.cuda,
    }


def _guarded(case: Case, device: str, make: Callable[[Problem], Outcome]) -> Outcome:
    """Return what a check found; an error of the kernels or of torch is a failure of that check."""
    name = f"{case.name}: {make.__name__}"
    try:
        with _watched(name):
            return make(draw(case, device))
    except Exception as error:  # opcheck has errors of its own; whatever it is, the other checks have their turn
        return Outcome(name=name, worst=None, failure=f"{type(error).__name__}: {error}")


@contextmanager
def _watched(name: str) -> Iterator[None]:
    """Say what was being checked and end the process if it takes too long: nothing else ends a kernel that hangs."""

    def end() -> None:
        # What `run` yields is not reached any more, and neither is anything buffered.
        os.write(1, f"FAILED {name}: not finished in {CASE_SECONDS:.0f} s, does a kernel hang?\n".encode())
        os._exit(1)

    timer = threading.Timer(CASE_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _alive(device: str) -> bool:
    """Tell whether the GPU still works: after an illegal access every later call of this process fails."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _case(
    index: int, shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype, mode: Mode, small: bool
) -> Case:
    """Return a case; what it has besides goes round, so that each meets each over the whole list."""
    halves = mode == "exact" and index % 3 == 1
    zero = 128.0 if index // 4 % 2 else 100.0 if mode == "int8" else 3.5  # with 3.5 a table of halves is made
    rows_per_table = (0, 16, 32, 48)[index % 4]
    spec = LutSpec(
        n=shape[0],
        k=shape[1],
        bits=bits,
        group=group,
        table_rows=rows_per_table,
        zero=0.0 if halves else zero,
        unit=0.01,
    )
    return Case(
        spec=spec,
        dtype=dtype,
        mode=mode,
        halves=halves,
        bias=index % 2 == 0,
        activation=ACTIVATIONS[index // len(KINDS) % 5 if index % 7 else 0],
        rank=(0, 0, 32, 0, 5, 64)[index % 6],
        rows=FEW_ROWS if small else ALL_ROWS if shape == SHAPES[0] else SOME_ROWS,
        seed=index,
    )


def _parts(case: Case, device: torch.device) -> tuple[LutParts, Tensor]:
    """Return a drawn weight in layout "c16", and W in float64."""
    spec, rng = case.spec, torch.Generator().manual_seed(case.seed)
    codes = torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=rng, dtype=torch.uint8).to(device)
    octets = torch.randint(0, 256, spec.table_shape, generator=rng, dtype=torch.uint8).to(device)
    table = torch.randn(spec.table_shape, generator=rng).half().to(device) if case.halves else octets
    scale = (0.1 + torch.rand(spec.scale_shape, generator=rng)).half().to(device)
    rows, columns = torch.arange(spec.n, device=device), torch.arange(spec.k, device=device)
    entries = (table.double() - spec.zero) * spec.unit
    values = entries[(rows // (spec.table_rows or spec.n))[:, None], codes.long()]
    dense = values * scale.double()[:, columns // spec.group_columns]
    return LutParts(codes=layout.pack(codes, spec), table=table, scale=layout.pack_scale(scale, spec)), dense


def _ratio(problem: Problem, m: int) -> Tensor:
    """Return the largest error of a batch as a share of its bound; infinite where y is not a number."""
    wanted, rounding = problem.wanted[:m], ROUNDING[problem.case.dtype]
    # No activation is steeper than 1.13; y is rounded once, and the smallest halves are 2^-24 apart.
    bound = 1.2 * problem.size[:m] * _sums(problem, m) + 1.001 * wanted.abs() * rounding + 2.0**-24
    error = (problem.product(m).double() - wanted).abs() / bound
    return torch.where(error.isnan(), torch.inf, error).max()


def _sums(problem: Problem, m: int) -> float:
    """Return how far sums may be off, as a share of the sum of absolute products.

    Each of k / 16 additions in a tensor core cuts off at most 2^-22 of what is there. A table that is rounded to the
    dtype of x adds that rounding, and beyond TILE_M W, its product and each step after it are rounded too.
    """
    case = problem.case
    decoded = case.mode == "exact" and m > launch.TILE_M
    rounding = ROUNDING[case.dtype] * ((0 if problem.exact_table else 1) + (4 if decoded else 0))
    return 2.0**-22 * (case.spec.k / 16 + 64) + rounding


def _operands(parts: LutParts, spec: LutSpec, x: Tensor) -> tuple[object, ...]:
    sizes = [spec.n, spec.k, spec.bits, spec.group, spec.table_rows]
    return (x, parts.codes, parts.table, parts.scale, sizes, [spec.zero, spec.unit])


@contextmanager
def _poisoned() -> Iterator[None]:
    """Let torch fill new memory with "not a number" and the largest integer, as its deterministic mode does."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
