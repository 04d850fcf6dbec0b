"""Channel groups: which rows, columns and elements of a network's parameters must be removed together.

A set of joined channel numbers is a unit; units that occupy the same parameters are alternatives and form a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from .channels import Channels, Matrix
from .ledger import FREE
from .steps import short

Axis: TypeAlias = Literal["rows", "columns", "elements"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What a unit occupies of one parameter or buffer.

    rows, columns: of its matrix (`Layout.to_matrix`); for a grouped convolution columns are those of the rows of conv
    group `block`. elements: flat positions of a parameter that no operator multiplies by (biases, gains, statistics).
    table: the columns of a table that is only looked up, and so written and not read.
    """

    param: str
    axis: Axis
    index: Int64[Tensor, "n"]
    block: int = 0
    table: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unit:
    """What is removed together: a channel, a hidden unit, an attention head."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Units that are alternatives to each other; the same number is removed from each cell.

    One cell is the usual case; the groups of a grouped convolution and the layers of a recurrent operator are several.
    """

    name: str
    cells: tuple[tuple[Unit, ...], ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(unit for cell in self.cells for unit in cell)

    @property
    def places(self) -> tuple[range, ...]:
        """Return which of the group's units each cell is."""
        ends = [sum(len(cell) for cell in self.cells[: i + 1]) for i in range(len(self.cells))]
        return tuple(range(end - len(cell), end) for end, cell in zip(ends, self.cells, strict=True))

    @property
    def width(self) -> int:
        """Return how many units each cell has, the smallest one counting."""
        return min(len(cell) for cell in self.cells)

    def params(self, axis: Axis) -> tuple[str, ...]:
        """Return the parameters that the group occupies along an axis, each once."""
        return tuple(dict.fromkeys(part.param for cell in self.cells for part in cell[0].parts if part.axis == axis))

    @property
    def producers(self) -> tuple[str, ...]:
        """Return the weights that make its channels: rows, or the columns of the table that comes first."""
        return self.params("rows") or self.params("columns")[:1]


def find(channels: Channels) -> tuple[Group, ...]:
    """Return the groups that can be pruned, in the order of their first producers."""
    _freeze_double_uses(channels)
    units = {root: Unit(parts=tuple(parts)) for root, parts in _parts(channels).items()}
    units = {root: unit for root, unit in units.items() if any(_makes(channels, part) for part in unit.parts)}
    labels = _labels(channels, units)
    cells: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for root, unit in units.items():
        signature = tuple(sorted({(part.param, part.axis) for part in unit.parts}))
        cells[(signature, tuple(sorted(labels[root])))].append(root)
    found = [_group(channels, link, units) for link in _linked(channels, cells, labels)]
    return _named([group for group in found if group is not None and group.width > 1])


def kept(channels: Channels, groups: Sequence[Group]) -> dict[str, str]:
    """Return the weights that no group makes narrower, and why."""
    covered = {param for group in groups for param in (*group.params("rows"), *group.producers)}
    return {
        param: channels.ledger.reason(_made(matrix)) or "its channels go together with all others of its layer"
        for param, matrix in channels.matrices.items()
        if param not in covered
    }


def _made(matrix: Matrix) -> Tensor:
    """Return the numbers of the channels that a weight makes."""
    return matrix.columns if matrix.producer else matrix.rows


def _freeze_double_uses(channels: Channels) -> None:
    """Freeze weights that are also read in a way that no site describes."""
    for name, ids in channels.elements.items():
        matrix = channels.matrices.get(name)
        if matrix is not None and not channels.ledger.alone(ids):
            why = "its weight is also used in another way"
            channels.ledger.freeze(torch.cat([matrix.rows, matrix.columns.reshape(-1)]), why)


def _parts(channels: Channels) -> dict[int, list[Part]]:
    found: dict[int, list[Part]] = defaultdict(list)
    for param, matrix in channels.matrices.items():
        for root, index in _places(channels, matrix.rows):
            found[root].append(Part(param=param, axis="rows", index=index))
        for block, root, index in _columns(channels, matrix):
            table = param not in channels.multiplied
            found[root].append(Part(param=param, axis="columns", index=index, block=block, table=table))
    for name, ids in channels.elements.items():
        if name not in channels.matrices:
            for root, index in _places(channels, ids):
                found[root].append(Part(param=name, axis="elements", index=index))
    return found


def _columns(channels: Channels, matrix: Matrix) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (block, root, columns); a depthwise convolution has none, its rows are its channels."""
    if len(matrix.columns) > 1 and matrix.columns.shape[1] == 1:
        return
    for block, ids in enumerate(matrix.columns):
        for root, index in _places(channels, ids):
            yield block, root, (index[:, None] * matrix.taps + torch.arange(matrix.taps)).reshape(-1)


def _places(channels: Channels, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (root, flat positions) of each live set."""
    roots = channels.ledger.roots(ids).reshape(-1).numpy()
    order = np.argsort(roots, kind="stable")
    edges = np.flatnonzero(np.diff(roots[order])) + 1
    for run in np.split(order, edges):
        if len(run) and roots[run[0]] > FREE:
            yield int(roots[run[0]]), torch.from_numpy(run)


def _labels(channels: Channels, units: Mapping[int, Unit]) -> dict[int, set[tuple[int, int]]]:
    """Return for each unit the blocks of balances that it lies in; a balance of whole units says nothing."""
    labels: dict[int, set[tuple[int, int]]] = {root: set() for root in units}
    seen: dict[tuple[tuple[int, ...], ...], int] = {}
    for number, blocks in enumerate(channels.balances):
        roots = [sorted(set(channels.ledger.roots(block).tolist())) for block in blocks]
        number = seen.setdefault(tuple(tuple(block) for block in roots), number)
        if all(len(block) == 1 for block in roots) or len({tuple(block) for block in roots}) == 1:
            continue
        for place, block in enumerate(roots):
            for root in block:
                if root in labels:
                    labels[root].add((number, place))
    return labels


def _linked(
    channels: Channels, cells: Mapping[tuple[object, ...], list[int]], labels: Mapping[int, set[tuple[int, int]]]
) -> list[list[list[int]]]:
    """Return cells that share a balance together, unless its blocks are not alike."""
    owner: dict[int, int] = {}
    links: dict[int, list[list[int]]] = {}
    for place, members in enumerate(cells.values()):
        balances = {number for number, _ in labels[members[0]]}
        joined = {owner[number] for number in balances if number in owner}
        links[place] = [members, *(cell for old in sorted(joined) for cell in links.pop(old))]
        for number, old in list(owner.items()):
            if old in joined:
                owner[number] = place
        owner.update(dict.fromkeys(balances, place))
    return [cells_ for cells_ in links.values() if _balanced(channels, cells_, labels)]


def _balanced(channels: Channels, cells: Sequence[list[int]], labels: Mapping[int, set[tuple[int, int]]]) -> bool:
    """Return whether taking one unit of each cell takes equally many of each block."""
    counts: dict[int, list[int]] = {}
    for cell in cells:
        for number, place in labels[cell[0]]:
            counts.setdefault(number, [0] * len(channels.balances[number]))[place] += 1
    return all(len(set(count)) == 1 for count in counts.values())


def _group(channels: Channels, cells: Sequence[list[int]], units: Mapping[int, Unit]) -> Group | None:
    ordered = [sorted((units[root] for root in cell), key=_first_row) for cell in cells]
    ordered.sort(key=lambda cell: _rank(channels, cell[0]))
    return Group(name="", cells=tuple(tuple(cell) for cell in ordered))


def _makes(channels: Channels, part: Part) -> bool:
    """Return whether a part makes the channel: a row of a weight, or a column of a table that is looked up."""
    return part.axis == "rows" or (part.axis == "columns" and channels.matrices[part.param].producer)


def _first_row(unit: Unit) -> int:
    """Return the unit's place: its first row, or its first column where it has none."""
    return int(next((part for part in unit.parts if part.axis == "rows"), unit.parts[0]).index[0])


def _rank(channels: Channels, unit: Unit) -> tuple[int, int]:
    order = {param: place for place, param in enumerate(channels.matrices)}
    return min(order[part.param] for part in unit.parts if _makes(channels, part)), _first_row(unit)


def _named(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Name each group by its first producer, "#2" and on where one producer starts several."""
    counts: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        name = short(group.producers[0])
        counts[name] += 1
        suffix = f"#{counts[name]}" if counts[name] > 1 else ""
        named.append(Group(name=name + suffix, cells=group.cells))
    return tuple(named)
