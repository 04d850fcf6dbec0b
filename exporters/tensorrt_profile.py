"""The optimization profile of an engine: least, usual and largest size of each named dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..optimizer.errors import RecipeError, nearest
from ..optimizer.model import InputSpec

BATCH = "1:8:32"
"""Sizes of the first named dimension where none are given."""
WHERE = "--profile"
FORM = "write NAME=LEAST:USUAL:LARGEST, as in batch=1:8:32, or NAME=SIZE"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a dimension may be: `least` to `most`, and `usual`, which kernels are chosen for."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            what = f"{self.least}:{self.usual}:{self.most} are no rising sizes from 1"
            raise RecipeError(what, where=WHERE, fix=FORM)

    def as_list(self) -> list[int]:
        return [self.least, self.usual, self.most]


Shapes: TypeAlias = dict[str, list[list[int]]]
"""Input name -> its least, usual and largest shape."""


def parse(texts: Sequence[str]) -> dict[str, Sizes]:
    """Return the sizes of each dimension that was given, from texts as "batch=1:8:32"."""
    found: dict[str, Sizes] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        numbers = rest.split(":")
        if not name or len(numbers) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in numbers):
            raise RecipeError(f'"{text}" is not understood', where=WHERE, fix=FORM)
        if name in found:
            raise RecipeError(f'the dimension "{name}" is given twice', where=WHERE, fix="give each once")
        sizes = [int(part) for part in numbers] * (3 // len(numbers))
        try:
            found[name] = Sizes(*sizes)
        except RecipeError as error:
            raise RecipeError(error.what, where=f'{WHERE}, dimension "{name}"', fix=error.fix) from error
    return found


def complete(inputs: Sequence[InputSpec], given: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """Return sizes for every named dimension of the inputs: those given, and BATCH for the first one.

    RecipeError names a dimension that the inputs do not have, or one that nothing sensible can be assumed for.
    """
    names = list(dict.fromkeys(size for spec in inputs for size in spec.shape if isinstance(size, str)))
    for name in given:
        if name not in names:
            fix = nearest(name, names) if names else "leave it out: every size is fixed"
            raise RecipeError(f'there is no dimension "{name}"', where=WHERE, fix=fix)
    known = {**({names[0]: parse([f"{names[0]}={BATCH}"])[names[0]]} if names else {}), **given}
    for name in names:
        if name not in known:
            fix = f"write --profile {name}=LEAST:USUAL:LARGEST, the sizes that the engine will be run with"
            raise RecipeError(f'the dimension "{name}" has no sizes', where=WHERE, fix=fix)
    return {name: known[name] for name in names}


def shapes(inputs: Sequence[InputSpec], sizes: Mapping[str, Sizes]) -> Shapes:
    """Return the three shapes of each input that has a named dimension."""
    return {
        spec.name: [
            [sizes[size].as_list()[i] if isinstance(size, str) else size for size in spec.shape] for i in range(3)
        ]
        for spec in inputs
        if any(isinstance(size, str) for size in spec.shape)
    }
