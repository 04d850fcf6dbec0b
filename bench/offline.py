"""Scenario offline: LoadGen sends all samples in one query; judged by samples per second.

Latencies are from then until a sample is answered, so they say how long the run was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..exporters.runner import Open
from . import loadgen, mlperf
from .mlperf import Spec as Spec
from .rows import Progress, Row, silent


def run(artifacts: Sequence[Path], spec: Spec, open_: Open, progress: Progress = silent) -> list[Row]:
    """Return a row per thread count and artifact."""
    test = loadgen.Test(kind="Offline", min_seconds=spec.min_seconds, min_queries=spec.min_queries, seed=spec.seed)
    return mlperf.run(test, spec.policy(), (artifacts, spec, open_, progress))
