"""A network of the zoo: how it is built, its inputs, seeded batches and the sites that its graph must show."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from paredown.optimizer.model import InputSpec, Model, Source, SourceFile, from_module

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network of the zoo.

    file, name: `<file>.py:<name>` builds it. high: whole-number inputs lie below it. sizes: a value for each named
    dimension but the batch. sites: each use of a weight in graph order, one a line: parameter, kind, rows; "linear_t"
    is a parameter (in, out) that multiplies from the right.
    """

    file: str
    name: str
    inputs: tuple[InputSpec, ...]
    high: int = 2
    sizes: Mapping[str, int] = field(default_factory=dict)
    sites: str

    def build(self) -> nn.Module:
        """Return the network, the same one each time, its normalizations as if trained."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: nn.Module = getattr(importlib.import_module(f".{self.file}", __package__), self.name)()
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    _settle(part)
        return module.eval()

    def batch(self, size: int, seed: int = 0, **sizes: int) -> tuple[Tensor, ...]:
        """Return one seeded input per spec; named dimensions as given."""
        generator = torch.Generator().manual_seed(seed)
        known = {"batch": size, **self.sizes, **sizes}
        return tuple(self._example(spec, known, generator) for spec in self.inputs)

    def batches(self, *sizes: int) -> list[tuple[Tensor, ...]]:
        """Return batches of the given sizes."""
        return [self.batch(size, seed) for seed, size in enumerate(sizes)]

    def source(self) -> Source:
        name = f"{self.file}.py"
        return Source(entry=f"{name}:{self.name}", files=(SourceFile(name=name, text=(FOLDER / name).read_text()),))

    def model(self) -> Model:
        return from_module(self.build(), self.inputs, self.source())

    def _example(self, spec: InputSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.dtype != "int64":
            return torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))
        return torch.randint(0, 2 if spec.name == "mask" else self.high, shape, generator=generator)


def _settle(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Give a normalization statistics, gains and shifts that are neither 0 nor 1, some of them negative."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight, std=1.0)
        nn.init.normal_(norm.bias, std=0.5)
