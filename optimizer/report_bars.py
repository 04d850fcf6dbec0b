"""The bars of report.html: the stages of a request, and the energy of an inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import report_format as fmt
from .report_curves import by_condition
from .report_value import Report, at, number, text
from .verdict import doubt

STAGES = ("decode", "resize", "normalise", "host_to_device", "queue", "compute", "device_to_host", "post")
"""In the order of a request; the page has a colour for each."""
SUM_WITHIN = 0.1
"""The sum of the stages' medians and the median of the whole may differ by this much before the page remarks on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stage of a bar: its colour, and its width in per cent of the longest bar."""

    stage: str
    tone: int
    width: float
    shown: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """The stages of one artifact, end to end; `note`: their sum, and how it compares."""

    artifact: str
    doubt: str
    note: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The bars of one condition on one scale; `sentence` names the longest stage of each; `table`: stage and cells."""

    condition: str
    sentence: str
    bars: tuple[Bar, ...]
    table: tuple[tuple[str, int, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """The energy of one inference; `width` in per cent of the most; where it was not measured None, and `note` why."""

    artifact: str
    condition: str
    doubt: str
    shown: str
    width: float | None
    meter: str
    mean: str
    idle: str
    note: str


def stages(bench: Sequence[Report]) -> list[Stages]:
    """Return the bars of each condition; [] where no row has stages."""
    found = []
    for name, group in by_condition(bench).items():
        timed = [(row, times) for row in group if (times := _times(row))]
        if timed:
            found.append(_group(name, timed))
    return found


def energies(bench: Sequence[Report]) -> list[Energy]:
    """Return a line per row; [] where no row has a number."""
    most = max((number(row, "energy_j") or 0.0 for row in bench), default=0.0)
    if all(number(row, "energy_j") is None for row in bench):
        return []
    return [_energy(name, row, most) for name, group in by_condition(bench).items() for row in group]


def why_no_energy(bench: Sequence[Report]) -> str:
    """Return the reasons that rows without energy give."""
    reasons = dict.fromkeys(reason for row in bench if (reason := _reason(row)))
    return "; ".join(reasons) or "no meter was read"


def _times(row: Report) -> dict[str, float]:
    """Return the milliseconds of each known stage: ours in the order of a request, then any other."""
    given = at(row, "stages")
    names = list(given) if isinstance(given, Mapping) else []
    ordered = [name for name in STAGES if name in names] + [name for name in names if name not in STAGES]
    return {name: ms for name in ordered if (ms := number(row, "stages", name)) is not None and ms >= 0}


def _group(name: str, timed: Sequence[tuple[Report, dict[str, float]]]) -> Stages:
    longest = max(sum(times.values()) for _, times in timed) or 1.0
    every = list(dict.fromkeys(stage for _, times in timed for stage in times))
    every.sort(key=lambda stage: STAGES.index(stage) if stage in STAGES else len(STAGES))
    most = [f"{text(row, 'artifact')}: {_most(times)}" for row, times in timed if sum(times.values()) > 0]
    return Stages(
        condition=name,
        sentence=f"Longest stage of {'; of '.join(most)}." if most else "",
        bars=tuple(_bar(row, times, longest) for row, times in timed),
        table=tuple((_words(stage), _tone(stage), tuple(_cell(times, stage) for _, times in timed)) for stage in every),
    )


def _bar(row: Report, times: Mapping[str, float], longest: float) -> Bar:
    segments = tuple(
        Segment(stage=_words(stage), tone=_tone(stage), width=100 * ms / longest, shown=fmt.milliseconds(ms))
        for stage, ms in times.items()
    )
    total, whole = sum(times.values()), number(row, "latency_ms_p50")
    note = f"sum {fmt.milliseconds(total)}, end to end p50 {fmt.milliseconds(whole)}"
    if whole and abs(total / whole - 1) > SUM_WITHIN:
        note += f": the sum is {abs(100 * (total / whole - 1)):.0f} % {'more' if total > whole else 'less'}"
    return Bar(artifact=text(row, "artifact") or fmt.DASH, doubt=doubt(row, briefly=True), note=note, segments=segments)


def _most(times: Mapping[str, float]) -> str:
    stage = max(times, key=lambda name: times[name])
    return f"{_words(stage)}, {100 * times[stage] / sum(times.values()):.0f} %"


def _cell(times: Mapping[str, float], stage: str) -> str:
    if stage not in times:
        return fmt.DASH
    total = sum(times.values())
    share = f" ({100 * times[stage] / total:.0f} %)" if total else ""
    return fmt.milliseconds(times[stage]) + share


def _words(stage: str) -> str:
    return stage.replace("_", " ")


def _tone(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _energy(name: str, row: Report, most: float) -> Energy:
    joules = number(row, "energy_j")
    return Energy(
        artifact=text(row, "artifact") or fmt.DASH,
        condition=name,
        doubt=doubt(row, briefly=True),
        shown=fmt.DASH if joules is None else fmt.joules(joules),
        width=None if joules is None or most <= 0 else max(100 * joules / most, 0.0),
        meter=text(row, "details", "meter") or fmt.DASH,
        mean=_watts(row, "mean_w"),
        idle=_watts(row, "idle_w"),
        note="" if joules is not None else _reason(row),
    )


def _reason(row: Report) -> str:
    """Return why there is no energy, as `details` has it: "unavailable: no meter covers the CPU"."""
    return "" if number(row, "energy_j") is not None else text(row, "details", "energy")


def _watts(row: Report, key: str) -> str:
    value = number(row, "details", key)
    return fmt.DASH if value is None else f"{value:.3g} W"
