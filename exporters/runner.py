"""What verify and bench see of an exported file: something opened, with inputs and a `run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from ..optimizer.errors import ExportError, RecipeError

if TYPE_CHECKING:  # optimizer.model imports torch, which a process that only runs a file must not pay for
    from torch import Tensor

    from ..optimizer.model import InputSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    """How a file is opened.

    threads: 0 = the runtime's default. exact: the runtime's most exact kernels. kernels: our library, where it was
    built, for the operators that it has; without it a file's portable bodies run.
    """

    threads: int = 0
    exact: bool = False
    kernels: bool = True

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise RecipeError(f"threads={self.threads} is negative", fix="use 0 (the runtime's default) or more")


class Runner(Protocol):
    """An artifact that is ready to run. `run` takes one array per input and returns one per output, by name."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> Sequence[InputSpec]: ...

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]: ...


Open: TypeAlias = Callable[[Path, RunnerOptions], Runner]
"""The `open` of an exporter: `exporters/<name>.py` defines one."""


def arrays(specs: Sequence[InputSpec], inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Return inputs as arrays by name; ExportError where one has a type that arrays do not have."""
    for spec in specs:
        if spec.dtype == "bfloat16":
            raise ExportError(f'the input "{spec.name}" is bfloat16, which arrays do not have')
    return {spec.name: x.numpy(force=True) for spec, x in zip(specs, inputs, strict=True)}
