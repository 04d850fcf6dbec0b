"""Geometry of curves in report.html: values in, SVG coordinates out. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .report_chart import HEIGHT, WIDTH, Tick, ticks
from .report_value import Interval

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 348, 14, 204
TONES = 6
"""Colours and dashes that the page has for artifacts; 0 is the original's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point in the units of the axes; `hollow`: it missed its target, or is not to be trusted."""

    x: float
    y: float
    label: str = ""
    hollow: bool = False
    square: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line through `points`, and dots, in the units of the axes. `note`: what the legend says beside the label."""

    label: str
    tone: int
    points: tuple[tuple[float, float], ...] = ()
    dots: tuple[Dot, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Axes: titles, least ranges, and a horizontal rule (a target) with its label. `log_y`: positive values only."""

    title: str
    x_label: str
    y_label: str
    x_range: Interval | None = None
    y_range: Interval | None = None
    log_y: bool = False
    rule: float | None = None
    rule_label: str = ""
    whole_x: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve in pixels: an SVG path and dots whose labels stand above them."""

    label: str
    tone: int
    path: str
    dots: tuple[Dot, ...]
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A chart in pixels."""

    frame: Frame
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    rule: float | None
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def plot(frame: Frame, curves: Sequence[Curve]) -> Plot:
    """Return the chart of some curves, of which at least one has a point or a dot."""
    xs = [x for curve in curves for x in _values(curve, 0)] + list(frame.x_range or ())
    ys = [y for curve in curves for y in _values(curve, 1)] + list(frame.y_range or ())
    ys += [] if frame.rule is None else [frame.rule]
    x_ticks = _whole_ticks(xs) if frame.whole_x else _even_ticks(xs)
    y_ticks = log_ticks(min(ys), max(ys)) if frame.log_y else _even_ticks(ys)
    place = _Place(x_ticks=x_ticks, y_ticks=y_ticks, log_y=frame.log_y)
    return Plot(
        frame=frame,
        lines=tuple(_line(curve, place) for curve in curves),
        x_ticks=_labelled(x_ticks, [place.x(value) for value in x_ticks]),
        y_ticks=_labelled(y_ticks, [place.y(value) for value in y_ticks]),
        rule=None if frame.rule is None else place.y(frame.rule),
    )


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return 1, 2 and 5 times powers of ten that enclose low..high; over more than three powers, the powers alone."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    start = max((index for index, value in enumerate(found) if value <= low * (1 + 1e-9)), default=0)
    end = min((index for index, value in enumerate(found) if value >= high * (1 - 1e-9)), default=len(found) - 1)
    end = max(end, start + 1)
    return tuple(float(f"{value:.6g}") for value in found[start : end + 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a value stands in pixels."""

    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    log_y: bool

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(_LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT), 1)

    def y(self, value: float) -> float:
        low, high, at = self.y_ticks[0], self.y_ticks[-1], value
        if self.log_y:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return round(_BOTTOM + (at - low) / (high - low) * (_TOP - _BOTTOM), 1)


def _line(curve: Curve, place: _Place) -> Line:
    steps = [f"{place.x(x)} {place.y(y)}" for x, y in curve.points]
    dots = [
        Dot(x=place.x(dot.x), y=place.y(dot.y), label=dot.label, hollow=dot.hollow, square=dot.square)
        for dot in curve.dots
    ]
    path = f"M{'L'.join(steps)}" if len(steps) > 1 else ""
    return Line(label=curve.label, tone=curve.tone, path=path, dots=tuple(dots), note=curve.note)


def _values(curve: Curve, axis: int) -> list[float]:
    return [point[axis] for point in curve.points] + [(dot.x, dot.y)[axis] for dot in curve.dots]


def _even_ticks(values: Sequence[float]) -> tuple[float, ...]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # one value: room on both sides
        room = 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
    return ticks(low, high)


def _whole_ticks(values: Sequence[float]) -> tuple[float, ...]:
    """Return whole numbers from the least to the greatest, at most about seven."""
    low, high = int(min(values)), max(int(max(values)), int(min(values)) + 1)
    step = math.ceil((high - low) / 6)
    return tuple(float(value) for value in range(low, high + step, step))


def _labelled(values: Sequence[float], places: Sequence[float]) -> tuple[Tick, ...]:
    digits = max(len(f"{value:.6g}".partition(".")[2]) for value in values)
    if any(value >= 10 * values[0] > 0 for value in values):  # a logarithmic axis: each tick has its own digits
        labels = [f"{value:,.6g}" for value in values]
    else:
        labels = [f"{value:,.{digits}f}" for value in values]
    return tuple(Tick(at=at, label=label) for at, label in zip(places, labels, strict=True))
