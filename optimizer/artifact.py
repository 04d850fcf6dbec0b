"""An exported file as the pipeline sees it: what it is compared on, its fingerprint, and how a metric calls it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .data import Batch, Calibration, rebatch
from .errors import InputError
from .model import InputSpec, Model
from .planning import Job
from .workspace import file_sha256

VERIFIED = 3
"""Samples that a file is compared on; one alone is compared too."""


def as_module(runner: Any, job: Job) -> nn.Module:
    """Return an opened artifact as a module with the inputs and the output structure of the original."""
    return _RunnerModule(runner, job).eval()


def samples(calibration: Calibration) -> Batch:
    """Return calibration data to compare on: its masks and indices make sense, random ones need not."""
    return rebatch(calibration, VERIFIED).batches[0]


def batches(specs: Sequence[InputSpec], inputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Return one and as many samples as there are, VERIFIED at most, along the first named dimension."""
    named = [size for spec in specs for size in spec.shape if isinstance(size, str)]
    pairs = [pair for spec, x in zip(specs, inputs, strict=True) for pair in zip(spec.shape, x.shape, strict=True)]
    return tuple(sorted({1, min([VERIFIED, *(have for want, have in pairs if want in named[:1])])}))


def examples(model: Model) -> tuple[Tensor, ...]:
    """Return seeded inputs to compare on."""
    return hide_nothing(model.inputs, model.examples(VERIFIED))


def at_sizes(specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> Batch:
    """Return seeded inputs whose named dimensions have these sizes."""
    generator = torch.Generator().manual_seed(0)
    return hide_nothing(specs, tuple(spec.example(sizes, generator) for spec in specs))


def hide_nothing(specs: Sequence[InputSpec], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return inputs with masks of ones: on a row that is hidden whole, runtimes differ."""
    pairs = zip(specs, inputs, strict=True)
    return tuple(torch.ones_like(x) if spec.name.endswith("mask") else x for spec, x in pairs)


def mark(path: Path) -> str:
    """Return the hash of a file and of the external weights beside it."""
    beside = path.with_name(f"{path.name}.data")
    return "-".join(file_sha256(part) for part in (path, beside) if part.is_file())


class _RunnerModule(nn.Module):
    """A runner that is called like the network it came from: positionally, or by the names of its arguments."""

    def __init__(self, runner: Any, job: Job) -> None:
        super().__init__()
        self.runner, self.graph = runner, job.graph
        # Metrics ask `next(model.parameters()).device` where to put their data.
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.names = [spec.name for spec in job.model.inputs]
        self.signature = inspect.signature(job.model.skeleton.forward)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        given = self.signature.bind(*inputs, **named).arguments.values() if named else inputs
        tensors = [value for value in given if isinstance(value, Tensor)]
        if len(tensors) != len(self.names):
            what = f"it was called with {len(tensors)} of its {len(self.names)} inputs"
            raise InputError(what, where="the exported file", fix="pass " + ", ".join(self.names))
        feeds = {name: x.numpy(force=True) for name, x in zip(self.names, tensors, strict=True)}
        found = iter(self.runner.run(feeds).values())
        flat = [None if node is None else torch.from_numpy(np.array(next(found))) for node in self.graph.outputs]
        return pytree.tree_unflatten(flat, self.graph.program.call_spec.out_spec)
