#!/usr/bin/env python3
"""Measure what the host asked for, cell by cell, and send raw samples; receive.py becomes this.

A cell is a batch size and a thread count. Finished ones are kept in cells/ until the host has all of them, so that the
same command goes on after a broken link; a reboot or another clock mode makes them worthless. The process ends with its
children when the host falls silent or closes the link.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from .. import environment
    from . import peak, receive, runners, sampling, watch
else:
    import environment
    import peak
    import receive
    import runners
    import sampling
    import watch

SILENCE = 30.0
"""Seconds without a beat of the host's heart, which comes every 5, after which it is taken to be gone."""
CELLS = Path("cells")


def main() -> int:
    """Run the job on stdin; return the exit code."""
    job, received = receive.read_line(), threading.Event()
    threading.Thread(target=_watch, args=(received,), daemon=True).start()
    try:
        run(job)
    except runners.BoardError as error:
        receive.say("error", code=error.code, what=str(error), fix=error.fix)
        return error.code
    except MemoryError:
        receive.say("error", code=runners.FAILED, what="the board has not enough memory", fix="stop other programs")
        return runners.FAILED
    except OSError as error:
        _tell_disk(error)
        return runners.FAILED
    receive.say("done")
    if received.wait(SILENCE):
        shutil.rmtree(str(CELLS), ignore_errors=True)
    return 0


def _watch(received: threading.Event) -> None:
    """End this process and what it started as soon as the host is gone."""
    said = b""
    while True:
        ready, _, _ = select.select([0], [], [], SILENCE)
        part = os.read(0, 4096) if ready else b""
        if not part:
            break
        said = (said + part)[-64:]
        if b"received" in said:
            received.set()
            return
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _tell_disk(error: OSError) -> None:
    full = error.errno in receive.FULL
    what = "the board's disk is full" if full else f"the board failed: {error}"
    receive.say("error", code=runners.FAILED, what=what, fix="free some space and run it again" if full else "")


def run(job: dict[str, Any]) -> None:
    """Send the environment, then each cell: kept, or measured now."""
    found = environment.fingerprint()
    receive.say("environment", values=found)
    mark = {"boot_id": receive.boot_id(), "mode": watch.clock_mode()}
    kept = _kept(job["cells"], mark)
    library, reason = _library(job) if len(kept) < len(job["cells"]) else ("", "")
    opened: tuple[int, list[Any]] = (-1, [])
    for index, cell in enumerate(job["cells"]):
        receive.say("progress", done=index / len(job["cells"]), text=cell["label"])
        if cell["key"] not in kept:
            if opened[0] != cell["threads"]:
                opened = (cell["threads"], [runners.open_runner(a, cell["threads"], library) for a in job["artifacts"]])
            kept[cell["key"]] = _measure(job, cell, opened[1], (library, reason))
            _keep(cell["key"], dict(mark, cell=kept[cell["key"]]))
        receive.say("cell", index=index, **kept[cell["key"]])


def _kept(cells: Sequence[dict[str, Any]], mark: dict[str, str]) -> dict[str, Any]:
    """Return the cells that an earlier run finished in the same state of the machine."""
    found: dict[str, Any] = {}
    reasons = []
    for cell in cells:
        path = CELLS / f"{cell['key']}.json"
        if not path.is_file():
            continue
        known = json.loads(path.read_text())
        if known["boot_id"] != mark["boot_id"]:
            reasons.append("the board was rebooted")
        elif known["mode"] != mark["mode"]:
            reasons.append("the clock mode was changed")
        else:
            found[cell["key"]] = known["cell"]
    if reasons:
        _note(f"{reasons[0]} since an earlier run, so {len(reasons)} finished cells are measured again")
    if found:
        _note(f"{len(found)} of {len(cells)} cells were finished by an earlier run")
    return found


def _keep(key: str, content: dict[str, Any]) -> None:
    CELLS.mkdir(exist_ok=True)
    beside = CELLS / f"{key}.part"
    try:
        beside.write_text(json.dumps(content))
        os.replace(str(beside), str(CELLS / f"{key}.json"))
    finally:
        if beside.exists():
            beside.unlink()


def _measure(
    job: dict[str, Any], cell: dict[str, Any], opened: Sequence[Any], kernels: tuple[str, str]
) -> dict[str, Any]:
    feeds = [peak.load_feeds(path) for path in cell["feeds"]]
    details = [runner.details(fed) for runner, fed in zip(opened, feeds)]
    for artifact, found in zip(job["artifacts"], details):
        found.update({"kernels": kernels[1]} if kernels[1] and artifact["packed"] else {})
    calls = [_call(runner, fed) for runner, fed in zip(opened, feeds)]
    device = "gpu" if job["artifacts"][0]["kind"] == "bundle" else "cpu"
    with watch.Watch(device) as watched:
        samples = sampling.sample(calls, SimpleNamespace(**cell["limits"]))
    return dict(
        samples,
        energies=[dataclasses.asdict(found) for found in watch.energies(calls, job["meter"], device)],
        state=watched.summary(),
        seconds=[array.tolist() for array in samples["seconds"]],
        runtimes=[runner.name for runner in opened],
        details=details,
        peaks=[_peak(job, (cell, index), kernels[0]) for index in range(len(opened))],
    )


def _call(runner: Any, feeds: dict[str, Any]) -> Any:
    return lambda: runner.run(feeds)


def _peak(job: dict[str, Any], place: Any, library: str) -> int | None:
    cell, index = place
    if not job["peak_rss"]:
        return None
    artifact, feeds = job["artifacts"][index], cell["feeds"][index]
    return peak.peak_rss_bytes({"artifact": artifact, "threads": cell["threads"], "library": library, "feeds": feeds})


def _library(job: dict[str, Any]) -> tuple[str, str]:
    """Return the path of our kernels for onnxruntime, built here where the host sent sources; or "" and the reason."""
    if not job["library"]:
        return "", job["without"]
    path = Path(job["library"]).resolve()
    if job["build"]:  # only what has changed is compiled
        receive.say("progress", done=0.0, text="build the kernels on the board")
        reason = _build()
        if reason:
            return _without(f"they were not built on the board: {reason}")
    reason = runners.check_library(str(path))
    return _without(f"they do not load on the board: {reason}") if reason else (str(path), "")


def _build() -> str:
    """Compile the kernels; return why they were not, "" where they were."""
    command = [sys.executable, "-B", "kernels/build.py"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode and any(os.strerror(number) in done.stderr for number in receive.FULL):
        raise runners.BoardError(runners.FAILED, "the board's disk is full", "free some space and run it again")
    said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
    return said[-1] if done.returncode else ""


def _without(reason: str) -> tuple[str, str]:
    _note(f"the portable bodies run, not the kernels: {reason}")
    return "", reason


def _note(text: str) -> None:
    receive.say("note", text=text)


if __name__ == "__main__":
    sys.exit(main())
