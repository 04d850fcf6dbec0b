"""Which of two engines of one network runs faster on the GPU that is here.

Both stay loaded and take turns, inputs and outputs in the GPU's memory, so that what else runs there meets both. One is
faster where it was so in nearly every round, and by enough to be worth its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np

from ..optimizer.artifact import at_sizes
from ..optimizer.errors import Error
from ..optimizer.model import InputSpec
from . import tensorrt_engine
from .runner import arrays
from .tensorrt_engine import Metadata
from .tensorrt_profile import Sizes

ROUNDS = 20
SURE = 17
"""Rounds that one engine has to win: of two equal ones, 3 in 1000 pairs have one that does (sign test, two-sided)."""
WORTH = 1.02
"""How many times longer the other engine has to take: what differs by less is chosen by bytes."""
ROUND_SECONDS = 0.02
"""What the runs of one engine in one round take, one run at least."""
WARM_SECONDS = 1.0


class Timed(Protocol):
    def seconds(self, feeds: dict[str, np.ndarray], runs: int) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Median milliseconds of a run of each of two engines, and the rounds that the first won."""

    milliseconds: tuple[float, float]
    wins: int

    @property
    def faster(self) -> int | None:
        """The engine that is faster, 0 or 1; None where that is not clear."""
        first, second = self.milliseconds
        if self.wins >= SURE and second >= WORTH * first:
            return 0
        return 1 if ROUNDS - self.wins >= SURE and first >= WORTH * second else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """How engines are compared: on a GPU of this compute capability, at the usual sizes of a profile."""

    capability: str
    inputs: Sequence[InputSpec]
    sizes: Mapping[str, Sizes]

    def judge(self, engines: Sequence[tuple[bytes, Metadata]]) -> tuple[int | None, str]:
        """Return which of two engines is faster, None where that is not known, and a sentence on it."""
        try:
            runners = [tensorrt_engine.open_plan(content, metadata) for content, metadata in engines]
            usual = {name: known.usual for name, known in self.sizes.items()}
            times = compare((runners[0], runners[1]), arrays(self.inputs, at_sizes(self.inputs, usual)))
        except (Error, RuntimeError) as error:  # torch says all that CUDA reports by a RuntimeError of several lines
            what = error.what if isinstance(error, Error) else str(error).partition("\n")[0]
            return None, f"not timed: {what}"
        sizes = ", ".join(f"{name}={size}" for name, size in usual.items())
        first, second = (f"{value:.4g}" for value in times.milliseconds)
        clear = "" if times.faster is not None else ", which is no clear difference"
        at = f" at {sizes}" if sizes else ""
        return times.faster, f"a run{at} takes {first} ms and {second} ms on this GPU ({self.capability}){clear}"


def compare(engines: tuple[Timed, Timed], feeds: dict[str, np.ndarray]) -> Times:
    """Measure two engines in turns, ROUNDS rounds."""
    usual = [_warm(engine, feeds) for engine in engines]
    runs = [math.ceil(ROUND_SECONDS / seconds) for seconds in usual]
    rounds = [_round(engines, feeds, runs, first=index % 2) for index in range(ROUNDS)]
    middle = [1e3 * median(pair[i] for pair in rounds) for i in (0, 1)]
    return Times(milliseconds=(middle[0], middle[1]), wins=sum(a < b for a, b in rounds))


def _warm(engine: Timed, feeds: dict[str, np.ndarray]) -> float:
    """Run an engine for WARM_SECONDS and return what a run takes at the end.

    TensorRT-RTX compiles kernels for the sizes that it meets while others already run.
    """
    runs, taken = 1, 0.0
    while True:
        seconds = max(engine.seconds(feeds, runs), 1e-9)
        taken += runs * seconds
        if taken >= WARM_SECONDS:
            return seconds
        runs = math.ceil(ROUND_SECONDS / seconds)


def _round(
    engines: tuple[Timed, Timed], feeds: dict[str, np.ndarray], runs: Sequence[int], *, first: int
) -> tuple[float, float]:
    found = [0.0, 0.0]
    for index in (first, 1 - first):
        found[index] = engines[index].seconds(feeds, runs[index])
    return found[0], found[1]
