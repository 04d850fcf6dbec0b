"""Fake runners that take a known time on a clock of their own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from paredown.bench import measure, sessions
from paredown.exporters.runner import RunnerOptions
from paredown.optimizer.model import InputSpec

IMAGE = InputSpec(name="x", dtype="float32", shape=("batch", 3, 8, 8))


@dataclass
class FakeRunner:
    name: str
    inputs: Sequence[InputSpec]
    seconds: Callable[[int], float]
    world: World

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch = next(iter(feeds.values())).shape[0]
        self.world.now += self.seconds(batch) * np.exp(0.02 * self.world.rng.standard_normal())
        self.world.feeds.append((self.name, dict(feeds)))
        return {"y": np.zeros((batch, 10), np.float32)}


@dataclass
class World:
    """A clock, the runners that move it, and what they were fed."""

    folder: Path
    now: float = 0.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    runners: dict[str, FakeRunner] = field(default_factory=dict)
    feeds: list[tuple[str, dict[str, np.ndarray]]] = field(default_factory=list)
    opened: list[tuple[str, RunnerOptions]] = field(default_factory=list)

    def add(self, name: str, seconds: Callable[[int], float], inputs: Sequence[InputSpec] = (IMAGE,)) -> Path:
        path = self.folder / name
        path.write_bytes(b"")
        self.runners[name] = FakeRunner(name=name, inputs=inputs, seconds=seconds, world=self)
        return path

    def open(self, path: Path, options: RunnerOptions) -> FakeRunner:
        self.opened.append((path.name, options))
        return self.runners[path.name]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose clock replaces the real one in the edge scenario."""
    result = World(folder=tmp_path)

    def sample(calls: Sequence[measure.Call], spec: measure.Sampling) -> measure.Samples:
        return measure.sample(calls, spec, lambda: result.now)

    monkeypatch.setattr(sessions, "sample", sample)
    return result


@pytest.fixture(autouse=True, scope="module")
def _little_to_collect() -> Iterator[None]:
    """Each measurement collects garbage first: leave out what other tests keep, which takes up to a second a time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
