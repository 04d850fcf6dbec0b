"""The sections of a recipe as frozen values: model, data, metric, gates and bench."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import tree
from .entry import parts
from .errors import RecipeError, nearest
from .model import InputSpec
from .tree import Node

BASELINES = ("fp16", "int8", "matmulnbits", "matmulnbits128", "trtexec")
"""What others make of the original, to be measured beside ours."""


def _build_inputs(node: Node) -> tuple[InputSpec, ...]:
    return tuple(_input(name, child) for name, child in node.mapping("inputs").items())


def _show_inputs(inputs: tuple[InputSpec, ...]) -> dict[str, Any]:
    return {spec.name: {"shape": list(spec.shape), "dtype": spec.dtype} for spec in inputs}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The network: who builds it, where its weights are, and its inputs. Either of the first two may be absent."""

    entry: str = ""
    checkpoint: str = ""
    inputs: tuple[InputSpec, ...] = field(default=(), metadata={"build": _build_inputs, "show": _show_inputs})
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.entry:
            parts(self.entry)
        if not self.entry and not self.checkpoint:
            raise RecipeError("the model has neither entry nor checkpoint", fix='write entry: "path.py:function"')


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Calibration data: a function that gives batches of inputs, called with `samples`, `seed` and `args`."""

    entry: str
    samples: int = 512
    seed: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts(self.entry)
        at_least("samples", self.samples, 1)
        at_least("seed", self.seed, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """A function of the model that returns a number or one score per sample; higher is better."""

    entry: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts(self.entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """What the result must hold. max_drop: percentage points of the metric."""

    max_drop: float | None = None
    verify: bool = True
    never_slower: bool = True

    def __post_init__(self) -> None:
        if self.max_drop is not None:
            at_least("max_drop", self.max_drop, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """What to measure: every batch size with every number of threads.

    settings: the other keys, which are fields of the scenario's Spec; `bench/command.py` knows and checks them.
    """

    runtime: str = "onnxruntime"
    scenario: str = "edge"
    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    device: str = ""
    baselines: tuple[str, ...] = ()
    settings: Mapping[str, Node] = field(default_factory=dict, metadata={"rest": True})

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            if not getattr(self, name):
                raise RecipeError(f"{name} is empty", fix=f"write {name}: [1]")
            for size in getattr(self, name):
                at_least(name, size, 1)


def _input(name: str, node: Node) -> InputSpec:
    full = node.value if isinstance(node.value, Mapping) else {"shape": node}
    unknown = next((key for key in full if key not in ("shape", "dtype")), None)
    if unknown:
        raise full[unknown].error(f'there is no key "{unknown}"', nearest(unknown, ("shape", "dtype")))
    if "shape" not in full:
        raise node.error(f'input "{name}" has no shape', f"write {name}: [batch, 3, 32, 32]")
    shape = tree.convert(tuple[int | str, ...], full["shape"], f"inputs.{name}")
    dtype = tree.convert(str, full["dtype"], "dtype") if "dtype" in full else "float32"
    try:
        return InputSpec(name=name, shape=shape, dtype=dtype)
    except RecipeError as error:
        raise tree.located(error, node) from error


def at_least(name: str, value: float, least: int) -> None:
    """Raise a RecipeError for a value below `least`."""
    if value < least:
        raise RecipeError(f"{name}={value} is out of range", fix=f"use {least} or more")
