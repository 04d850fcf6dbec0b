"""Geometry of the charts of report.html: numbers in, SVG coordinates out. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .report_value import Interval

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 346, 14, 204
_LABEL = 76
"""Pixels that a label and its gap need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measured point and its intervals, in the units of the axes."""

    label: str
    x: float
    y: float
    x_ci95: Interval | None = None
    y_ci95: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point in pixels: its error bars from (x0, y) to (x1, y) and (x, y0) to (x, y1), and where its label stands."""

    label: str
    x: float
    y: float
    x0: float
    x1: float
    y0: float
    y1: float
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """A scatter chart in pixels; the first mark is the original."""

    title: str
    x_label: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """A latency distribution in per cent of a common scale from 0: median, its interval, p90 and p99."""

    p50: float
    low: float
    high: float
    p90: float
    p99: float


def scatter(title: str, x_label: str, points: Sequence[Point]) -> Scatter:
    """Return the chart of some points; x starts at 0 and leaves room for a label, y spans the intervals."""
    x_ticks = ticks(0.0, 1.35 * max(end for point in points for end in (point.x, *(point.x_ci95 or ()))))
    ends = [end for point in points for end in (point.y, *(point.y_ci95 or ()))]
    room = 0.15 * (max(ends) - min(ends)) or 0.05 * abs(ends[0]) or 1.0
    y_ticks = ticks(min(ends) - room, max(ends) + room)
    rightmost = max(point.x for point in points)
    marks = tuple(
        _mark(point, (index == 0, point.x < rightmost), (x_ticks, y_ticks)) for index, point in enumerate(points)
    )
    return Scatter(
        title=title,
        x_label=x_label,
        marks=marks,
        x_ticks=_placed(x_ticks, (_LEFT, _RIGHT)),
        y_ticks=_placed(y_ticks, (_BOTTOM, _TOP)),
    )


def strip(values: tuple[float, float, float], interval: Interval | None, longest: float) -> Strip:
    """Return a strip of (p50, p90, p99) on a scale that ends at `longest`."""
    p50, p90, p99 = (100 * value / longest for value in values)
    low, high = (p50, p50) if interval is None else (100 * end / longest for end in interval)
    return Strip(p50=p50, low=low, high=high, p90=p90, p99=p99)


def ticks(low: float, high: float, count: int = 6) -> tuple[float, ...]:
    """Return about `count` round numbers (steps of 1, 2, 2.5 or 5) that enclose low..high."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def _mark(point: Point, place: tuple[bool, bool], scales: tuple[Sequence[float], Sequence[float]]) -> Mark:
    """Return the mark of a point; its label points away from the others. `place`: (is first, has one on its right)."""
    (first, has_right), (x_ticks, y_ticks) = place, scales
    x, y = _pixel(point.x, x_ticks, (_LEFT, _RIGHT)), _pixel(point.y, y_ticks, (_BOTTOM, _TOP))
    x0, x1 = (_pixel(end, x_ticks, (_LEFT, _RIGHT)) for end in point.x_ci95 or (point.x, point.x))
    y0, y1 = (_pixel(end, y_ticks, (_BOTTOM, _TOP)) for end in point.y_ci95 or (point.y, point.y))
    to_the_left = x - _LEFT > _LABEL if has_right else _RIGHT - x < _LABEL
    return Mark(
        label=point.label,
        x=x,
        y=y,
        x0=x0,
        x1=x1,
        y0=y0,
        y1=y1,
        label_x=x - 10 if to_the_left else x + 10,
        label_y=y - 8 if first else y + 17,
        anchor="end" if to_the_left else "start",
    )


def _placed(values: Sequence[float], ends: tuple[float, float]) -> tuple[Tick, ...]:
    digits = max((len(f"{value:.6g}".partition(".")[2]) for value in values), default=0)
    return tuple(Tick(at=_pixel(value, values, ends), label=f"{value:,.{digits}f}") for value in values)


def _pixel(value: float, scale: Sequence[float], ends: tuple[float, float]) -> float:
    share = (value - scale[0]) / (scale[-1] - scale[0])
    return round(ends[0] + share * (ends[1] - ends[0]), 1)
