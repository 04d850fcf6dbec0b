"""Never slower: layers, or the whole network, go back to floats where measuring says that compression does not pay.

What measures is passed in. All that is decided ends in the plan, so that a run of that plan needs no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from . import quantize
from .errors import InfeasibleError
from .model import Model
from .never_slower import Measured, Objective, Whole, factor, kept_note, outcome, surely_slower, told, why
from .planning import Planned
from .recipe import step_module
from .steps import Decision, short
from .weight import Dense

GRIDS = "layers on int8 grids are fused with their neighbours, so that only the whole network is measured"
NARROW = 8
"""Widths that are no multiples of it leave lanes of a processor's registers empty."""


class Clock(Protocol):
    """What measures on the device. whole: the first candidate is the model as planned, the last has the fallbacks."""

    def layers(self, model: Model, names: Sequence[str]) -> Sequence[Measured]: ...

    def whole(self, candidates: Sequence[Model]) -> Whole: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What measuring decided. layers, notes: weight -> why it falls back, and what is said of those that stay.

    whole: why everything falls back. remark: what else the report says of the whole network.
    """

    layers: Mapping[str, str]
    notes: Mapping[str, str]
    whole: str = ""
    remark: str = ""

    def plan(self, planned: Sequence[Planned]) -> list[Planned]:
        """Return the plan with these fallbacks."""
        planned = without(planned, self.layers)
        return undone(planned, self.whole) if self.whole else planned

    def rows(self, decided: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the decisions of a report with what was measured of them."""
        found = [
            {**row, "reason": f"{row['reason']}; {self.notes[row['layer']]}"}
            if "kept" in row and row["layer"] in self.notes
            else dict(row)
            for row in decided
        ]
        if self.whole:
            found.append({"layer": "*", "fallback": "the original", "reason": self.whole})
        return [*found, *([{"layer": "*", "kept": "as measured", "reason": self.remark}] if self.remark else [])]


def settle(
    planned: Sequence[Planned],
    apply: Callable[[Sequence[Planned]], Model],
    clock: Clock,
    objective: Objective,
) -> Settled:
    """Measure the layers of a plan, then the network with and without the fallbacks that follow, and decide.

    apply: the steps, as a function of the plan. Fallbacks with which the network is surely slower are taken back.
    """
    model = apply(planned)
    found = [] if model.acts else clock.layers(model, compressed(model, planned))
    layers, notes = _judged(found, objective)
    candidates = [model, apply(without(planned, layers))] if layers else [model]
    whole = clock.whole(candidates)
    remark = GRIDS if model.acts else ""
    if layers and surely_slower(whole.last_to_first):
        worst = next(timing for timing in whole.last_to_first if surely_slower([timing]))
        back = f"{len(layers)} layers that do not pay alone stay: with them as floats the network takes {factor(worst)}"
        return _whole(Settled(layers={}, notes=notes, remark=back), (whole, 0), found, planned, objective)
    settled = Settled(layers=layers, notes=notes, remark=remark)
    return _whole(settled, (whole, len(candidates) - 1), found, planned, objective)


def compressed(model: Model, planned: Sequence[Planned]) -> list[str]:
    """Return the weights that quantize or factorize steps have changed."""
    asked = {d.layer for step, decisions in planned if _restores(step.name) for d in decisions if d.method}
    return [name for name, weight in model.weights.items() if name in asked and not isinstance(weight, Dense)]


def without(planned: Sequence[Planned], reasons: Mapping[str, str]) -> list[Planned]:
    """Return the plan in which these weights stay as they are; prune decides on whole groups and is left alone."""

    def changed(decision: Decision) -> Decision:
        falls = decision.method and decision.layer in reasons
        return Decision(layer=decision.layer, reason=reasons[decision.layer]) if falls else decision

    return [
        (step, tuple(map(changed, decisions)) if _restores(step.name) else decisions) for step, decisions in planned
    ]


def undone(planned: Sequence[Planned], reason: str) -> list[Planned]:
    """Return the plan in which nothing is compressed."""
    return [
        (step, tuple(Decision(layer=d.layer, reason=reason) if d.method else d for d in decisions))
        for step, decisions in planned
    ]


def check_strict(settled: Settled, where: str) -> None:
    """Raise InfeasibleError where anything falls back."""
    if settled.whole:
        raise InfeasibleError("the whole network would fall back to the original", where=where, fix=settled.whole)
    if settled.layers:
        layer, reason = next(iter(settled.layers.items()))
        fix = "name it in skip, or run without --strict"
        raise InfeasibleError(f'layer "{short(layer)}" would stay dense: {reason}', where=where, fix=fix)


def _judged(found: Sequence[Measured], objective: Objective) -> tuple[dict[str, str], dict[str, str]]:
    layers: dict[str, str] = {}
    notes: dict[str, str] = {}
    for measured in found:
        if measured.timings and outcome(measured.timings, objective) == "fallback":
            layers |= dict.fromkeys(measured.layers, why(measured, objective))
        else:
            notes |= dict.fromkeys(measured.layers, kept_note(measured, objective))
    return layers, notes


def _whole(
    settled: Settled,
    chosen: tuple[Whole, int],
    found: Sequence[Measured],
    planned: Sequence[Planned],
    objective: Objective,
) -> Settled:
    """Let everything fall back where the best network does not pay."""
    whole, best = chosen
    timings = whole.candidates[best]
    if outcome(timings, objective) != "fallback":
        return settled
    worst = max(timings, key=lambda timing: timing.ci95[0] if timing.ci95 else 0.0)
    reasons = (f"the whole network is {told(worst, objective)}", *_causes(whole, best, found, planned))
    return replace(settled, whole="; ".join(reasons), remark="")


def _causes(whole: Whole, best: int, found: Sequence[Measured], planned: Sequence[Planned]) -> list[str]:
    """Return what keeps a network from being faster, with numbers."""
    reasons = []
    decoded = sum(len(item.layers) for item in found if item.decoded)
    if decoded:
        total = sum(len(item.layers) for item in found)
        reasons.append(f"{decoded} of {total} compressed layers are decoded to floats when loaded")
    if whole.operators and whole.operators[best + 1] > whole.operators[0]:
        now, before = whole.operators[best + 1], whole.operators[0]
        reasons.append(f"fusion broken: {now} operators run instead of {before}")
    widths = [d.spec.keep for step, ds in planned if step.name == "prune" for d in ds if d.method]
    narrow = [width for width in widths if width % NARROW]
    if narrow:
        sizes = ", ".join(map(str, dict.fromkeys(narrow[:4])))
        reasons.append(f"width not aligned: {len(narrow)} pruned widths are no multiples of {NARROW} ({sizes})")
    return reasons


def _restores(step: str) -> bool:
    """Return whether a step changes weights one by one, so that a single one can stay as it is."""
    return bool(step_module(step).UNTOUCHED == quantize.UNTOUCHED)
