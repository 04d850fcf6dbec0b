"""The queue: what shares a batch, when it starts, and that nothing is lost when it closes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.bench.batching import Answer, Batcher, Policy, Request, batch_axes
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.model import InputSpec

VECTOR = InputSpec(name="x", dtype="float32", shape=("batch", "n"))


@dataclass
class Doubler:
    """Returns twice its input once `gate` is open; fails where a value is not finite."""

    inputs: Sequence[InputSpec] = (VECTOR,)
    name: str = "doubler"
    gate: threading.Event = field(default_factory=threading.Event)
    began: threading.Event = field(default_factory=threading.Event)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.began.set()
        assert self.gate.wait(10)
        self.shapes.append(feeds["x"].shape)
        if not np.isfinite(feeds["x"]).all():
            raise ValueError("not finite")
        return {"y": 2 * feeds["x"]}


@dataclass
class Held:
    """A queue whose only worker is held by a first request until `open`: the rest piles up in a known order."""

    runner: Doubler
    batcher: Batcher
    answers: dict[int, Answer] = field(default_factory=dict)

    def send(self, number: int, array: np.ndarray) -> Request:
        return Request(feeds={"x": array}, done=lambda answer: self.answers.__setitem__(number, answer))

    def open(self) -> None:
        self.runner.gate.set()
        self.batcher.close()


def _held(**policy: int) -> Held:
    runner = Doubler()
    runner.gate.set()
    held = Held(runner=runner, batcher=Batcher(runner, Policy(**({"max_batch": 4} | policy)), dims={"n": 3}))
    runner.gate.clear()
    runner.began.clear()
    runner.shapes.clear()
    held.batcher.submit([held.send(-1, np.zeros((1, 3), np.float32))])
    assert runner.began.wait(10)
    return held


def _row(value: float, width: int = 3) -> np.ndarray:
    return np.full((1, width), value, np.float32)


def test_waiting_requests_share_batches_in_their_order() -> None:
    held = _held()
    held.batcher.submit(held.send(number, _row(number)) for number in range(6))
    held.open()
    assert held.runner.shapes == [(1, 3), (4, 3), (2, 3)]
    for number in range(6):
        np.testing.assert_array_equal(held.answers[number].outputs["y"], 2 * _row(number))
    assert [held.answers[number].batch for number in (-1, 0, 5)] == [1, 4, 2]


def test_only_equal_sizes_share_a_batch() -> None:
    held = _held()
    held.batcher.submit(held.send(number, _row(number, width)) for number, width in enumerate((3, 3, 5, 3)))
    held.open()
    assert held.runner.shapes[1:] == [(2, 3), (1, 5), (1, 3)]
    assert held.answers[2].outputs["y"].shape == (1, 5)


def test_a_request_of_several_samples_is_kept_whole() -> None:
    held = _held()
    sizes = (3, 2, 7)
    held.batcher.submit(held.send(n, np.full((size, 3), n, np.float32)) for n, size in enumerate(sizes))
    held.open()
    assert held.runner.shapes[1:] == [(3, 3), (2, 3), (7, 3)]
    assert [held.answers[n].outputs["y"].shape[0] for n in range(3)] == list(sizes)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([2, 3])), min_size=1, max_size=12), st.integers(1, 3))
def test_every_request_gets_its_own_answer(requests: list[tuple[int, int]], workers: int) -> None:
    held = _held(workers=workers)
    arrays = [np.random.default_rng(n).normal(size=shape).astype(np.float32) for n, shape in enumerate(requests)]
    held.batcher.submit(held.send(number, array) for number, array in enumerate(arrays))
    held.open()
    assert len(held.answers) == len(requests) + 1
    for number, array in enumerate(arrays):
        np.testing.assert_array_equal(held.answers[number].outputs["y"], 2 * array)
        assert held.answers[number].submitted <= held.answers[number].started <= held.answers[number].finished


def test_a_failure_belongs_to_its_batch_and_the_worker_goes_on() -> None:
    held = _held(max_batch=2)
    values = (np.nan, 1.0, 2.0)
    held.batcher.submit(held.send(number, _row(value)) for number, value in enumerate(values))
    held.open()
    assert [type(held.answers[n].error) for n in range(3)] == [ValueError, ValueError, type(None)]
    np.testing.assert_array_equal(held.answers[2].outputs["y"], _row(4.0))


def test_a_full_queue_refuses_an_offer_and_makes_submit_wait() -> None:
    held = _held(capacity=2)
    assert [held.batcher.offer(held.send(number, _row(number))) for number in range(3)] == [True, True, False]
    sender = threading.Thread(target=lambda: held.batcher.submit([held.send(3, _row(3))]))
    sender.start()
    sender.join(0.05)
    assert sender.is_alive()
    held.runner.gate.set()
    sender.join(10)
    assert not sender.is_alive()
    held.open()
    assert sorted(held.answers) == [-1, 0, 1, 3]


def test_a_closed_queue_takes_nothing_more() -> None:
    held = _held()
    held.open()
    with pytest.raises(InputError, match="request: the queue is closing"):
        held.batcher.submit([held.send(0, _row(0))])


def test_a_lone_request_waits_for_others_no_longer_than_the_delay() -> None:
    now = [0.0]
    runner = Doubler()
    runner.gate.set()
    with Batcher(runner, Policy(max_batch=4, max_delay_ms=20), dims={"n": 3}, clock=lambda: now[0]) as batcher:
        runner.shapes.clear()
        timer = threading.Timer(0.01, lambda: now.__setitem__(0, 1.0))
        timer.start()
        assert batcher.ask({"x": _row(1)}).batch == 1
        timer.join()
        assert now[0] == 1.0  # no sooner: the fake clock stood still until then
    assert runner.shapes == [(1, 3)]


def test_the_occupancy_is_the_integral_of_the_number_inside() -> None:
    now = [0.0]
    runner = Doubler()
    batcher = Batcher(runner, Policy(), clock=lambda: now[0])
    held = Held(runner=runner, batcher=batcher)
    batcher.submit([held.send(0, _row(0)), held.send(1, _row(1))])
    now[0] = 3.0
    assert batcher.occupancy() == (6.0, 3.0)
    held.open()
    now[0] = 10.0
    assert batcher.occupancy() == (6.0, 10.0)


def test_a_batch_that_is_not_the_first_axis_is_found() -> None:
    class Recurrent:
        name = "recurrent"
        inputs = (
            InputSpec(name="x", dtype="float32", shape=("batch", 4)),
            InputSpec(name="state", dtype="float32", shape=(2, "batch", 5)),
        )

        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"y": feeds["x"], "state": feeds["state"]}

    assert batch_axes(Recurrent(), {}) == ({"x": 0, "state": 1}, {"y": 0, "state": 1})


def test_what_has_no_batch_is_said() -> None:
    fixed = Doubler(inputs=(InputSpec(name="x", dtype="float32", shape=(1, 3)),))
    with pytest.raises(InputError, match=r'doubler: input "x" has no named batch dimension; use --max-batch 1, or'):
        Batcher(fixed, Policy(max_batch=2))

    class Summer(Doubler):
        def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"y": feeds["x"].sum(0)}

    with pytest.raises(InputError, match=r'output "y" is \[32\] for a batch of 2 and \[32\] for one of 3; use --max-b'):
        Batcher(Summer(), Policy(max_batch=2))
    with pytest.raises(RecipeError, match="bench: max_batch=0 is below 1"):
        Policy(max_batch=0)
    with pytest.raises(RecipeError, match=r"bench: max_delay_ms=-1 is not between 0 and 60000"):
        Policy(max_delay_ms=-1)
