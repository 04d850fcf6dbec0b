"""One process of a measurement on a board: open all artifacts, time them in turn, print the samples and be gone.

A process keeps its luck (memory layout, threads, heap), so agent.py starts several; see `bench/sessions.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from . import runners, sampling
else:
    import runners
    import sampling

START_SECONDS = 600.0
"""How long opening the artifacts may take, on top of the measuring time."""


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Return what `measure` returns in a fresh process; BoardError where it stops."""
    limits = job["limits"]
    longest = (limits["max_seconds"] + limits["warmup_seconds"]) * len(job["artifacts"])
    command = [sys.executable, "-B", str(Path(__file__))]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, timeout=START_SECONDS + 4 * longest
        )
    except subprocess.TimeoutExpired as error:
        raise runners.BoardError(runners.FAILED, f"the process that measures took over {error.timeout:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        fix = "its memory may be short: stop other programs" if done.returncode < 0 else ""
        raise runners.BoardError(runners.FAILED, f"the process that measures stopped on the board: {said[-1]}", fix)
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise runners.BoardError(*answer["error"])
    return answer


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Open in random order, as who comes first gets other memory; run each once; time all in turn."""
    order = np.random.default_rng(job["order_seed"]).permutation(len(job["artifacts"]))
    opened = {index: runners.open_runner(job["artifacts"][index], job["threads"], job["library"]) for index in order}
    found = [opened[index] for index in range(len(order))]
    feeds = [load_feeds(path) for path in job["feeds"]]
    details = [runner.details(fed) for runner, fed in zip(found, feeds)]
    calls = [sampling.frame(runner, fed, job["state"]) for runner, fed in zip(found, feeds)]
    samples = sampling.sample(calls, SimpleNamespace(**job["limits"]))
    seconds = [part.tolist() for part in samples["seconds"]]
    return dict(samples, seconds=seconds, details=details, runtimes=[runner.name for runner in found])


def load_feeds(path: str) -> dict[str, Any]:
    """Return the inputs that the host made."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def main() -> None:
    """Do the job on stdin; what libraries print goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = measure(json.load(sys.stdin))
    except runners.BoardError as error:
        answer = {"error": [error.code, str(error), error.fix]}
    with os.fdopen(answers, "w", encoding="utf-8") as pipe:
        pipe.write(json.dumps(answer))


if __name__ == "__main__":
    main()
