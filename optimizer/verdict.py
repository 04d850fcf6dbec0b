"""The first line of every result: faster, slower or no measurable difference, said plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .report_value import WHOLE_MODEL, Interval, Report, at, interval, is_fraction, number, rows, text

Speed: TypeAlias = Literal["slower", "no measurable difference", "faster", "not measured"]
Quantity: TypeAlias = Literal["latency", "load"]
_ORDER: tuple[Speed, ...] = ("slower", "not measured", "no measurable difference", "faster")

BENCH_SCHEMA = "paredown.bench/1"
EQUAL_WITHIN = 0.02
"""Ratios within 2 % of 1 count as equal, however narrow their interval: one .onnx file opened four times in one process
(6 convs, batch 1 and 8, ONNX Runtime 1.31, 2 cores) differed from itself by up to 1 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One artifact against the baseline, under one condition. `ratio`: latency over latency; below 1 is faster.

    Where a scenario found the `load` that each holds, the ratio is that of the baseline over that of the artifact.
    `doubt`, `brief_doubt`: why the numbers of either are not to be trusted, with and without the reason.
    """

    artifact: str
    baseline: str
    condition: str
    ratio: float | None
    ratio_ci95: Interval | None
    quantity: Quantity = "latency"
    doubt: str = ""
    brief_doubt: str = ""

    @property
    def speed(self) -> Speed:
        if self.ratio_ci95 is None:
            return "not measured"
        low, high = self.ratio_ci95
        if low > 1 + EQUAL_WITHIN:
            return "slower"
        return "faster" if high < 1 - EQUAL_WITHIN else "no measurable difference"


def comparisons(bench: Sequence[Report]) -> list[Comparison]:
    """Return what the bench rows compare, worst first; the first row's artifact is the baseline.

    What others made of the baseline (`peer`) is no result of ours, and is left out.
    """
    if not bench:
        return []
    baseline = text(bench[0], "artifact")
    beside = {condition(row): row for row in reversed(bench) if text(row, "artifact") == baseline}
    found = [_comparison(row, baseline, beside) for row in bench if text(row, "artifact") != baseline and not peer(row)]
    return sorted(found, key=lambda item: (_ORDER.index(item.speed), -(item.ratio or 0)))


def is_bench(report: Report) -> bool:
    """Return whether this is the result of `optimize bench`, which has no model and no metric."""
    return text(report, "schema") == BENCH_SCHEMA


def is_slower(bench: Sequence[Report]) -> bool:
    """Return whether any artifact is slower than the baseline under any condition, beyond its interval."""
    return any(item.speed == "slower" for item in comparisons(bench))


def condition(row: Report) -> str:
    """Return "batch 1, 2 threads", after the name of a scenario other than edge."""
    threads = number(row, "threads")
    batch = number(row, "batch")
    words = [name] if (name := text(row, "scenario")) not in ("", "edge") else []
    words += [] if batch is None else [f"batch {batch:g}"]
    if threads is not None:
        words.append("default threads" if threads == 0 else f"{threads:g} thread{'s' * (threads != 1)}")
    return ", ".join(words)


def peer(row: Report) -> str:
    """Return which baseline of others a row is of, as in "int8"; "" for the original and for ours."""
    return text(row, "details", "peer")


def rivals(bench: Sequence[Report]) -> list[str]:
    """Return a sentence for each baseline of others that beats ours in speed or size without being less accurate.

    Speed counts where the whole interval of the ratio to ours lies beyond EQUAL_WITHIN; an accuracy counts as equal
    unless its interval lies below ours.
    """
    names = list(dict.fromkeys(text(row, "artifact") for row in bench if peer(row)))
    ours = next((row for row in bench if not peer(row) and text(row, "artifact") != text(bench[0], "artifact")), {})
    found = [_rival([row for row in bench if text(row, "artifact") == name], ours) for name in names]
    return [sentence for sentence in found if sentence]


def _rival(found: Sequence[Report], ours: Report) -> str:
    ahead = [row for row in found if (ends := interval(row, "details", "ratio_to_ours_ci95")) and _is_below(ends[1])]
    mine, theirs = number(ours, "details", "size_bytes"), number(found[0], "details", "size_bytes")
    told = [
        f"{1 / (number(row, 'details', 'ratio_to_ours') or 1):.2f} times as fast as ours at {condition(row)}"
        for row in ahead
    ]
    told += [f"{mine / theirs:.2f} times smaller"] if mine and theirs and _is_below(theirs / mine) else []
    accuracy = _rival_accuracy(found[0])
    return f"{text(found[0], 'artifact')} is {', '.join(told)}{accuracy}." if told and accuracy else ""


def _is_below(ratio: float) -> bool:
    return ratio < 1 - EQUAL_WITHIN


def _rival_accuracy(row: Report) -> str:
    """Return how accurate a baseline is beside ours; "" where it is less accurate."""
    behind, ends = number(row, "details", "behind_ours"), interval(row, "details", "behind_ours_ci95")
    if behind is None:
        return "; its accuracy was not compared"
    if ends is None:
        return "" if behind > 0 else ", and no less accurate"
    return "" if ends[0] > 0 else ", and no less accurate"


def doubt(row: Report, *, briefly: bool = False) -> str:
    """Return why a row is not to be trusted, as in "not VALID (too few queries)"; "" where it says nothing of it."""
    found = []
    for key, bad, words, reasons in _DOUBTS:
        if at(row, "details", key) is bad:
            why = "" if briefly else _joined(*(at(row, "details", reason) for reason in reasons))
            found.append(f"{words} ({why})" if why else words)
    return " and ".join(found)


def speed(bench: Sequence[Report], reason: str = "") -> str:
    """Return one sentence per compared artifact, the slowest first; `reason` says why one is slower.

    After them come the baselines of others that beat ours.
    """
    found = comparisons(bench)
    if not found:
        return _alone(bench)
    names = list(dict.fromkeys(item.artifact for item in found))
    told = [_sentence([item for item in found if item.artifact == name], reason) for name in names]
    return "\n".join([*told, *rivals(bench)])


def over_processes(row: Report) -> bool:
    """Return whether the ratio of a row is that of least latencies, and not of medians."""
    return text(row, "details", "interval").startswith("over")


def _alone(bench: Sequence[Report]) -> str:
    """Return what is known where nothing stands beside the first artifact."""
    if not bench or (p50 := number(bench[0], "latency_ms_p50")) is None:
        return "Speed was not measured."
    name, where = text(bench[0], "artifact"), condition(bench[0])
    return f"{name} takes {p50:.4g} ms (p50) at {where}; no other file was measured beside it."


def headline(report: Report) -> str:
    """Return the verdict on a whole run: what failed (`failure`, verification), then speed, size, accuracy.

    A benchmark alone has a speed and nothing else.
    """
    if is_bench(report):
        line = _short_speed(report)
        return line[:1].upper() + line[1:]
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


def _comparison(row: Report, baseline: str, beside: Mapping[str, Report]) -> Comparison:
    load, load_ci95 = number(row, "details", _LOAD), interval(row, "details", f"{_LOAD_NAME}_ci95")
    under = condition(row)
    doubtful = row if doubt(row) else beside.get(under, {})
    return Comparison(
        artifact=text(row, "artifact"),
        baseline=baseline,
        condition=under,
        ratio=1 / load if load else number(row, "ratio_to_baseline"),
        ratio_ci95=_inverse(load_ci95) if load else interval(row, "ratio_ci95"),
        quantity="load" if load else "latency",
        doubt=doubt(doubtful),
        brief_doubt=doubt(doubtful, briefly=True),
    )


_LOAD_NAME = "throughput_ratio"
_LOAD = f"{_LOAD_NAME}_to_baseline"


def _inverse(ends: Interval | None) -> Interval | None:
    return None if ends is None or ends[0] <= 0 else (1 / ends[1], 1 / ends[0])


_DOUBTS = (
    ("valid", False, "not VALID", ("invalid_because",)),
    ("drifted", True, "clocks drifted", ("drift_reason", "drift_reasons")),
)
"""Key of `details`, its value that makes a row doubtful, how that is called, and where the reason stands."""


def _joined(*reasons: object) -> str:
    items = [item for reason in reasons for item in (reason if isinstance(reason, list | tuple) else [reason])]
    return "; ".join(str(item).rstrip(".") for item in items if item)


def _sentence(found: Sequence[Comparison], reason: str) -> str:
    first = found[0]
    parts = [_claim(first)]
    parts += [f"{_judged(item)} at {item.condition} ({_factor(item)})" for item in found[1:4]]
    parts += [f"{len(found) - 4} more conditions in the table"] if len(found) > 4 else []
    parts += [reason.rstrip(".")] if first.speed == "slower" and reason else []
    return "; ".join(parts) + "."


def _judged(item: Comparison) -> str:
    return f"{item.speed}, but {item.doubt}," if item.doubt else item.speed


def _claim(item: Comparison) -> str:
    if item.ratio is None:
        return f"Not measured: {item.artifact} has no latency to hold against {item.baseline}"
    verb = "serves" if item.quantity == "load" else "runs" if item.speed == "faster" else "takes"
    told = f"{item.artifact} {verb} {_factor(item)} as {item.baseline} at {item.condition}"
    if item.ratio_ci95 is None:
        return f"Not measured well enough: {told}, from too few rounds for an interval"
    low, high = item.ratio_ci95
    if item.quantity == "load" or item.speed == "faster":
        low, high = 1 / high, 1 / low
    judged = _judged(item).rstrip(",")
    return f"{judged[:1].upper()}{judged[1:]}: {told} (95 % interval {low:.2f} to {high:.2f})"


def _factor(item: Comparison) -> str:
    if not item.ratio:
        return "no latency"
    if item.quantity == "load":
        return f"{1 / item.ratio:.2f} times as many per second"
    return f"{1 / item.ratio:.2f} times as fast" if item.speed == "faster" else f"{item.ratio:.2f} times as long"


def _short_speed(report: Report) -> str:
    found = comparisons(rows(report, "bench"))
    if not found or found[0].ratio is None or found[0].speed == "not measured":
        return "speed not measured"
    first, ratio, where = found[0], found[0].ratio, f" ({found[0].condition})" if len(found) > 1 else ""
    but = f", but {first.brief_doubt}" if first.doubt else ""
    if first.speed == "no measurable difference":
        return f"no measurable difference in speed{but}{where}"
    if first.quantity == "load":
        how = f"{1 / ratio:.2f} times the load"
    else:
        how = f"{ratio:.2f} times the latency" if first.speed == "slower" else f"{1 / ratio:.2f} times as fast"
    return f"{first.speed}{but}: {how}{where}"


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
