"""Scenario singlestream: LoadGen sends a sample when the answer to the last has come. Judged by the 90th percentile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..exporters.runner import Open
from . import loadgen, mlperf
from .batching import Policy
from .mlperf import Spec as Spec
from .rows import Progress, Row, silent


def run(artifacts: Sequence[Path], spec: Spec, open_: Open, progress: Progress = silent) -> list[Row]:
    """Return a row per thread count and artifact."""
    test = loadgen.Test(kind="SingleStream", min_seconds=spec.min_seconds, min_queries=spec.min_queries, seed=spec.seed)
    return mlperf.run(test, Policy(), (artifacts, spec, open_, progress))
