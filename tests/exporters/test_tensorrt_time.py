"""Engines are timed where a GPU is: which one is faster, what follows for the weights, and when nothing is timed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paredown.exporters import (
    tensorrt,
    tensorrt_build,
    tensorrt_choice,
    tensorrt_engine,
    tensorrt_library,
    tensorrt_rounding,
    tensorrt_time,
    tensorrt_write,
)
from paredown.exporters.tensorrt_build import Built
from paredown.exporters.tensorrt_graph import GraphOptions
from paredown.exporters.tensorrt_library import Library
from paredown.exporters.tensorrt_profile import Sizes
from paredown.exporters.tensorrt_time import ROUNDS, SURE, WARM_SECONDS, WORTH, Times
from paredown.exporters.tensorrt_write import Order
from paredown.optimizer.errors import ExportError, RuntimeMissingError
from paredown.optimizer.model import InputSpec, Model
from paredown.optimizer.weight import Dense, LowRank, Sum

from .conftest import build, pack_all, use_standin

SIZE = 640
"""Inputs and outputs of a layer whose codes of 4 bits make an engine smaller by more than decoding costs it."""
SIZES = {"batch": Sizes(1, 4, 8)}


@pytest.fixture(scope="module")
def model() -> Model:
    inputs = InputSpec(name="x", shape=("batch", SIZE))
    return pack_all(build(lambda: nn.Sequential(nn.Linear(SIZE, SIZE)), inputs), ("codebook 4",))


@pytest.fixture
def standin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_standin(tmp_path_factory.mktemp("standin"), monkeypatch)
    yield
    sys.modules.pop("tensorrt", None)


@dataclass
class Clock:
    """An engine whose runs take some time, give or take a share of it that a generator draws."""

    usual: float
    share: float
    draw: np.random.Generator
    asked: list[int] = field(default_factory=list)

    def seconds(self, feeds: dict[str, np.ndarray], runs: int) -> float:
        self.asked.append(runs)
        return self.usual * float(1 + self.share * self.draw.standard_normal())


def exported(model: Model, folder: Path) -> str:
    """Export, and return why its one layer is held as it is, after how it is."""
    tensorrt.export(model, folder / "model.engine", tensorrt.Options(profile=SIZES))
    (row,) = tensorrt.decisions(folder / "model.engine")
    return f"{row['form']}, {'kept' if row['kept'] else 'fallback'}: {row['reason']}"


@given(ratio=st.floats(1.05, 3.0), turned=st.booleans(), seed=st.integers(0, 1 << 20))
def test_an_engine_that_is_clearly_faster_is_found(ratio: float, turned: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    times = (1e-3 * ratio, 1e-3) if turned else (1e-3, 1e-3 * ratio)
    engines = Clock(times[0], 0.003, draw), Clock(times[1], 0.003, draw)
    found = tensorrt_time.compare(engines, {})
    assert found.faster == int(turned)
    assert found.milliseconds[1] / found.milliseconds[0] == pytest.approx(times[1] / times[0], rel=0.02)
    for clock in engines:
        assert sum(clock.asked[:-ROUNDS]) * clock.usual >= 0.95 * WARM_SECONDS
        assert all(
            0.019 <= runs * clock.usual <= 0.021 + clock.usual for runs in clock.asked[-ROUNDS:]
        )  # 20 ms a round


def test_equal_engines_are_hardly_ever_told_apart() -> None:
    draw = np.random.default_rng(0)
    found = [tensorrt_time.compare((Clock(1e-3, 0.2, draw), Clock(1e-3, 0.2, draw)), {}) for _ in range(500)]
    assert sum(times.faster is not None for times in found) <= 5  # 0.0026 of them by the binomial distribution


@pytest.mark.parametrize(
    ("second", "wins", "faster"),
    [
        (WORTH, ROUNDS, 0),
        (WORTH, SURE, 0),
        (WORTH, SURE - 1, None),
        (WORTH - 0.001, ROUNDS, None),
        (1 / WORTH - 0.001, 0, 1),
        (1 / WORTH - 0.001, ROUNDS - SURE + 1, None),
    ],
)
def test_faster_is_what_wins_the_rounds_by_enough(second: float, wins: int, faster: int | None) -> None:
    assert Times(milliseconds=(1.0, second), wins=wins).faster == faster


@pytest.mark.parametrize(
    ("times", "starts", "ends"),
    [
        (Times(milliseconds=(1.0, 2.0), wins=ROUNDS), "codebook 4", "takes 1 ms and 2 ms on this GPU (8.7)"),
        (Times(milliseconds=(2.0, 1.0), wins=0), "dense", "takes 2 ms and 1 ms on this GPU (8.7)"),
        (Times(milliseconds=(1.0, 1.0), wins=9), "codebook 4", "on this GPU (8.7), which is no clear difference"),
    ],
)
def test_the_faster_engine_is_taken_and_else_the_smaller(
    times: Times, starts: str, ends: str, standin: None, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_time, "compare", lambda engines, feeds: times)
    reason = exported(model, tmp_path)
    assert reason.startswith(starts)
    assert "built both ways, the engine takes " in reason
    assert "; a run at batch=4 takes " in reason
    assert reason.endswith(ends)


def test_engines_are_timed_where_they_run(standin: None, model: Model, tmp_path: Path) -> None:
    reason = exported(model, tmp_path)
    assert "; a run at batch=4 takes " in reason
    assert " ms on this GPU (8.7)" in reason


def test_a_weight_that_is_packed_in_part_is_built_both_ways(
    standin: None, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Times(milliseconds=(2.0, 1.0), wins=0)
    monkeypatch.setattr(tensorrt_time, "compare", lambda engines, feeds: times)
    (name, base), low = next(iter(model.weights.items())), torch.full((SIZE, 1), 0.01)
    rest = LowRank(left=Dense(values=low), right=Dense(values=low.T))
    reason = exported(model.with_weights({name: Sum(terms=(base, rest))}), tmp_path)
    assert reason.startswith("dense, fallback: built both ways, ")


@pytest.mark.parametrize(
    ("form", "held"),
    [("dense", False), ("float32", False), ("dense x dense", False), ("codebook 4 + dense x dense", True)],
)
def test_what_is_packed_in_part_is_packed(form: str, held: bool) -> None:
    assert tensorrt_choice.is_packed(form) == held


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeMissingError("torch uses no GPU here", fix="install another"), "torch uses no GPU here"),
        (torch.OutOfMemoryError("no room on the GPU"), "no room on the GPU"),
        (RuntimeError("CUDA error: device busy\nCompile with more checks"), "CUDA error: device busy"),
    ],
)
def test_bytes_decide_where_engines_cannot_be_timed(
    error: Exception, says: str, standin: None, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> tensorrt_engine.Place:
        raise error

    monkeypatch.setattr(tensorrt_engine, "place", fails)
    reason = exported(model, tmp_path)
    assert reason.startswith("codebook 4, kept: ")
    assert reason.endswith(f"; not timed: {says}")


@pytest.mark.parametrize(
    ("here", "sm", "says"),
    [
        ("8.7", ("8.6",), "not timed: the GPU here (8.7) is none that it is for"),
        ("", (), "not timed: there is no GPU here"),
        ("8.7", (), "not timed: torch "),
        ("8.7", ("8.6", "8.7"), "not timed: torch "),
    ],
)
def test_an_engine_for_another_gpu_is_not_timed(
    here: str, sm: tuple[str, ...], says: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> tensorrt_engine.EngineRunner:
        raise RuntimeMissingError("torch uses no GPU here")

    monkeypatch.setattr(tensorrt_library, "capability", lambda: here)
    monkeypatch.setattr(tensorrt_engine, "open_plan", fails)
    rtx = Library(name="rtx", version="any")
    order = Order(library=rtx, options=tensorrt.Options(), sizes=SIZES, sm=sm, folder=tmp_path)
    (engine := tmp_path / "engine").write_bytes(b"")
    pair = tensorrt_write.lower(model, GraphOptions()), Built(engine=engine, layers=1, timing_cache=None)
    faster, sentence = tensorrt_write._better(model, order)(pair, pair)
    assert (faster, sentence[: len(says)]) == (None, says)


def test_where_only_floats_do_not_build_the_packed_engine_stays(
    standin: None, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, count = tensorrt_build.build, itertools.count(1)

    def fails(job: tensorrt_build.Job, work: Path) -> Built:
        if next(count) == 2:
            raise ExportError("TensorRT ran out of memory", where="model.engine")
        return build(job, work)

    monkeypatch.setattr(tensorrt_build, "build", fails)
    reason = exported(model, tmp_path)
    assert reason.startswith("codebook 4, kept: ")
    assert reason.endswith("; with floats no engine is built: TensorRT ran out of memory")


@pytest.mark.tensorrt
def test_real_engines_are_timed(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt", reason="the full TensorRT is not installed: engines are not run")
    here = tensorrt_library.capability() or pytest.skip("there is no GPU: engines are not run")
    assert f" ms on this GPU ({here})" in exported(model, tmp_path)


def test_inputs_that_arrays_do_not_have_are_named() -> None:
    inputs = InputSpec(name="x", shape=("batch", 16), dtype="bfloat16")
    net = build(lambda: nn.Sequential(nn.Linear(16, 16)), inputs, dtype=torch.bfloat16)
    options, (decision,) = tensorrt_rounding.settle(net, GraphOptions())
    assert (options.measured, decision.kept) == (frozenset(), True)
    assert decision.reason == 'the input "x" is bfloat16, which arrays do not have'
