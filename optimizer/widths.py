"""Find out by trial which groups a network's own code lets shrink, and which of its attributes hold their widths.

A module's `forward` may repeat a width (`view(b, self.heads, -1)`, `split(self.width)`). Each group is cut by one unit
per cell and run beside the same network with these units set to zero: if the two differ, or it fails, attributes of the
modules concerned that equal a width that changed are rewritten, as few as help and as many as agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .channels import Channels, Value, flat
from .cut import cut, masked, masks
from .errors import Error
from .groups import Group, Unit
from .ledger import FREE
from .model import Model
from .walk import Batch

TOLERANCE = 1e-4
"""Largest |a - b| / max |a| by which a cut network may differ from the masked one; both sum in float32."""
MAX_TRIALS = 64

Attributes: TypeAlias = tuple[str, ...]
"""Names "path.of.module.attribute" of numbers that are widths."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """The groups that can shrink, the attributes that must follow them, and why the others cannot."""

    groups: tuple[Group, ...]
    attributes: Mapping[str, Attributes]
    refused: Mapping[str, str]


def fit(model: Model, channels: Channels, groups: Sequence[Group], batch: Batch) -> Fit:
    """Try every group on one batch (a sample or two are enough)."""
    holders = _holders(model)
    trial = _Trial(model=model, channels=channels, batch=batch)
    if not holders and not trial.failure([unit for group in groups for unit in _some(group)], ()):
        return Fit(groups=tuple(groups), attributes={}, refused={})
    attributes: dict[str, Attributes] = {}
    refused: dict[str, str] = {}
    for group in groups:
        units = _some(group)
        found = trial.settle(units, [name for name, _ in _candidates(model, channels, units, holders)])
        if isinstance(found, str):
            refused[group.name] = found
        else:
            attributes[group.name] = found
    fitting = tuple(group for group in groups if group.name not in refused)
    return Fit(groups=fitting, attributes=attributes, refused=refused)


def values(model: Model, channels: Channels, units: Sequence[Unit], names: Iterable[str]) -> dict[str, Any]:
    """Return the new values of attributes when units are removed."""
    return {name: new for name, new in _candidates(model, channels, units, _holders(model)) if name in set(names)}


def difference(model: Model, other: Model, batch: Batch) -> float:
    """Return the largest |a - b| / max |a| of any output of two models on a batch."""
    with torch.no_grad():
        pairs = zip(*(pytree.tree_leaves(m.module()(*batch)) for m in (model, other)), strict=True)
        return max((_relative(a, b) for a, b in pairs if isinstance(a, Tensor)), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30)) if a.numel() else 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Trial:
    model: Model
    channels: Channels
    batch: Batch

    def settle(self, units: Sequence[Unit], candidates: Sequence[str]) -> Attributes | str:
        """Return the attributes to rewrite, or why nothing helps."""
        first = ""
        for names in itertools.islice(_choices(candidates), MAX_TRIALS):
            failure = self.failure(units, names)
            if not failure:
                return names
            first = failure if not names else first
        return first or "its width is written out in the network's code"

    def failure(self, units: Sequence[Unit], names: Attributes) -> str:
        """Return how a cut network fails, "" if it computes what the masked one does."""
        try:
            changed = values(self.model, self.channels, units, names) if names else {}
            small = cut(self.model, units, changed)
            off = difference(masked(self.model, units), small, self.batch)
        except Error as error:
            return error.what
        except Exception as error:
            line = str(error).strip().splitlines()
            return f"the network's code fixes its width ({line[0] if line else type(error).__name__})"
        return "" if off <= TOLERANCE else "the network's code fixes its width (it computes something else when cut)"


def _some(group: Group) -> list[Unit]:
    """Return the last unit of each cell."""
    return [cell[-1] for cell in group.cells]


def _choices(names: Sequence[str]) -> Iterator[Attributes]:
    """Yield sets of attributes to try: all, all but one, none, one, all but two, two."""
    yield tuple(names)
    for count in (1, 2):
        subsets = list(itertools.combinations(names, count))
        yield from (tuple(name for name in names if name not in picked) for picked in subsets)
        if names and count == 1:
            yield ()
        yield from subsets


def _holders(model: Model) -> dict[str, dict[str, Any]]:
    """Return path -> the whole numbers and tuples of them that a module's own class keeps as attributes."""
    found = {}
    for path, module in model.skeleton.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        own = {name: value for name, value in vars(module).items() if not name.startswith("_") and _is_size(value)}
        if own:
            found[path] = own
    return found


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(_is_size(item) and isinstance(item, int) for item in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


def _candidates(
    model: Model, channels: Channels, units: Sequence[Unit], holders: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Any]]:
    """Return (attribute, new value) of each that equals a width that shrinks, in modules around what is cut."""
    if not holders:
        return []
    touched = {part.param.rpartition(".")[0] for unit in units for part in unit.parts}
    around = {path for path in holders if any(_contains(path, owner) or _contains(owner, path) for owner in touched)}
    sizes = _sizes(model, channels, units)
    found = []
    for path in sorted(around):
        for name, value in holders[path].items():
            new = (
                [sizes.get(item, item) for item in value]
                if isinstance(value, (tuple, list))
                else sizes.get(value, value)
            )
            if new != (list(value) if isinstance(value, (tuple, list)) else value):
                found.append((f"{path}.{name}" if path else name, new))
    return found


def _contains(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _sizes(model: Model, channels: Channels, units: Sequence[Unit]) -> dict[int, int]:
    """Return old -> new size of every dimension that gets smaller, of parameters and of values on the way."""
    sizes: dict[int, int] = {}
    for mask in masks(model, units).values():
        for axis in range(mask.ndim):
            kept = int(mask.movedim(axis, 0).reshape(mask.shape[axis], -1).any(1).sum())
            if kept < mask.shape[axis]:
                sizes.setdefault(mask.shape[axis], kept)
    gone = torch.cat([_roots(channels, unit) for unit in units])
    for value in flat(list(channels.values.values())):
        sizes |= {old: new for old, new in _shrinking(channels, value, gone) if old not in sizes}
    return sizes


def _roots(channels: Channels, unit: Unit) -> Tensor:
    """Return the numbers of a unit."""
    part = next((part for part in unit.parts if part.axis == "rows"), unit.parts[0])
    matrix = channels.matrices[part.param]
    numbers = matrix.rows if part.axis == "rows" else matrix.columns[part.block]
    return channels.ledger.roots(numbers[part.index[:1] // (1 if part.axis == "rows" else matrix.taps)])


def _shrinking(channels: Channels, value: Value, gone: Tensor) -> Iterator[tuple[int, int]]:
    ids = channels.ledger.roots(value.ids)
    lost = torch.isin(ids, gone) & (ids > FREE)
    if not lost.any():
        return
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            kept = int((~lost).movedim(axis, 0).reshape(ids.shape[axis], -1).any(1).sum())
            if kept < ids.shape[axis]:
                yield value.shape[axis], kept
