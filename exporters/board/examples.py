"""What is done with the examples of a bundle: compared with what onnxruntime computed, and timed; Python 3.8, numpy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

WARM_UP, RUNS = 20, 200


def check(engine: Any, settings: dict[str, Any], folder: Path) -> str:
    """Compare the engine with onnxruntime on every example, output by output; return the first line that fails."""
    allowed: float = settings["tolerance"]
    failed: list[str] = []
    with numpy.load(str(folder / "examples.npz")) as examples:
        for index, feeds in _feeds(examples, settings):
            found = engine.run(feeds)
            for name in settings["outputs"]:
                worst = difference(examples[f"{index}.out.{name}"], found[name])
                line = f"example {index}, {name}: relative difference {worst:.1e}, allowed {allowed:.1e}"
                sys.stdout.write(f"{'ok' if worst <= allowed else '--'} {line}\n")
                failed += [] if worst <= allowed else [line]
    return failed[0] if failed else ""


def bench(engine: Any, settings: dict[str, Any], folder: Path) -> str:
    """Time the engine on each example and print medians and the 99th percentile; nothing fails, so return ""."""
    with numpy.load(str(folder / "examples.npz")) as examples:
        for index, feeds in _feeds(examples, settings):
            times = numpy.array([engine.timed(feeds) for _ in range(WARM_UP + RUNS)])[WARM_UP:] * 1e3
            (whole, inner), (worst, _) = numpy.percentile(times, [50, 99], axis=0)
            line = f"p50 {whole:.3f} ms, p99 {worst:.3f} ms with transfers; p50 {inner:.3f} ms without; {RUNS} runs"
            sys.stdout.write(f"example {index}: {line}\n")
    return ""


def _feeds(examples: Any, settings: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(settings["examples"]):
        yield index, {name: examples[f"{index}.in.{name}"] for name in settings["inputs"]}


def difference(wanted: Any, found: Any) -> float:
    """Return max |a - b| / max |a|; infinite where shapes or what is not finite differ."""
    if wanted.shape != found.shape:
        return float("inf")
    a, b = wanted.astype("float64"), found.astype("float64")
    same = (a == b) | (numpy.isnan(a) & numpy.isnan(b))
    if same.all():
        return 0.0
    apart = numpy.abs(a - b)[~same]
    if not numpy.isfinite(apart).all():
        return float("inf")
    size = numpy.abs(a[numpy.isfinite(a)])
    return float(apart.max() / max(float(size.max()) if size.size else 0.0, 1e-300))
