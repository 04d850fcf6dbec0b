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
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from .. import environment
    from . import energy, peak, receive, runners, sampling, sensors, timing, watch
else:
    import energy
    import environment
    import peak
    import receive
    import runners
    import sampling
    import sensors
    import timing
    import watch

SILENCE = 30.0
"""Seconds without a beat of the host's heart, which comes every 5, after which it is taken to be gone."""
CELLS = Path("cells")


def main() -> int:
    """Run the job on stdin; return the exit code."""
    job = receive.read_line()
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(answers,), daemon=True).start()
    try:
        run(job, answers)
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
    answers.get()
    shutil.rmtree(str(CELLS), ignore_errors=True)
    return 0


def _listen(answers: queue.Queue[dict[str, Any]]) -> None:
    """Pass on what the host says; end this process and what it started as soon as the host is gone."""
    said = b""
    while True:
        ready, _, _ = select.select([0], [], [], SILENCE)
        part = os.read(0, 4096) if ready else b""
        if not part:
            break
        *lines, said = (said + part).split(b"\n")
        for message in (json.loads(line.decode()) for line in lines if line.strip()):
            answers.put(message)
            if message.get("received"):
                return
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _tell_disk(error: OSError) -> None:
    full = error.errno in receive.FULL
    what = "the board's disk is full" if full else f"the board failed: {error}"
    receive.say("error", code=runners.FAILED, what=what, fix="free some space and run it again" if full else "")


def run(job: dict[str, Any], answers: queue.Queue[dict[str, Any]]) -> None:
    """Send the environment, then each cell: kept, or measured now."""
    receive.say("environment", values=environment.fingerprint())
    mark = {"boot_id": receive.boot_id(), "mode": watch.clock_mode()}
    kept = _kept(job["cells"], mark)
    library, reason = _library(job) if len(kept) < len(job["cells"]) else ("", "")
    shared = {name: job[name] for name in ("artifacts", "state")}
    for index, cell in enumerate(job["cells"]):
        receive.say("progress", done=index / len(job["cells"]), text=cell["label"])
        found = kept.get(cell["key"])
        if found is None:
            whole = {**shared, **cell, "library": library, "index": index}
            found = _measure(job, whole, answers)
            for artifact, details in zip(job["artifacts"], found["details"]):
                details.update({"kernels": reason} if reason and artifact["packed"] else {})
            _keep(cell["key"], dict(mark, cell=found))
        receive.say("cell", index=index, **found)


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
        _note(f"{reasons[0]} since an earlier run, so finished cells are measured again ({len(reasons)})")
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


def _measure(job: dict[str, Any], cell: dict[str, Any], answers: queue.Queue[dict[str, Any]]) -> dict[str, Any]:
    """Return a cell: what each process timed, the state of the machine meanwhile, then energy and memory."""
    device: watch.Device = "gpu" if job["artifacts"][0]["kind"] == "bundle" else "cpu"
    with watch.Watch(device, watch.root()) as watched:
        processes = _processes(job, cell, answers, watched)
    keys = ("seconds", "orders", "stable", "waited")
    return {
        "clusters": [{key: one[key] for key in keys} for one in processes],
        "runtimes": processes[0]["runtimes"],
        "details": processes[0]["details"],
        "seen": watched.summary(),
        "energies": [dataclasses.asdict(one) for one in _energies(job, cell, device)],
        "peaks": [_peak(job, cell, index) for index in range(len(job["artifacts"]))],
    }


def _processes(
    job: dict[str, Any], cell: dict[str, Any], answers: queue.Queue[dict[str, Any]], watched: watch.Watch
) -> list[dict[str, Any]]:
    """Measure in one process after another: at least so many, then for as long as the host wants more."""
    once = timing.ask if job["fresh"] == "process" else timing.measure
    found: list[dict[str, Any]] = []
    for order_seed, seed in cell["seeds"]:
        if len(found) >= job["least"] and not answers.get()["more"]:
            break
        found.append(once(dict(cell, order_seed=order_seed, limits=dict(cell["limits"], seed=seed))))
        receive.say("process", index=cell["index"], seconds=found[-1]["seconds"])
        watched.time_reference()
    return found


def _energies(job: dict[str, Any], cell: dict[str, Any], device: str) -> list[energy.Energy]:
    """Return the energy of each artifact; None with the reason where there is no meter, which `auto` may find."""
    count = len(job["artifacts"])
    if job["meter"] == "none":
        return [energy.Energy(meter=None, unavailable="no meter was asked for")] * count
    try:
        opened = energy.open_meter(job["meter"], watch.root(), device)
    except (sensors.Unavailable, ImportError) as problem:
        if job["meter"] != "auto":
            what = f"the meter {job['meter']} is not available on the board: {problem}"
            raise runners.BoardError(runners.NO_RUNTIME, what, "use --meter auto, or none") from None
        return [energy.Energy(meter=None, unavailable=str(problem))] * count
    try:
        found = [runners.open_runner(one, cell["threads"], cell["library"]) for one in job["artifacts"]]
        feeds = [timing.load_feeds(path) for path in cell["feeds"]]
        return energy.measure([sampling.frame(one, fed, job["state"]) for one, fed in zip(found, feeds)], opened)
    finally:
        opened.close()


def _peak(job: dict[str, Any], cell: dict[str, Any], index: int) -> int | None:
    if not job["peak_rss"]:
        return None
    of_all = {key: cell[key] for key in ("threads", "library")}
    return peak.peak_rss_bytes(dict(of_all, artifact=job["artifacts"][index], feeds=cell["feeds"][index]))


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
