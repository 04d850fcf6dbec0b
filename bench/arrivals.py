"""Our own load generators: open loop, at times fixed beforehand, and closed loop, by clients that wait for answers.

In the open loop a latency counts from when the request was due, not from when it was sent, so a server that holds back
the generator cannot hide it (coordinated omission).
"""

from __future__ import annotations

import math
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

    stopped: the generator gave up (`Stop`); its latencies are those until then. lag: seconds by which each request was
    sent later than it was due, which is part of its latency.
    """

    latencies: Seconds
    seconds: float
    inside: float
    errors: int
    stopped: bool = False
    lag: Seconds = field(default_factory=lambda: np.zeros(0))

    @property
    def throughput_per_s(self) -> float:
        return len(self.latencies) / self.seconds

    def little(self) -> float:
        """Return lambda W over L (Little 1961): 1 but for what is measured wrong.

        Arrivals and W, here without the lag, are the generator's; L is the queue's.
        """
        return float(self.latencies.sum() - self.lag.sum()) / self.seconds / self.inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """When an open loop gives up: more than `inside` requests wait, or more than `late` took over `bound` seconds."""

    inside: int = 1_000_000
    bound: float = math.inf
    late: int = 0


def poisson(rate: float, count: int, rng: np.random.Generator) -> Seconds:
    """Return when `count` requests are due, seconds from the start: gaps are exponential with mean 1 / rate."""
    due: NDArray[np.float64] = np.cumsum(rng.exponential(1 / rate, count))
    return due


def open_loop(
    batcher: Batcher,
    pool: Sequence[Feeds],
    due: Seconds,
    stop: Stop,
    wait: tuple[Clock, Callable[[float], None]] = (time.perf_counter, time.sleep),
) -> Load:
    """Send requests when they are due and wait for all answers; give up where `stop` says so."""
    clock, sleep = wait
    area, start = batcher.occupancy()
    tally = _Tally(start + due, stop.bound)
    sent = np.empty(len(due))
    count = 0
    for count, at in enumerate(due, 1):
        if (left := start + at - clock()) > 0:
            sleep(left)
        sent[count - 1] = clock() - start
        batcher.submit([Request(feeds=pool[count % len(pool)], done=tally.done(count - 1))])
        if count - tally.count > stop.inside or tally.late > stop.late:
            break
    tally.wait(count)
    after, end = batcher.occupancy()
    return Load(
        latencies=tally.finished[:count] - start - due[:count],
        seconds=end - start,
        inside=(after - area) / (end - start),
        errors=tally.errors,
        stopped=count < len(due),
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

    def __init__(self, due: Seconds, bound: float) -> None:
        self.finished = np.full(len(due), np.nan)
        self.count = self.errors = self.late = 0
        self._due, self._bound = due, bound
        self._changed = threading.Condition()

    def done(self, index: int) -> Callable[[Answer], None]:
        def note(answer: Answer) -> None:
            with self._changed:
                self.finished[index] = answer.finished
                self.errors += answer.error is not None
                self.late += bool(answer.finished - self._due[index] > self._bound)
                self.count += 1
                self._changed.notify()

        return note

    def wait(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.count >= count)
