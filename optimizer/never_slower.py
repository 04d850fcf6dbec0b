"""Whether compression pays, from measured intervals: what falls back, what is kept, and the reasons with their numbers.

A ratio is the latency of the compressed form over that of the original. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .report_value import Interval
from .verdict import EQUAL_WITHIN

Objective: TypeAlias = Literal["latency", "size"]
Outcome: TypeAlias = Literal["fallback", "kept", "undecided"]

LAUNCH_SHARE = 2.0
"""A layer is launch bound below so many times what an operator costs that does nothing: half of it is the launch."""
MEMORY_SHARE = 0.5
"""A layer that reads its weights at less than this part of the machine's speed waits for arithmetic, not for them."""
FILL = 1.25
"""Stored codes count as misaligned where filled-up rows and inputs make them so many times what they stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One comparison under one condition, such as "batch 1, 1 thread"; `ci95` is None where nothing can be concluded.

    before_us, after_us: medians in microseconds, the cost of calling the runtime left out.
    """

    condition: str
    before_us: float
    after_us: float
    ratio: float
    ci95: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one operator costs that does nothing (us), and GB/s of reading as many bytes as a layer has, if known."""

    node_us: float
    read_gb_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Layers that were measured together, alone on the device; no timings where that is not possible, with `alone`.

    layers: weights that one operator reads, and those of every other layer of the same shapes. decoded: why its weights
    are floats once the file is loaded. shape, filled: rows and inputs, and what they are stored as. operators: how many
    the runtime runs, before and after. weight_bytes: of the original.
    """

    layers: tuple[str, ...]
    timings: tuple[Timing, ...] = ()
    alone: str = ""
    decoded: str = ""
    shape: tuple[int, int] = (0, 0)
    filled: tuple[int, int] = (0, 0)
    operators: tuple[int, int] = (1, 1)
    weight_bytes: int = 0
    machine: Machine = Machine(node_us=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The whole network: each candidate beside the original, and the last candidate beside the first.

    operators: how many the runtime runs of the original, then of each candidate.
    """

    candidates: tuple[tuple[Timing, ...], ...]
    last_to_first: tuple[Timing, ...]
    operators: tuple[int, ...] = ()


def outcome(timings: Sequence[Timing], objective: Objective) -> Outcome:
    """Say what intervals allow to say.

    Surely slower under any condition falls back. For `latency` so does what is surely not faster under every one: its
    interval lies above 1 - EQUAL_WITHIN. An interval on both sides of the limit decides nothing.
    """
    known = [timing.ci95 for timing in timings if timing.ci95 is not None]
    if any(low > 1 + EQUAL_WITHIN for low, _ in known):
        return "fallback"
    if not timings or len(known) < len(timings):
        return "undecided"
    limit = 1 - EQUAL_WITHIN if objective == "latency" else 1 + EQUAL_WITHIN
    if objective == "latency":
        if all(low > limit for low, _ in known):
            return "fallback"
        return "kept" if any(high <= limit for _, high in known) else "undecided"
    return "kept" if all(high <= limit for _, high in known) else "undecided"


def surely_slower(timings: Sequence[Timing]) -> bool:
    """Return whether any condition is slower beyond its interval."""
    return any(timing.ci95 is not None and timing.ci95[0] > 1 + EQUAL_WITHIN for timing in timings)


def why(layer: Measured, objective: Objective) -> str:
    """Return the reason for a layer that falls back: the decisive ratio, then every cause that the numbers show."""
    worst = max(layer.timings, key=lambda timing: timing.ci95[0] if timing.ci95 else 0.0)
    return "; ".join((told(worst, objective), *(causes(layer) or (UNEXPLAINED,))))


UNEXPLAINED = "the runtime has no faster form of it at this size"


def causes(layer: Measured) -> tuple[str, ...]:
    """Return what keeps a layer from being faster, each with its numbers; the first condition is looked at."""
    first = layer.timings[0]
    found = [f"decoded to floats when loaded: {layer.decoded}"] if layer.decoded else []
    before, after = layer.operators
    if after > before:
        found.append(f"fusion broken: {after} operators run instead of {before}")
    if layer.filled[0] * layer.filled[1] >= FILL * layer.shape[0] * layer.shape[1] > 0:
        (rows, inputs), (more_rows, more_inputs) = layer.shape, layer.filled
        found.append(f"width not aligned: {rows} x {inputs} is filled up to {more_rows} x {more_inputs}")
    return (*found, *_bounds(layer, first))


def _bounds(layer: Measured, first: Timing) -> tuple[str, ...]:
    """Return what bounds the original: a launch, or anything but memory."""
    launch = layer.machine.node_us
    if first.before_us < LAUNCH_SHARE * launch:
        empty = f"an operator that does nothing takes {launch:.1f} us"
        return (f"launch bound: the original takes {first.before_us:.1f} us, {empty}",)
    speed, most = layer.weight_bytes / max(first.before_us, 1e-3) / 1e3, layer.machine.read_gb_per_s
    if most is not None and speed < MEMORY_SHARE * most:
        reads = f"the original reads its weights at {speed:.1f} GB/s, this machine reads {most:.0f}"
        return (f"not memory bound: {reads}",)
    return ()


def told(timing: Timing, objective: Objective) -> str:
    """Return a comparison that decided: "not faster at batch 1, 1 thread: 1.01 times as long (0.99 to 1.02)"."""
    slower = timing.ci95 is not None and timing.ci95[0] > 1 + EQUAL_WITHIN
    verb = "not faster" if objective == "latency" and not slower else "slower"
    return f"{verb} at {timing.condition}: {factor(timing)}"


def factor(timing: Timing) -> str:
    if timing.ci95 is None:
        return f"{timing.ratio:.2f} times as long, from too few or disturbed rounds for an interval"
    return f"{timing.ratio:.2f} times as long ({timing.ci95[0]:.2f} to {timing.ci95[1]:.2f})"


def kept_note(layer: Measured, objective: Objective) -> str:
    """Return what the report says of a layer that keeps its compressed form."""
    if not layer.timings:
        return f"not measured alone: {layer.alone}"
    said = "; ".join(f"{factor(timing)} at {timing.condition}" for timing in layer.timings)
    verdict = "undecided, kept: " if outcome(layer.timings, objective) == "undecided" else ""
    return f"{verdict}measured alone, {said}"
