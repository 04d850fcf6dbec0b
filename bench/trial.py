"""The clock of a run that must never be slower: its layers alone, and the whole network beside the original."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..exporters import onnx as target
from ..exporters import onnx_part
from ..optimizer.data import Calibration, rebatch
from ..optimizer.model import Model
from ..optimizer.never_slower import Measured, Timing, Whole
from ..optimizer.verdict import condition
from . import edge, layers
from .compare import BUSY
from .feeds import Feeds
from .rows import Progress, Row, against


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Measures for `optimizer.fallback`. baseline: the exported original. folder: where files are made for a while.

    spec: how the whole network is measured; batch sizes, thread counts and seed are those of single layers too.
    """

    baseline: Path
    folder: Path
    calibration: Calibration
    spec: edge.Spec
    stage: Callable[[str], None]
    progress: Progress

    def layers(self, model: Model, names: Sequence[str]) -> list[Measured]:
        """Return what each compressed weight costs alone, at every batch size and number of threads."""
        self.stage("measure the layers")
        names_of = [spec.name for spec in model.inputs]
        spec = layers.Spec(batch=self.spec.batch, threads=self.spec.threads, seed=self.spec.seed)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.folder) as made:
            return layers.measure(
                model, names, lambda count: self._inputs(names_of, count), (Path(made), spec, self.progress)
            )

    def whole(self, candidates: Sequence[Model]) -> Whole:
        """Return each candidate beside the original, and the last beside the first, all alternating."""
        self.stage("measure the network with and without fallbacks")
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.folder) as made:
            paths = [Path(made) / f"candidate-{index}.onnx" for index in range(len(candidates))]
            for model, path in zip(candidates, paths, strict=True):
                target.export(model, path)
            spec = replace(self.spec, peak_rss=False, meter="none")
            rows = edge.run([self.baseline, *paths], spec, target.open, self.progress)
            operators = tuple(onnx_part.nodes(path) for path in (self.baseline, *paths))
        by_file = [rows[start :: len(paths) + 1] for start in range(len(paths) + 1)]
        original, first, last = by_file[0], by_file[1], by_file[-1]
        return Whole(
            candidates=tuple(_timings(own, original, self.spec.seed) for own in by_file[1:]),
            last_to_first=_timings(last, first, self.spec.seed),
            operators=operators,
        )

    def _inputs(self, names: Sequence[str], count: int) -> Feeds:
        """Return inputs of the network: `count` calibration samples, repeated where there are fewer."""
        batch = rebatch(self.calibration, count).batches[0]
        arrays = [x.numpy(force=True) for x in batch]
        sized = [
            array
            if axis is None or self.calibration.unit
            else np.take(array, np.arange(count) % array.shape[axis], axis)
            for array, axis in zip(arrays, self.calibration.axes, strict=True)
        ]
        return dict(zip(names, sized, strict=True))


def _timings(rows: Sequence[Row], beside: Sequence[Row], seed: int) -> tuple[Timing, ...]:
    return tuple(_timing(row, other, seed) for row, other in zip(rows, beside, strict=True))


def _timing(row: Row, beside: Row, seed: int) -> Timing:
    busy = (row.waited or 0.0) > BUSY
    ratio, interval = against(row, beside, np.random.default_rng([seed, row.threads, row.batch]))
    return Timing(
        condition=condition(row.report()),
        before_us=beside.latency_ms_p50 * 1e3,
        after_us=row.latency_ms_p50 * 1e3,
        ratio=ratio,
        ci95=None if busy else interval,
    )
