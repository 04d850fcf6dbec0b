"""A queue in front of a runner that forms batches: what LoadGen, our own load generator and `optimize serve` send to.

A batch starts when `max_batch` samples wait or the oldest request has waited `max_delay_ms`, and one of `workers`
threads runs it. Samples are put together only along the named batch dimension of the inputs, and only requests whose
other sizes agree.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..optimizer.errors import Error, InputError, RecipeError
from .feeds import Feeds, batch_name, random_feeds
from .measure import Clock

if TYPE_CHECKING:
    from ..exporters.runner import Runner

Axes: TypeAlias = Mapping[str, int]
"""Input or output name -> which of its axes is the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How batches form. capacity: requests that may wait; `submit` blocks, and `offer` refuses, when so many do.

    workers: threads that call the runtime at the same time, each of which uses the runner's own thread count.
    """

    max_batch: int = 1
    max_delay_ms: float = 0.0
    workers: int = 1
    capacity: int = 1024

    def __post_init__(self) -> None:
        for name in ("max_batch", "workers", "capacity"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)} is below 1", where="bench", fix="use 1 or more")
        if not 0 <= self.max_delay_ms <= 60_000:
            what = f"max_delay_ms={self.max_delay_ms} is not between 0 and 60000"
            raise RecipeError(what, where="bench", fix="use a few milliseconds")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What became of a request: its part of the outputs, or the error. Times are of the queue's clock, in seconds.

    batch: samples in the batch that it ran in.
    """

    outputs: Mapping[str, np.ndarray]
    error: Exception | None
    submitted: float
    started: float
    finished: float
    batch: int


Done: TypeAlias = Callable[[Answer], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One array per input, with one sample or several; `done` is called in a worker's thread and must not raise."""

    feeds: Feeds
    done: Done


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Waiting:
    request: Request
    samples: int
    kind: tuple[object, ...]
    submitted: float


@dataclass(slots=True)
class _Occupancy:
    """How many requests are inside, and the integral of that number over time."""

    inside: int = 0
    area: float = 0.0
    since: float = 0.0

    def move(self, change: int, now: float) -> None:
        self.area += self.inside * (now - self.since)
        self.inside, self.since = self.inside + change, now


@dataclass(slots=True)
class _State:
    """What the lock protects."""

    waiting: deque[_Waiting] = field(default_factory=deque)
    samples: int = 0
    closing: bool = False
    occupancy: _Occupancy = field(default_factory=_Occupancy)


class Batcher:
    """A running queue; leaving its `with` block drains it.

    Raises InputError where `max_batch` is above 1 and the model has no batch dimension to batch along.
    """

    def __init__(
        self,
        runner: Runner,
        policy: Policy,
        *,
        dims: Mapping[str, int] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.policy = policy
        self.runner, self.clock = runner, clock
        self._inputs, self._outputs = batch_axes(runner, dims or {}) if policy.max_batch > 1 else ({}, {})
        self._state = _State(occupancy=_Occupancy(since=clock()))
        lock = threading.Lock()
        self._work, self._room = threading.Condition(lock), threading.Condition(lock)
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(policy.workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests at once, so that they may share a batch; wait for room where there is none."""
        with self._work:
            for request in requests:
                while len(self._state.waiting) >= self.policy.capacity and not self._state.closing:
                    self._work.notify_all()
                    self._room.wait()
                self._add(request)
            self._work.notify_all()

    def offer(self, request: Request) -> bool:
        """Queue a request if there is room; return whether there was."""
        with self._work:
            if len(self._state.waiting) >= self.policy.capacity:
                return False
            self._add(request)
            self._work.notify_all()
            return True

    def ask(self, feeds: Feeds) -> Answer:
        """Queue one request, waiting for room, and return its answer."""
        request, found = _awaited(feeds)
        self.submit([request])
        return found()

    def ask_if_room(self, feeds: Feeds) -> Answer | None:
        """Queue one request and return its answer; None where the queue is full."""
        request, found = _awaited(feeds)
        return found() if self.offer(request) else None

    def occupancy(self) -> tuple[float, float]:
        """Return the integral of the number of requests inside (request seconds), and the time of this reading."""
        with self._work:
            self._state.occupancy.move(0, self.clock())
            return self._state.occupancy.area, self._state.occupancy.since

    def close(self) -> None:
        """Accept no more, finish what waits, and end the workers."""
        with self._work:
            self._state.closing = True
            self._work.notify_all()
            self._room.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, request: Request) -> None:
        if self._state.closing:
            raise InputError("the queue is closing", where="request", fix="send it to another server")
        now = self.clock()
        samples, kind = _samples(request.feeds, self._inputs), _kind(request.feeds, self._inputs)
        self._state.waiting.append(_Waiting(request=request, samples=samples, kind=kind, submitted=now))
        self._state.samples += samples
        self._state.occupancy.move(1, now)

    def _serve(self) -> None:
        while batch := self._take():
            self._run(batch)

    def _take(self) -> list[_Waiting]:
        """Return the next batch, oldest first; empty when the queue is closed and drained."""
        state, delay = self._state, self.policy.max_delay_ms / 1e3
        with self._work:
            while True:
                if not state.waiting:
                    if state.closing:
                        return []
                    self._work.wait()
                    continue
                left = state.waiting[0].submitted + delay - self.clock()
                if state.closing or left <= 0 or state.samples >= self.policy.max_batch:
                    return self._pop()
                self._work.wait(left)

    def _pop(self) -> list[_Waiting]:
        state, batch, samples = self._state, list[_Waiting](), 0
        while state.waiting and (not batch or self._fits(state.waiting[0], batch[0], samples)):
            batch.append(state.waiting.popleft())
            samples += batch[-1].samples
        state.samples -= samples
        self._room.notify_all()
        return batch

    def _fits(self, item: _Waiting, first: _Waiting, samples: int) -> bool:
        return item.kind == first.kind and samples + item.samples <= self.policy.max_batch

    def _run(self, batch: Sequence[_Waiting]) -> None:
        started = self.clock()
        parts, error = self._outputs_of(batch)
        finished = self.clock()
        with self._work:
            self._state.occupancy.move(-len(batch), finished)
        samples = sum(item.samples for item in batch)
        for item, outputs in zip(batch, parts, strict=True):
            times = {"submitted": item.submitted, "started": started, "finished": finished}
            item.request.done(Answer(outputs=outputs, error=error, batch=samples, **times))

    def _outputs_of(self, batch: Sequence[_Waiting]) -> tuple[list[Feeds], Exception | None]:
        try:
            outputs = self.runner.run(_joined([item.request.feeds for item in batch], self._inputs))
            return _parted(outputs, [item.samples for item in batch], self._outputs), None
        except Exception as error:  # it belongs to the requests, not to this thread
            return [{} for _ in batch], error


def _awaited(feeds: Feeds) -> tuple[Request, Callable[[], Answer]]:
    """Return a request, and what waits for its answer."""
    answered, found = threading.Event(), list[Answer]()

    def done(answer: Answer) -> None:
        found.append(answer)
        answered.set()

    def wait() -> Answer:
        answered.wait()
        return found[0]

    return Request(feeds=feeds, done=done), wait


def batch_axes(runner: Runner, dims: Mapping[str, int]) -> tuple[Axes, Axes]:
    """Return the batch axis of every input and output; found for outputs by running batches of 2 and of 3.

    Raises InputError for an input without the named batch dimension and an output that has no axis of its size.
    """
    name = batch_name(runner.inputs)
    inputs = {spec.name: spec.shape.index(name) for spec in runner.inputs if name is not None and name in spec.shape}
    for spec in runner.inputs:
        if spec.name not in inputs:
            what = f'input "{spec.name}" has no named batch dimension'
            raise InputError(what, where=runner.name, fix="use --max-batch 1, or export with one")
    two, three = (tried(runner, random_feeds(runner, size, dims, 0)) for size in (2, 3))
    return inputs, {key: _grown_axis(runner.name, key, two[key].shape, three[key].shape) for key in two}


def tried(runner: Runner, feeds: Feeds) -> Feeds:
    """Return the outputs of a run; InputError with the shapes where the runtime does not run them."""
    try:
        return runner.run(feeds)
    except Error:
        raise
    except Exception as problem:
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in feeds.items())
        raise InputError(f"it does not run with {shapes}: {problem}", where=runner.name, fix="use --dim") from problem


def _grown_axis(where: str, name: str, two: tuple[int, ...], three: tuple[int, ...]) -> int:
    grown = [axis for axis, sizes in enumerate(zip(two, three, strict=False)) if sizes == (2, 3)]
    if len(two) != len(three) or len(grown) != 1:
        what = f'output "{name}" is {list(two)} for a batch of 2 and {list(three)} for one of 3'
        raise InputError(what, where=where, fix="use --max-batch 1: it cannot be cut into samples")
    return grown[0]


def _samples(feeds: Feeds, axes: Axes) -> int:
    return next((feeds[name].shape[axis] for name, axis in axes.items()), 1)


def _kind(feeds: Feeds, axes: Axes) -> tuple[object, ...]:
    """Return what must agree for two requests to share a batch: types, and sizes other than the batch."""
    found = []
    for name, axis in axes.items():
        shape = feeds[name].shape
        found.append((name, feeds[name].dtype.str, shape[:axis], shape[axis + 1 :]))
    return tuple(found)


def _joined(feeds: Sequence[Feeds], axes: Axes) -> Feeds:
    if len(feeds) == 1:
        return feeds[0]
    return {name: np.concatenate([part[name] for part in feeds], axis) for name, axis in axes.items()}


def _parted(outputs: Feeds, samples: Sequence[int], axes: Axes) -> list[Feeds]:
    if len(samples) == 1:
        return [outputs]
    cuts = np.cumsum(samples)[:-1]
    split = {name: np.split(outputs[name], cuts, axis) for name, axis in axes.items()}
    return [{name: parts[index] for name, parts in split.items()} for index in range(len(samples))]
