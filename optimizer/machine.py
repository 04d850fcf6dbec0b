"""Which machine a report was measured on, and whether the speeds of two reports can be held against each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from .report_value import Report, at, rows, text

RUNTIMES = ("onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "numpy")
"""Packages whose version decides what runs; that of paredown may differ, since it is what people compare."""
FACTS: dict[str, tuple[str, ...]] = {
    "cpu model": ("cpu", "model"),
    "architecture": ("cpu", "architecture"),
    "cores": ("cpu", "cores"),
    "usable cores": ("cpu", "cores_usable"),
    "governor": ("cpu", "governor"),
    "power mode": ("power_mode",),
    "gpu": ("gpu",),
    "instruction sets": ("cpu", "flags"),
    "thread variables": ("threads_env",),
    "kernels": ("kernels",),
    **{f"{name} version": ("packages", name) for name in RUNTIMES},
}
"""What a speed depends on, and where the environment of a report has it."""


def facts(report: Report) -> dict[str, object]:
    """Return what a report says of its machine; a fact that it has no key for is left out, null is kept."""
    known = {name: ("environment", *path) for name, path in FACTS.items()}
    found = {name: at(report, *path) for name, path in known.items() if _has(report, path)}
    modes = {mode for row in rows(report, "bench") if (mode := text(row, "details", "state", "before", "power_mode"))}
    return found | ({"power mode": ", ".join(sorted(modes))} if modes else {})


def fingerprint(report: Report) -> str:
    """Return a short hash of the machine's facts, "" where a report does not say what machine it was."""
    found = facts(report)
    if not found.get("cpu model"):
        return ""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def differences(first: Report, second: Report) -> list[str]:
    """Return what differs between the machines of two reports, a phrase each, as in "cores 2 and 4".

    A fact that one of them has no key for is not compared: reports of earlier versions had fewer.
    """
    left, right = facts(first), facts(second)
    unknown = [name for name, found in (("first", left), ("second", right)) if not found.get("cpu model")]
    if unknown:
        return [f"the {name} does not say which" for name in unknown]
    return [_difference(name, left[name], right[name]) for name in left if name in right and left[name] != right[name]]


def _difference(name: str, left: object, right: object) -> str:
    if isinstance(left, list) and isinstance(right, list):
        only = [
            f"{', '.join(str(item) for item in ours if item not in theirs)} only in the {place}"
            for place, ours, theirs in (("first", left, right), ("second", right, left))
            if set(map(str, ours)) - set(map(str, theirs))
        ]
        return f"{name} ({', '.join(only) or 'in another order'})"
    return f"{name} {_shown(left)} and {_shown(right)}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return "not recorded" if value is None or value == "" else str(value)


def _has(value: object, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True
