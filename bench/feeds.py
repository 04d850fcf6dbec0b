"""Seeded random inputs for a runner, at a batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..optimizer.errors import InputError, RecipeError, nearest

if TYPE_CHECKING:
    from ..exporters.runner import Runner
    from ..optimizer.model import InputSpec

DEFAULT_DIM = 32
"""Size of a named dimension that is neither the batch nor in `dims`."""

Feeds: TypeAlias = dict[str, np.ndarray]
MakeFeeds: TypeAlias = Callable[[int], Mapping[str, np.ndarray]]
"""Batch size -> arrays by input name."""


def random_feeds(runner: Runner, batch: int, dims: Mapping[str, int], seed: int) -> Feeds:
    """Return one array per input: normal values for floats, 0 or 1 for integers and booleans.

    The same seed gives the same arrays to every runner with the same inputs.
    """
    sizes = {**dims, **_batch_size(runner, batch)}
    _check_names(runner, sizes, dims)
    rng = np.random.default_rng([seed, batch])
    return {spec.name: _random_array(spec, sizes, rng) for spec in runner.inputs}


def _check_names(runner: Runner, sizes: Mapping[str, int], dims: Mapping[str, int]) -> None:
    """Raise where `dims` names no dimension while one is left to DEFAULT_DIM: another size would be measured."""
    named = {size for spec in runner.inputs for size in spec.shape if isinstance(size, str)}
    unknown, left = sorted(dims.keys() - named), sorted(named - sizes.keys())
    if unknown and left:
        raise RecipeError(
            f'the model has no dimension "{unknown[0]}"', where="bench dims", fix=nearest(unknown[0], left)
        )


def checked_feeds(runner: Runner, batch: int, make: MakeFeeds) -> Feeds:
    """Return the caller's arrays for the inputs of `runner`; an InputError where one is missing."""
    given = make(batch)
    missing = [spec.name for spec in runner.inputs if spec.name not in given]
    if missing:
        raise InputError(
            f'the bench data has no input "{missing[0]}" (it has {", ".join(sorted(given)) or "none"})',
            where=runner.name,
            fix="return one array per input of the model",
        )
    return {spec.name: np.ascontiguousarray(given[spec.name]) for spec in runner.inputs}


def batch_name(inputs: Sequence[InputSpec]) -> str | None:
    """Return the name of the batch dimension: "batch" where it comes first in an input, else the first named one."""
    named = [size for spec in inputs for size in spec.shape if isinstance(size, str)]
    if any(spec.shape and spec.shape[0] == "batch" for spec in inputs):
        return "batch"
    return named[0] if named else None


def _batch_size(runner: Runner, batch: int) -> dict[str, int]:
    if not runner.inputs:
        raise InputError("the model has no inputs", where=runner.name, fix="export it with its inputs")
    name = batch_name(runner.inputs)
    if name is not None:
        return {name: batch}
    fixed = runner.inputs[0].shape[0] if runner.inputs[0].shape else 1
    if fixed != batch:
        raise InputError(
            f'batch {batch} was asked for, but input "{runner.inputs[0].name}" has the fixed first dimension {fixed}',
            where=runner.name,
            fix=f"bench with batch {fixed}, or export with a named batch dimension",
        )
    return {}


def _random_array(spec: InputSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = [sizes.get(size, DEFAULT_DIM) if isinstance(size, str) else size for size in spec.shape]
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError:
        raise InputError(
            f'input "{spec.name}" has dtype {spec.dtype}, which numpy cannot hold', fix="pass the bench data yourself"
        ) from None
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)
