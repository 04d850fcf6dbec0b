"""Scenario multistream: LoadGen sends `samples_per_query` samples when the answers to the last ones have come.

They run as one batch where the model has a batch dimension; latencies are of whole queries.
"""

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
    test = loadgen.Test(
        kind="MultiStream",
        min_seconds=spec.min_seconds,
        min_queries=spec.min_queries,
        samples_per_query=spec.samples_per_query,
        seed=spec.seed,
    )
    policy = Policy(max_batch=min(spec.samples_per_query, spec.max_batch), workers=spec.workers)
    return mlperf.run(test, policy, (artifacts, spec, open_, progress))
