"""Export to ONNX, and run the file in onnxruntime.

One file runs anywhere: compressed weights stay packed as inputs of the operators of `kernels/onnx_ops.py`, whose
portable bodies are functions in the file, and `open` gives onnxruntime our kernels for them where they were built. The
bytes of a file depend on the model and the options only.

A process that only opens a file imports neither torch nor onnx (its peak memory is measured).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..optimizer.errors import RecipeError
from .runner import RunnerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from ..optimizer.model import Model
    from ..optimizer.packed import Computed
    from .onnx_runner import OnnxRunner

suffix = ".onnx"
OPSETS = range(18, 26)
"""What torch 2.13 converts to; 26 and up it leaves at 18 after logging an error."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Options:
    """How a file is written.

    opset: version of the standard operators; TensorRT 10.3 (JetPack 6) reads up to about 20.
    external_bytes: weights above so many bytes go to "<file>.data" beside it.
    example: inputs to trace with, two or more in each named dimension; seeded ones without it.
    """

    opset: int = 20
    external_bytes: int = 1_000_000
    example: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise RecipeError(f"opset={self.opset} is out of range", fix=f"use {OPSETS[0]} to {OPSETS[-1]}; 20 is safe")
        if self.external_bytes < 0:
            raise RecipeError(f"external_bytes={self.external_bytes} is negative", fix="use 0 or more")


def export(model: Model, path: Path, options: Options | None = None) -> None:
    """Write a model to `path`; ExportError where the network, the opset or a named dimension cannot be expressed."""
    from .onnx_file import write

    write(model, path, options or Options())


def modes(path: Path, model: Model) -> dict[str, Computed]:
    """Return how each weight of a model computes in its file (`onnx_modes.Mode`), and why some are decoded."""
    from ..optimizer import activations
    from .onnx_modes import modes as modes_of

    return modes_of(path, model, activations.layers(model))


def kernels() -> str:
    """Return the instruction sets of the kernels that `open` gives to files, "" where they are not built."""
    from .onnx_runner import kernels as state

    return state()


def open(path: Path, options: RunnerOptions | None = None) -> OnnxRunner:
    """Return the file ready to run in onnxruntime on the CPU; ExportError if it does not load."""
    from .onnx_runner import load

    return load(path, options or RunnerOptions())
