"""Calibration statistics of the inputs of each weight, as frozen values; nothing else gathers them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor

from .errors import InputError
from .graph import Site
from .walk import Reader, Traced, Visitor, walk

MAX_ROW_GROUPS = 64
"""A weight whose rows are used in more distinct runs than this gets one gram for all of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStats:
    """What one weight (out, in) saw. `groups` divides the out rows into equal runs, each with inputs of its own.

    gram: sum over rows of x x^T, float64. mean: mean of x, float64. rows: how many x were summed, per group.
    row_counts: for an embedding, how often each row was looked up (it has no gram). cross: sum over rows of z x^T, z
    the inputs of the network that the walk compares with: W cross is what the outputs were, times what the inputs are.
    """

    rows: int
    gram: Float64[Tensor, "groups in in"] | None = None
    mean: Float64[Tensor, "groups in"] | None = None
    row_counts: Float64[Tensor, "out"] | None = None
    cross: Float64[Tensor, "groups in in"] | None = None


Stats: TypeAlias = Mapping[str, LayerStats]
"""Parameter name -> what its weight saw."""


def collect(
    traced: Traced, values: Mapping[str, Tensor], needs: frozenset[str], params: Collection[str] | None = None
) -> Stats:
    """Run the network as `values` say and gather `needs` of {"gram", "mean"} for `params` (default: all).

    A parameter used at several sites (tied, shared or sliced) gets the sum over them.
    """
    seen: dict[str, list[tuple[Site, LayerStats]]] = {}

    def before(site: Site, reader: Reader) -> None:
        if params is None or site.param in params:
            seen.setdefault(site.param, []).append((site, observe(reader, needs)))

    walk(traced, values, Visitor(before=before))
    return {param: merge(parts) for param, parts in seen.items()}


def collect_shared(
    traced: Traced, values: Mapping[str, Tensor], needs: frozenset[str], params: Collection[str]
) -> Stats:
    """Gather the statistics of those of `params` that are used at several sites, before any of them is changed."""
    shared = {param for param, sites in traced.graph.of_param().items() if len(sites) > 1 and param in params}
    return collect(traced, values, needs, shared) if shared else {}


def observe(reader: Reader, needs: frozenset[str]) -> LayerStats:
    """Return the statistics of one site, over all batches."""
    if reader.site.kind == "embedding":
        ids = torch.cat([value.flatten() for value in reader.inputs()])
        counts = torch.bincount(ids, minlength=reader.site.count)
        return LayerStats(rows=len(ids), row_counts=counts.to(torch.float64))
    gram: Tensor | None = None
    total: Tensor | None = None
    rows = 0
    cross = _cross(reader) if "cross" in needs and reader.reference is not None else None
    for x in reader.rows():
        wide = x.to(torch.float64)
        rows += x.shape[1]
        if "gram" in needs:
            part = wide.mT @ wide
            gram = part if gram is None else gram + part
        if "mean" in needs:
            total = wide.sum(1) if total is None else total + wide.sum(1)
    return LayerStats(rows=rows, gram=gram, mean=None if total is None else total / max(rows, 1), cross=cross)


def _cross(reader: Reader) -> Float64[Tensor, "groups in in"]:
    pairs = zip(reader.reference_rows(), reader.rows(), strict=True)
    total: Tensor | None = None
    for before, now in pairs:
        part = before.double().mT @ now.double()
        total = part if total is None else total + part
    assert total is not None
    return total


def merge(parts: list[tuple[Site, LayerStats]]) -> LayerStats:
    """Add the statistics of all sites of one parameter, each to the rows that it uses."""
    counts = [stats for _, stats in parts if stats.row_counts is not None]
    used = [(site, stats) for site, stats in parts if stats.gram is not None or stats.mean is not None]
    if not used:
        summed = torch.stack([s.row_counts for s in counts if s.row_counts is not None]).sum(0) if counts else None
        return LayerStats(rows=sum(s.rows for s in counts), row_counts=summed)
    if len(used) == 1:
        return used[0][1]
    if all((site.first, site.count, site.layout) == (0, used[0][0].count, used[0][0].layout) for site, _ in used):
        return _total([stats for _, stats in used])
    if len({site.layout for site, _ in used}) > 1:
        raise InputError(
            "is used in two orientations and has no one set of inputs", where=f'"{used[0][0].param}"', fix="skip it"
        )
    out, _ = used[0][0].layout.matrix_shape
    run = math.gcd(out, *(number for site, _ in used for number in (site.first, site.count)))
    groups = out // run if out // run <= MAX_ROW_GROUPS else 1
    return _spread(used, groups, out)


def _total(parts: list[LayerStats]) -> LayerStats:
    rows = sum(part.rows for part in parts)
    grams = [part.gram for part in parts if part.gram is not None]
    sums = [part.mean * part.rows for part in parts if part.mean is not None]
    return LayerStats(
        rows=rows,
        gram=torch.stack(grams).sum(0) if grams else None,
        mean=torch.stack(sums).sum(0) / max(rows, 1) if sums else None,
    )


def _spread(used: list[tuple[Site, LayerStats]], groups: int, out: int) -> LayerStats:
    size = out // groups
    rows = torch.zeros(groups, 1, dtype=torch.float64)
    gram: Tensor | None = None
    mean: Tensor | None = None
    for site, stats in used:
        where = slice(site.first // size, max(site.first // size + 1, (site.first + site.count) // size))
        rows[where] += stats.rows
        if stats.gram is not None:
            gram = torch.zeros(groups, *stats.gram.shape[1:], dtype=torch.float64) if gram is None else gram
            gram[where] += stats.gram
        if stats.mean is not None:
            mean = torch.zeros(groups, stats.mean.shape[1], dtype=torch.float64) if mean is None else mean
            mean[where] += stats.mean * stats.rows
    return LayerStats(rows=int(rows.max()), gram=gram, mean=None if mean is None else mean / rows.clamp(min=1))
