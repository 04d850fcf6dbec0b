"""Measure on a board that is reached by ssh: the scenario edge there, its rows here.

The board gets the artifacts and what measures; it returns raw samples, and intervals and rows come from the code that a
local run uses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..exporters import onnx
from ..exporters.runner import RunnerOptions
from ..optimizer.errors import Error, RuntimeMissingError
from . import edge, parcel
from .board.energy import Energy
from .device import Device
from .edge import Spec
from .environment import fingerprint
from .link import AGAIN, Link, LinkLost, open_link
from .measure import Seconds
from .parcel import Artifact, Board, Item, Kernels
from .rows import Progress, Row, artifact_names, check_artifacts, silent
from .sessions import Cell, Work, known_well, numbered, samples_of

NEEDS = {"onnx": "onnxruntime", "bundle": "tensorrt"}
FROM_HOST = ("git_commit", "git_dirty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Rows, the machine that they were measured on, and what should be known about them."""

    rows: list[Row]
    environment: dict[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """All that one connection is to do; `feeds` are the inputs of each artifact by batch size."""

    device: Device
    spec: Spec
    artifacts: tuple[Artifact, ...]
    feeds: tuple[Mapping[int, Item], ...]
    folder: str
    notes: list[str] = field(default_factory=list)


def run(paths: Sequence[Path], spec: Spec, device: Device, progress: Progress = silent) -> Found:
    """Return a row per thread count, batch size and artifact, as `edge.run` does; the first artifact is the baseline.

    Raises RuntimeMissingError where the board cannot be reached, lacks a runtime or goes away, ExportError where its
    disk is full or an artifact does not run. What was copied and the cells that were finished are kept on the board.
    """
    check_artifacts(paths)
    found = tuple(parcel.artifacts(paths, artifact_names(paths), "bench"))
    feeds = tuple(parcel.inputs(artifact, spec) for artifact in found)
    folder = parcel.folder_name(found)
    order = _Order(device=device, spec=spec, artifacts=found, feeds=feeds, folder=folder)
    progress(0.0, f"connect to {device.url}")
    with open_link(device) as link:
        board = _greeted(link, {NEEDS[artifact.kind] for artifact in found})
        try:
            done = _measured(link, order, board, progress)
        except LinkLost as error:
            raise _why_lost(error, order.device, board) from error
    rows = [row for cell, message in done.cells for row in _rows(order, cell, message)]
    return Found(rows=rows, environment=_environment(done.environment, order.notes), notes=tuple(order.notes))


def check(device: Device, needs: Sequence[str]) -> None:
    """Raise RuntimeMissingError where a board cannot be reached or lacks a package."""
    with open_link(device) as link:
        _greeted(link, set(needs))


def _greeted(link: Link, needs: set[str]) -> Board:
    """Return what the board says of itself, which must include numpy and these packages."""
    message = link.expect("hello")
    board = Board(**{key: message[key] for key in (one.name for one in dataclasses.fields(Board))})
    absent = [name for name in ("numpy", *sorted(needs)) if board.packages[name] is None]
    if "tensorrt" in absent:
        fix = "a Jetson has it with JetPack, in environments made with --system-site-packages"
        raise RuntimeMissingError("the board lacks TensorRT", where=link.device.url, fix=fix)
    if absent:
        fix = f"run python3 -m pip install {' '.join(absent)} there"
        raise RuntimeMissingError(f"the board lacks {' and '.join(absent)}", where=link.device.url, fix=fix)
    return board


def _why_lost(error: LinkLost, device: Device, board: Board) -> Error:
    """Connect again, to tell a reboot and a board that is gone from a broken link."""
    try:
        with open_link(device) as link:
            now = str(link.expect("hello")["boot_id"])
    except RuntimeMissingError as gone:
        what = f"the link to the board broke, and {gone.what}"
        return RuntimeMissingError(what, where=device.url, fix=f"{gone.fix}; then {AGAIN}")
    if now == board.boot_id:
        return error
    fix = "run the same command again: what was copied is kept, finished cells are measured again"
    return RuntimeMissingError("the board was rebooted during the measurement", where=device.url, fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What the board sent: each cell with what was measured in it, and its fingerprint."""

    cells: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=list)
    environment: dict[str, object] = field(default_factory=dict)


def _measured(link: Link, order: _Order, board: Board, progress: Progress) -> _Done:
    kernels = _kernels(order, board)
    programs = parcel.programs()
    _send(link, order, (*programs, *kernels.items), progress)
    job = _job(order, kernels, [item.sha256() for item in programs])
    link.say(job)
    link.start_heart()
    done, pace = _Done(), _Pace(order.spec, len(order.artifacts))
    for message in link.messages():
        match message["kind"]:
            case "progress":
                progress(message["done"], message["text"])
            case "note":
                order.notes.append(message["text"])
            case "environment":
                done.environment.update(message["values"])
            case "process":
                pace.answer(link, message)
            case "cell":
                done.cells.append((job["cells"][message["index"]], message))
            case "done":
                link.say({"received": True})
                progress(1.0, "done")
                return done
    raise link.failure()


class _Pace:
    """Says after each process whether the board is to start another one, by the rule of a local run."""

    def __init__(self, spec: Spec, artifacts: int) -> None:
        self._limits = dataclasses.replace(spec, batch=spec.batch[:1]).limits(artifacts)
        self._seconds: list[list[Seconds]] = []
        self._index, self._end = -1, 0.0

    def answer(self, link: Link, message: Mapping[str, Any]) -> None:
        """Take one more process of a cell into account, and answer where the board asks."""
        if message["index"] != self._index:
            self._index, self._seconds = message["index"], []
        self._seconds.append([np.array(one) for one in message["seconds"]])
        if len(self._seconds) == self._limits.least:
            self._end = time.monotonic() + self._limits.extra_seconds
        if self._limits.least <= len(self._seconds) < self._limits.most:
            late = time.monotonic() >= self._end
            link.say({"more": not (late or known_well(self._seconds, self._limits))})


def _kernels(order: _Order, board: Board) -> Kernels:
    if not order.spec.kernels or not any(artifact.packed for artifact in order.artifacts):
        return Kernels()
    found = parcel.kernels(board)
    if found.without:
        order.notes.append(f"the portable bodies run, not the kernels: {found.without}")
    return found


def _send(link: Link, order: _Order, extra: Sequence[Item], progress: Progress) -> None:
    """Send the files that the board does not have."""
    inputs = {item.name: item for feeds in order.feeds for item in feeds.values()}
    items = [item for artifact in order.artifacts for item in artifact.items] + [*inputs.values(), *extra]
    named = {item.name: item for item in items}
    link.say({"folder": order.folder, "files": [[item.name, item.size, item.sha256()] for item in items]})
    wanted = [named[name] for name in link.expect("want")["names"]]
    total, done = sum(item.size for item in wanted) or 1, 0
    for item in wanted:
        for part in item.parts():
            link.write(part)
            done += len(part)
            progress(0.0, f"copy {item.name.rpartition('/')[2]}, {100 * done // total} %")
    link.expect("ready")


def _job(order: _Order, kernels: Kernels, programs: Sequence[str]) -> dict[str, Any]:
    """Return what the agent reads; a cell's key is a hash of all that its samples depend on."""
    spec = order.spec
    artifacts = [
        {"name": a.name, "kind": a.kind, "path": a.path, "packed": a.packed, "exact": spec.exact, "plugin": ""}
        for a in order.artifacts
    ]
    shared = {
        "artifacts": artifacts,
        "library": kernels.library,
        "peak_rss": spec.peak_rss,
        "meter": spec.meter,
        "state": dict(spec.state),
        "fresh": spec.fresh,
        "least": spec.processes,
    }
    cells = [_cell(order, threads, batch) for threads in spec.threads for batch in spec.batch]
    for cell in cells:
        known = json.dumps([cell, shared, list(programs)], sort_keys=True)
        cell["key"] = hashlib.sha256(known.encode()).hexdigest()[:20]
    return {**shared, "cells": cells, "build": kernels.build, "without": kernels.without}


def _cell(order: _Order, threads: int, batch: int) -> dict[str, Any]:
    """Return one batch size and thread count, with the seeds of as many processes as there may be."""
    spec = order.spec
    sampling = spec.sampling(threads, batch)
    alone = Work(
        paths=(),
        options=RunnerOptions(threads=threads),
        open_=onnx.open,
        cells=(Cell(feeds=(), sampling=sampling),),
        seed=spec.seed,
    )
    works = [numbered(alone, number) for number in range(spec.limits(len(order.artifacts)).most)]
    return {
        "threads": threads,
        "batch": batch,
        "label": f"batch {batch}, {threads or 'default'} thread{'s' * (threads != 1)}",
        "limits": dataclasses.asdict(sampling),
        "seeds": [[work.seed, work.cells[0].sampling.seed] for work in works],
        "feeds": [feeds[batch].name for feeds in order.feeds],
    }


def _environment(board: Mapping[str, object], notes: Sequence[str]) -> dict[str, object]:
    """Return the board's fingerprint, with the state of the source that is here and the machine that asked."""
    host = fingerprint()
    mine = {key: host[key] for key in ("os", "cpu", "python", "packages")}
    return {**board, **{key: host[key] for key in FROM_HOST}, "measured_from": mine, "notes": list(notes)}


def _rows(order: _Order, cell: Mapping[str, Any], message: Mapping[str, Any]) -> list[Row]:
    measured = edge.Measured(
        names=[artifact.name for artifact in order.artifacts],
        runtimes=message["runtimes"],
        batch=cell["batch"],
        threads=cell["threads"],
        clusters=tuple(samples_of(one) for one in message["clusters"]),
        energies=[Energy(**{**one, "rails": tuple(one["rails"])}) for one in message["energies"]],
        peaks=message["peaks"],
        seen=message["seen"],
        own=message["details"],
    )
    return edge.rows_of(order.spec, measured)
