"""Inputs and expected outputs of a bundle, by onnxruntime from the portable file of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..optimizer.artifact import at_sizes
from ..optimizer.errors import ExportError
from ..optimizer.model import Model
from . import onnx, tensorrt_compare
from .runner import RunnerOptions, arrays
from .tensorrt_profile import Sizes

ROWS = 3
"""Samples of the second example, where the profile has room for them."""
DTYPES = ("float32", "float16", "int8", "uint8", "int32", "int64", "bool")
"""Types that numpy and TensorRT both have."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examples:
    """Arrays by "0.in.NAME" and "0.out.NAME", and the names of the outputs."""

    arrays: Mapping[str, np.ndarray]
    count: int
    outputs: tuple[str, ...]


def examples(model: Model, profile: Mapping[str, Sizes]) -> Examples:
    """Return seeded inputs with one sample and with several, and what the model computes of them.

    The portable bodies run, so that the arrays do not depend on which kernels this machine has.
    """
    for spec in model.inputs:
        if spec.dtype not in DTYPES:
            what = f'the input "{spec.name}" is {spec.dtype}, which a board without torch cannot feed'
            raise ExportError(what, fix="make the input float32 or float16")
    arrays: dict[str, np.ndarray] = {}
    outputs: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.export(tensorrt_compare.truth(model), path)
        runner = onnx.open(path, RunnerOptions(threads=1, exact=True, kernels=False))
        chosen = _sizes(profile)
        for index, sizes in enumerate(chosen):
            feeds = _feeds(model, sizes)
            found = runner.run(feeds)
            outputs = tuple(found)
            arrays |= {f"{index}.in.{name}": array for name, array in feeds.items()}
            arrays |= {f"{index}.out.{name}": array for name, array in found.items()}
    return Examples(arrays=arrays, count=len(chosen), outputs=outputs)


def _sizes(profile: Mapping[str, Sizes]) -> list[dict[str, int]]:
    """Return the sizes of dimensions in each example; the first dimension is the batch."""
    batch = next(iter(profile.values()), None)
    if batch is None:
        return [{}]
    usual = {name: sizes.usual for name, sizes in profile.items()}
    rows = sorted({batch.least, min(max(ROWS, batch.least), batch.most)})
    return [{**usual, next(iter(profile)): count} for count in rows]


def _feeds(model: Model, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    return arrays(model.inputs, at_sizes(model.inputs, sizes))
