"""Load generators: Poisson arrivals, latencies from the due time, Little's law, and when they give up."""

from __future__ import annotations

import time

import numpy as np
import pytest

from paredown.bench.arrivals import Load, Stop, closed_loop, open_loop, poisson
from paredown.bench.batching import Batcher, Policy
from paredown.bench.search import MAX_STEPS, bracket
from paredown.optimizer.model import InputSpec

POOL = [{"x": np.full((1, 2), value, np.float32)} for value in range(3)]


class Sleeper:
    name = "sleeper"
    inputs = (InputSpec(name="x", dtype="float32", shape=("batch", 2)),)

    def __init__(self, seconds: float = 0.0, fails: bool = False) -> None:
        self.seconds, self.fails, self.seen = seconds, fails, list[float]()

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen += feeds["x"][:, 0].tolist()
        time.sleep(self.seconds)
        if self.fails:
            raise ValueError("broken")
        return {"y": feeds["x"]}


def test_poisson_gaps_are_exponential() -> None:
    due = poisson(200.0, 20_000, np.random.default_rng(0))
    gaps = np.diff(due, prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 200, rel=0.03)
    assert np.mean(gaps > 2 / 200) == pytest.approx(np.exp(-2), abs=0.01)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A generator that oversleeps by a second makes all that it sends late, however fast the answers are."""
    now = [0.0]
    with Batcher(Sleeper(), Policy(), clock=lambda: now[0]) as batcher:

        def oversleep(seconds: float) -> None:
            now[0] += seconds + 1.0

        load = open_loop(batcher, POOL, np.array([1.0, 2.0, 2.5]), Stop(), (lambda: now[0], oversleep))
    np.testing.assert_allclose(load.lag, [1.0, 0.0, 1.0])
    assert (load.latencies >= load.lag).all()
    assert (load.errors, load.stopped) == (0, False)


def test_a_slow_server_cannot_hide_behind_its_full_queue() -> None:
    """1 ms a request, due all at once, one place in the queue: a closed measurement would show 1 to 3 ms for each."""
    with Batcher(Sleeper(0.001), Policy(capacity=1)) as batcher:
        load = open_loop(batcher, POOL, np.zeros(40), Stop())
    assert load.latencies.max() >= 0.040
    assert np.median(load.latencies) >= 0.018


def test_it_gives_up_on_a_queue_that_grows_and_on_late_answers() -> None:
    with Batcher(Sleeper(0.002), Policy()) as batcher:
        grown = open_loop(batcher, POOL, np.zeros(500), Stop(inside=20))
        late = open_loop(batcher, POOL, np.linspace(0, 0.3, 300), Stop(bound=0.0, late=3))
    assert (grown.stopped, len(grown.latencies)) == (True, 21)
    assert late.stopped
    assert 4 <= len(late.latencies) < 300


def test_little_holds_in_both_loops() -> None:
    with Batcher(Sleeper(0.002), Policy()) as batcher:
        opened = open_loop(batcher, POOL, poisson(200, 60, np.random.default_rng(1)), Stop())
        closed = closed_loop(batcher, POOL, 3, 0.2, time.perf_counter)
    assert closed.little() == pytest.approx(1, abs=0.05)
    assert opened.little() == pytest.approx(1, abs=0.2)  # a busy machine may pause between a reading and the queue


def test_littles_ratio_is_lambda_w_over_l() -> None:
    load = Load(latencies=np.full(100, 0.5), seconds=10.0, inside=4.0, errors=0, lag=np.full(100, 0.1))
    assert load.throughput_per_s == 10
    assert load.little() == pytest.approx(10 * 0.4 / 4)


def test_errors_are_counted_and_all_of_the_pool_is_sent() -> None:
    runner = Sleeper(fails=True)
    with Batcher(runner, Policy()) as batcher:
        assert open_loop(batcher, POOL, np.zeros(7), Stop()).errors == 7
        assert closed_loop(batcher, POOL, 2, 0.02, time.perf_counter).errors > 0
    assert set(runner.seen) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize("limit", [3.0, 41.7, 900.0])
@pytest.mark.parametrize("start", [1.0, 50.0, 3000.0])
def test_the_bracket_holds_the_limit(limit: float, start: float) -> None:
    found = bracket(lambda rate: rate <= limit, start, 0.03)
    assert found.holds <= limit < found.fails
    assert found.fails / found.holds <= 1.03
    assert dict(found.tried)[found.holds] is True
    assert dict(found.tried)[found.fails] is False
    assert len(found.tried) <= MAX_STEPS


def test_a_search_that_never_ends_stops() -> None:
    assert bracket(lambda _: True, 1.0, 0.03).fails == float("inf")
    assert bracket(lambda _: False, 1.0, 0.03).holds == 0.0
