"""Numbers of a report as text for people; a dash for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .report_value import Interval

DASH = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def size(count: float | None) -> str:
    """Return bytes as kB, MB or GB (powers of 1000)."""
    if count is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count / scale < 999.5 else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def count(value: float | None) -> str:
    """Return a large count with a suffix: 272 k, 1.25 G."""
    if value is None:
        return DASH
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def score(value: float | None, *, fraction: bool) -> str:
    """Return a metric's value: per cent where it is a fraction, four digits otherwise."""
    if value is None:
        return DASH
    return f"{100 * value:.2f} %" if fraction else f"{value:.4g}".replace("-", _MINUS)


def milliseconds(value: float | None) -> str:
    return DASH if value is None else f"{_digits(value)} ms"


def joules(value: float | None) -> str:
    """Return J, mJ or \N{MICRO SIGN}J."""
    if value is None:
        return DASH
    unit, scale = next(((u, s) for u, s in (("J", 1.0), ("mJ", 1e-3)) if abs(value) >= s), ("\N{MICRO SIGN}J", 1e-6))
    return f"{plain(value / scale)} {unit}"


def seconds(value: float | None) -> str:
    """Return 850 ms, 12.3 s or 4 min 10 s."""
    if value is None:
        return DASH
    if value < 1:
        return f"{1000 * value:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value // 60:.0f} min {value % 60:.0f} s"


def plain(value: float | None, digits: int = 3) -> str:
    """Return significant digits."""
    return DASH if value is None else f"{value:.{digits}g}".replace("-", _MINUS)


def times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def points(value: float | None) -> str:
    """Return a signed change with two decimals."""
    return DASH if value is None else f"{round(value, 2) + 0.0:+.2f}".replace("-", _MINUS)


def span(interval: Interval | None, scale: float = 1.0) -> str:
    """Return "low to high" with at least two digits of the interval's width; "" for no interval."""
    if interval is None:
        return ""
    low, high = (end * scale for end in interval)
    digits = 2 if high <= low else min(max(1 - math.floor(math.log10(high - low)), 1 if high - low >= 10 else 2), 6)
    return f"{low:.{digits}f} to {high:.{digits}f}".replace("-", _MINUS)


def mapping(value: object) -> str:
    """Return "key: value, other: {key: value}, list: [1, 2]" on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_inner(item)}" for key, item in value.items()) or DASH
    return _inner(value)


def _inner(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + mapping(value) + "}" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inner(item) for item in value) + "]"
    return DASH if value is None else str(value)


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"
