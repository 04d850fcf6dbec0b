"""Sampling with a fake clock: minimum time and count, seeded alternation, warm-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from paredown.bench.measure import Sampling, sample, settled
from paredown.optimizer.errors import RecipeError


@dataclass
class Clock:
    """A clock that only the calls move."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.counts[name] += 1
            self.now += seconds(self.counts[name])

        return run


def test_lasts_minimum_time_and_minimum_count() -> None:
    clock = Clock()
    calls = [clock.call("slow", lambda _: 0.1), clock.call("fast", lambda _: 0.001)]
    samples = sample(calls, Sampling(min_seconds=1.0, min_count=30), clock)
    for seconds in samples.seconds:
        assert seconds.sum() >= 1.0 - 1e-9
        assert seconds.size >= 30
    assert samples.stable
    np.testing.assert_allclose(samples.seconds[0], 0.1, rtol=1e-6)
    np.testing.assert_allclose(samples.seconds[1], 0.001, rtol=1e-6)


def test_a_burst_lasts_about_burst_seconds() -> None:
    clock = Clock()
    spec = Sampling(min_seconds=0.001, min_rounds=4, burst_seconds=0.02, max_burst=64)
    calls = [clock.call("a", lambda _: 0.001), clock.call("b", lambda _: 1e-6), clock.call("c", lambda _: 0.5)]
    samples = sample(calls, spec, clock)
    assert [seconds.shape[1] for seconds in samples.seconds] == [20, 64, 1]


def test_max_seconds_ends_it() -> None:
    clock = Clock()
    spec = Sampling(min_seconds=1.0, max_seconds=2.0, min_count=10_000)
    samples = sample([clock.call("a", lambda _: 0.05)], spec, clock)
    assert 2.0 <= samples.seconds[0].sum() < 2.2


def test_order_of_each_round_is_seeded_and_mixed() -> None:
    def orders(seed: int) -> tuple[tuple[int, ...], ...]:
        clock = Clock()
        calls = [clock.call(name, lambda _: 0.01) for name in "ab"]
        return sample(calls, Sampling(seed=seed), clock).orders

    assert orders(1) == orders(1)
    assert orders(1) != orders(2)
    assert set(orders(1)) == {(0, 1), (1, 0)}


def test_calls_ran_in_the_recorded_order() -> None:
    clock = Clock()
    calls = [clock.call(name, lambda _: 0.1) for name in "ab"]
    samples = sample(calls, Sampling(min_seconds=0.1), clock)
    measured = clock.log[-2 * len(samples.orders) :]
    assert measured == ["ab"[index] for order in samples.orders for index in order]


def test_warm_up_waits_until_latencies_settle() -> None:
    clock = Clock()
    samples = sample([clock.call("a", lambda count: 0.01 + 0.1 / count**3)], Sampling(warmup_seconds=10), clock)
    assert samples.stable
    assert samples.seconds[0].max() < 0.0101


def test_warm_up_that_never_settles_is_reported() -> None:
    clock = Clock()
    samples = sample([clock.call("a", lambda count: 0.05 * (1 + count % 2))], Sampling(warmup_seconds=1), clock)
    assert not samples.stable


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([1.0] * 5, True),
        ([1.0] * 4, False),
        ([9.0, 1.0, 1.02, 1.0, 1.04, 1.0], True),
        ([1.0, 1.0, 1.0, 1.0, 1.2], False),
    ],
)
def test_settled(medians: list[float], expected: bool) -> None:
    assert settled(medians, 5, 0.05) is expected


def test_bad_input_names_the_value() -> None:
    with pytest.raises(RecipeError, match=r"^min_seconds=0 is not positive; use a number above 0$"):
        Sampling(min_seconds=0)
    with pytest.raises(RecipeError, match=r"max_seconds=1 is below min_seconds=2; raise max_seconds"):
        Sampling(min_seconds=2, max_seconds=1)
    with pytest.raises(RecipeError, match="bench: there is nothing to measure; name at least one artifact"):
        sample([], Sampling())
