"""Our own load generators: open loop, at times fixed beforehand, and closed loop, by clients that wait for answers.

In the open loop a latency counts from when the request was due, not from when it was sent, so a server that holds back
the generator cannot hide it (coordinated omission).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .batching import Answer, Batcher, Request
from .feeds import Feeds
from .measure import Clock, Seconds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Load:
    """One run. latencies: seconds by request, in order of arrival; the mean number inside is the queue's own count.

    overloaded: the generator gave up because answers fell ever further behind; its latencies are those until then.
    lag: seconds by which each request was sent later than it was due.
    """

    latencies: Seconds
    seconds: float
    inside: float
    errors: int
    overloaded: bool = False
    lag: Seconds = field(default_factory=lambda: np.zeros(0))

    @property
    def throughput_per_s(self) -> float:
        return len(self.latencies) / self.seconds

    def little(self) -> float:
        """Return lambda W over L (Little 1961): 1 but for what is measured wrong. Arrivals and latencies are the
        generator's, L is the queue's."""
        return float(self.latencies.sum()) / self.seconds / self.inside


def poisson(rate: float, count: int, rng: np.random.Generator) -> Seconds:
    """Return when `count` requests are due, seconds from the start: gaps are exponential with mean 1 / rate."""
    due: NDArray[np.float64] = np.cumsum(rng.exponential(1 / rate, count))
    return due


def open_loop(
    batcher: Batcher,
    pool: Sequence[Feeds],
    due: Seconds,
    limit: int,
    wait: tuple[Clock, Callable[[float], None]] = (time.perf_counter, time.sleep),
) -> Load:
    """Send requests when they are due and wait for all answers; give up once more than `limit` are inside."""
    clock, sleep = wait
    tally = _Tally(len(due))
    area, start = batcher.occupancy()
    sent = np.empty(len(due))
    count = 0
    for count, at in enumerate(due, 1):
        if (left := start + at - clock()) > 0:
            sleep(left)
        sent[count - 1] = clock() - start
        batcher.submit([Request(feeds=pool[count % len(pool)], done=tally.done(count - 1))])
        if count - tally.count > limit:
            break
    tally.wait(count)
    after, end = batcher.occupancy()
    return Load(
        latencies=tally.finished[:count] - start - due[:count],
        seconds=end - start,
        inside=(after - area) / (end - start),
        errors=tally.errors,
        overloaded=count < len(due),
        lag=sent[:count] - due[:count],
    )


def closed_loop(batcher: Batcher, pool: Sequence[Feeds], clients: int, seconds: float, clock: Clock) -> Load:
    """Let `clients` threads each send one request after the other for so long."""
    answers: list[list[Answer]] = [[] for _ in range(clients)]
    area, start = batcher.occupancy()

    def client(number: int) -> None:
        own, index = answers[number], number
        while clock() < start + seconds:
            own.append(batcher.ask(pool[index % len(pool)]))
            index += clients

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after, end = batcher.occupancy()
    every = sorted((answer for own in answers for answer in own), key=lambda answer: answer.submitted)
    return Load(
        latencies=np.array([answer.finished - answer.submitted for answer in every]),
        seconds=end - start,
        inside=(after - area) / (end - start),
        errors=sum(answer.error is not None for answer in every),
    )


class _Tally:
    """When each request finished, written by the workers."""

    def __init__(self, count: int) -> None:
        self.finished = np.full(count, np.nan)
        self.count = self.errors = 0
        self._changed = threading.Condition()

    def done(self, index: int) -> Callable[[Answer], None]:
        def note(answer: Answer) -> None:
            with self._changed:
                self.finished[index] = answer.finished
                self.errors += answer.error is not None
                self.count += 1
                self._changed.notify()

        return note

    def wait(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.count >= count)
