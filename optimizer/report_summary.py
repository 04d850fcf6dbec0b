"""What a report says at a glance: before and after, the spread of bit widths."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from . import report_format as fmt
from .report_value import Interval, Report, interval, is_fraction, number, rows, text, weights
from .verdict import EQUAL_WITHIN, condition, doubt, is_bench, over_processes, peer

LONG_MODES = {
    "decoded": "decoded to floats at load",
    "exact": "packed (exact)",
    "exact + decoded": "packed (exact) and decoded",
    "int8 dynamic": "packed (int8 dynamic)",
    "int8 dynamic + decoded": "packed (int8 dynamic) and decoded",
}
Tone: TypeAlias = Literal["good", "bad", "same"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the before/after table. `condition` says when; the notes of the values hold 95 % intervals."""

    label: str
    before: str
    after: str
    change: str
    before_note: str = ""
    after_note: str = ""
    change_note: str = ""
    tone: Tone = "same"
    condition: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How many layers and weights are stored at one bit width. `bits` None: not recorded."""

    bits: float | None
    layers: int
    weights: int | None
    bytes: float | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The bench rows of baseline and optimized model under one condition."""

    condition: str
    baseline: Report
    optimized: Report | None


def lines(report: Report) -> list[Line]:
    """Return the before/after table: metric, sizes, then latencies of the first condition."""
    if is_bench(report):
        return _latency_lines(report)
    found = [_metric_line(report), _ratio_line(report, "weights on disk", "size_bytes"), _bits_line(report)]
    found += [_ratio_line(report, name, name) for name in ("parameters", "macs") if number(report, "baseline", name)]
    return found + _latency_lines(report)


def label(line: Line) -> str:
    """Return the label of a line with its condition."""
    return f"{line.label}, {line.condition}" if line.condition else line.label


def pairs(report: Report) -> list[Pair]:
    """Return baseline and first other artifact per condition, in the order of the bench rows."""
    bench = [row for row in rows(report, "bench") if not peer(row)]
    groups: dict[str, list[Report]] = defaultdict(list)
    for row in bench:
        groups[condition(row)].append(row)
    return [
        Pair(condition=name, baseline=group[0], optimized=group[1] if len(group) > 1 else None)
        for name, group in groups.items()
    ]


def widths(layers: Sequence[Report]) -> list[Width]:
    """Return the distribution of bit widths, widest first; `share` is of the known weights."""
    groups: dict[float | None, list[Report]] = defaultdict(list)
    for layer in layers:
        groups[number(layer, "bits")].append(layer)
    total = sum(weights(layer) or 0 for layer in layers)
    ordered = sorted(groups, key=lambda bits: -1.0 if bits is None else bits, reverse=True)
    return [_width(bits, groups[bits], total) for bits in ordered]


def computing(report: Report) -> str:
    """Return one sentence: how many layers compute how, and with which kernels; "" where no file says it."""
    counts = Counter(mode for row in rows(report, "layers") if (mode := text(row, "mode")))
    if not counts:
        return ""
    found = ", ".join(f"{count} {LONG_MODES.get(mode, mode)}" for mode, count in counts.most_common())
    packed = any(mode.startswith(("exact", "int8 dynamic")) for mode in counts)
    kernels = text(report, "environment", "kernels")
    told = f"; kernels: {kernels or 'none, the portable bodies of the file ran'}" if packed else ""
    return f"Layers: {found}{told}."


def _width(bits: float | None, layers: Sequence[Report], total: int) -> Width:
    held = sum(weights(layer) or 0 for layer in layers)
    sizes = [size for layer in layers if (size := number(layer, "size_bytes")) is not None]
    return Width(
        bits=bits,
        layers=len(layers),
        weights=held or None,
        bytes=sum(sizes) if sizes else None,
        share=held / total if total else 0.0,
    )


def _metric_line(report: Report) -> Line:
    fraction = is_fraction(report)
    scale = 100.0 if fraction else 1.0
    drop, ends = number(report, "final", "drop"), interval(report, "final", "drop_ci95")
    return Line(
        label=text(report, "final", "metric", "name") or text(report, "baseline", "metric", "name") or "metric",
        before=fmt.score(number(report, "baseline", "metric", "value"), fraction=fraction),
        after=fmt.score(number(report, "final", "metric", "value"), fraction=fraction),
        before_note=fmt.span(interval(report, "baseline", "metric_ci95"), scale),
        after_note=fmt.span(interval(report, "final", "metric_ci95"), scale),
        change=fmt.DASH if drop is None else fmt.points(-drop) + " points" * fraction,
        change_note=fmt.span(None if ends is None else (-ends[1], -ends[0])),
        tone=_drop_tone(drop, ends),
    )


def _drop_tone(drop: float | None, ends: Interval | None) -> Tone:
    low, high = ends or (drop or 0.0, drop or 0.0)
    if low > 0:
        return "bad"
    return "good" if high < 0 else "same"


def _ratio_line(report: Report, label: str, key: str) -> Line:
    before, after = number(report, "baseline", key), number(report, "final", key)
    show = fmt.size if key == "size_bytes" else fmt.count
    ratio = after / before if before and after else None
    return Line(
        label="MACs" if label == "macs" else label,
        before=show(before),
        after=show(after),
        change=fmt.DASH if ratio is None else _how_much_smaller(ratio),
        tone=_ratio_tone(None if ratio is None else (ratio, ratio)),
    )


def _how_much_smaller(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "same"
    return f"{fmt.times(1 / ratio)} smaller" if ratio < 1 else f"{fmt.times(ratio)} larger"


def _bits_line(report: Report) -> Line:
    return Line(
        label="bits per weight",
        before=fmt.DASH,
        after=fmt.plain(number(report, "final", "bits_per_weight")),
        change=fmt.DASH,
    )


def _latency_lines(report: Report) -> list[Line]:
    found = pairs(report)
    if not found:
        return [Line(label="latency p50", before=fmt.DASH, after=fmt.DASH, change="not measured")]
    first = found[0]
    return _load_lines(first) + [_latency_line(first, name) for name in ("p50", "p99")] + _memory_lines(first)


def _load_lines(pair: Pair) -> list[Line]:
    """Return the load that each side held, where a scenario looked for it."""
    before, after = (number(row, "details", "scheduled_per_s") for row in (pair.baseline, pair.optimized or {}))
    if before is None and after is None:
        return []
    ends = interval(pair.optimized or {}, "details", "throughput_ratio_ci95")
    target = number(pair.baseline, "details", "target_p99_ms")
    return [
        Line(
            label="load held" if target is None else f"load held at p99 of {target:g} ms",
            condition=pair.condition,
            before=_per_second(before),
            after=_per_second(after),
            change=fmt.times(number(pair.optimized or {}, "details", "throughput_ratio_to_baseline")),
            change_note=fmt.span(ends),
            tone=_trusted(pair, _ratio_tone(None if ends is None or ends[0] <= 0 else (1 / ends[1], 1 / ends[0]))),
        )
    ]


def _trusted(pair: Pair, tone: Tone) -> Tone:
    """Return a tone, but none for what is not to be trusted on either side."""
    return "same" if doubt(pair.baseline) or doubt(pair.optimized or {}) else tone


def _per_second(value: float | None) -> str:
    return fmt.DASH if value is None else f"{fmt.plain(value, 4)} per s"


def _latency_line(pair: Pair, percentile: str) -> Line:
    key, after = f"latency_ms_{percentile}", pair.optimized or {}
    is_median = percentile == "p50"
    ratio = number(after, "ratio_to_baseline") if is_median else _quotient(after, pair.baseline, key)
    ends = interval(after, "ratio_ci95") if is_median else None
    return Line(
        label=f"latency {percentile}",
        condition=pair.condition,
        before=fmt.milliseconds(number(pair.baseline, key)),
        after=fmt.milliseconds(number(after, key)),
        before_note=fmt.span(interval(pair.baseline, "ci95")) if is_median else "",
        after_note=fmt.span(interval(after, "ci95")) if is_median else "",
        change=fmt.DASH if ratio is None else f"{fmt.times(ratio)} the time",
        change_note=fmt.span(ends) + (", of least latencies" if over_processes(after) else ""),
        tone=_trusted(pair, _ratio_tone(ends)),
    )


def _memory_lines(pair: Pair) -> list[Line]:
    after = pair.optimized or {}
    ratio = _quotient(after, pair.baseline, "peak_rss_bytes")
    if ratio is None:
        return []
    return [
        Line(
            label="peak memory",
            before=fmt.size(number(pair.baseline, "peak_rss_bytes")),
            after=fmt.size(number(after, "peak_rss_bytes")),
            change=_how_much_smaller(ratio),
            tone=_ratio_tone((ratio, ratio)),
        )
    ]


def _quotient(after: Report, before: Report, key: str) -> float | None:
    first, second = number(before, key), number(after, key)
    return second / first if first and second else None


def _ratio_tone(ends: Interval | None) -> Tone:
    """Return how a ratio to the baseline looks when less is better."""
    if ends is None:
        return "same"
    if ends[0] > 1 + EQUAL_WITHIN:
        return "bad"
    return "good" if ends[1] < 1 - EQUAL_WITHIN else "same"
