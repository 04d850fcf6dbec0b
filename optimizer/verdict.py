"""The first line of every result: faster, slower or no measurable difference, said plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .report_value import WHOLE_MODEL, Interval, Report, interval, is_fraction, number, rows, text

Speed: TypeAlias = Literal["slower", "no measurable difference", "faster", "not measured"]
_ORDER: tuple[Speed, ...] = ("slower", "not measured", "no measurable difference", "faster")

EQUAL_WITHIN = 0.02
"""Ratios within 2 % of 1 count as equal, however narrow their interval: one .onnx file opened four times in one process
(6 convs, batch 1 and 8, ONNX Runtime 1.31, 2 cores) differed from itself by up to 1 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One artifact against the baseline, at one batch size and thread count. `ratio`: latency over latency."""

    artifact: str
    baseline: str
    condition: str
    ratio: float | None
    ratio_ci95: Interval | None

    @property
    def speed(self) -> Speed:
        if self.ratio_ci95 is None:
            return "not measured"
        low, high = self.ratio_ci95
        if low > 1 + EQUAL_WITHIN:
            return "slower"
        return "faster" if high < 1 - EQUAL_WITHIN else "no measurable difference"


def comparisons(bench: Sequence[Report]) -> list[Comparison]:
    """Return what the bench rows compare, worst first; the first row's artifact is the baseline."""
    if not bench:
        return []
    baseline = text(bench[0], "artifact")
    found = [
        Comparison(
            artifact=text(row, "artifact"),
            baseline=baseline,
            condition=condition(row),
            ratio=number(row, "ratio_to_baseline"),
            ratio_ci95=interval(row, "ratio_ci95"),
        )
        for row in bench
        if text(row, "artifact") != baseline
    ]
    return sorted(found, key=lambda item: (_ORDER.index(item.speed), -(item.ratio or 0)))


def is_slower(bench: Sequence[Report]) -> bool:
    """Return whether any artifact is slower than the baseline under any condition, beyond its interval."""
    return any(item.speed == "slower" for item in comparisons(bench))


def condition(row: Report) -> str:
    """Return "batch 1, 2 threads"."""
    threads = number(row, "threads")
    batch = number(row, "batch")
    words = [] if batch is None else [f"batch {batch:g}"]
    if threads is not None:
        words.append("default threads" if threads == 0 else f"{threads:g} thread{'s' * (threads != 1)}")
    return ", ".join(words)


def speed(bench: Sequence[Report], reason: str = "") -> str:
    """Return one sentence per compared artifact, the slowest first; `reason` says why one is slower."""
    found = comparisons(bench)
    if not found:
        return "Speed was not measured."
    names = list(dict.fromkeys(item.artifact for item in found))
    return "\n".join(_sentence([item for item in found if item.artifact == name], reason) for name in names)


def headline(report: Report) -> str:
    """Return the verdict on a whole run: what failed (`failure`, verification), then speed, size, accuracy."""
    bad = _first_bad_layer(report)
    parts = ["run failed"] if text(report, "failure") else []
    parts += [f"verification failed at {bad}"] if bad else []
    parts += [_short_speed(report), _size(report), _accuracy(report)]
    line = ", ".join(part for part in parts if part)
    return line[:1].upper() + line[1:]


def reason_when_slower(report: Report) -> str:
    """Return why the whole model (layer null, "*" or "model") was kept compressed by `decisions`, else "".

    It only looks the reason up; whether the model is slower is for `is_slower` to say.
    """
    whole = [row for row in rows(report, "decisions") if text(row, "layer") in WHOLE_MODEL]
    return next((text(row, "reason") for row in whole if row.get("kept") == "compressed"), "")


def _sentence(found: Sequence[Comparison], reason: str) -> str:
    first = found[0]
    parts = [_claim(first)]
    parts += [f"{item.speed} at {item.condition} ({_factor(item)})" for item in found[1:4]]
    parts += [f"{len(found) - 4} more conditions in the table"] if len(found) > 4 else []
    parts += [reason.rstrip(".")] if first.speed == "slower" and reason else []
    return "; ".join(parts) + "."


def _claim(item: Comparison) -> str:
    if item.ratio is None:
        return f"Not measured: {item.artifact} has no latency to hold against {item.baseline}"
    if item.ratio_ci95 is None:
        return (
            f"Not measured well enough: {item.artifact} takes {_factor(item)} as {item.baseline} "
            f"at {item.condition}, from too few rounds for an interval"
        )
    (low, high), verb = item.ratio_ci95, "takes"
    if item.speed == "faster":
        low, high, verb = 1 / high, 1 / low, "runs"
    return (
        f"{item.speed.capitalize()}: {item.artifact} {verb} {_factor(item)} as {item.baseline} at {item.condition} "
        f"(95 % interval {low:.2f} to {high:.2f})"
    )


def _factor(item: Comparison) -> str:
    if not item.ratio:
        return "no latency"
    return f"{1 / item.ratio:.2f} times as fast" if item.speed == "faster" else f"{item.ratio:.2f} times as long"


def _short_speed(report: Report) -> str:
    found = comparisons(rows(report, "bench"))
    if not found or found[0].ratio is None or found[0].speed == "not measured":
        return "speed not measured"
    ratio, where = found[0].ratio, f" ({found[0].condition})" if len(found) > 1 else ""
    if found[0].speed == "slower":
        return f"slower: {ratio:.2f} times the latency{where}"
    if found[0].speed == "faster":
        return f"faster: {1 / ratio:.2f} times as fast{where}"
    return f"no measurable difference in speed{where}"


def _size(report: Report) -> str:
    before, after = number(report, "baseline", "size_bytes"), number(report, "final", "size_bytes")
    if not before or not after:
        return "size not measured"
    if abs(before / after - 1) < 0.005:
        return "same size"
    return f"{before / after:.1f} times smaller" if after < before else f"{after / before:.1f} times larger"


def _accuracy(report: Report) -> str:
    drop, ends = number(report, "final", "drop"), interval(report, "final", "drop_ci95")
    name = text(report, "final", "metric", "name") or text(report, "baseline", "metric", "name") or "metric"
    if drop is None:
        return f"{name} not measured"
    unit = " points" * is_fraction(report)
    change = f"{name} {abs(drop):.2f}{unit} {'lower' if drop > 0 else 'higher'}"
    if abs(drop) < 0.005:
        return f"{name} unchanged"
    within = ends is not None and ends[0] <= 0 <= ends[1]
    return change + " (within its interval)" if within else change


def _first_bad_layer(report: Report) -> str:
    return next((text(row, "first_bad_layer") for row in rows(report, "verify") if row.get("first_bad_layer")), "")
