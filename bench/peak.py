"""Peak memory of one artifact, measured in a fresh process that opens it and runs it once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .child import ChildError, ask
from .feeds import Feeds

if TYPE_CHECKING:
    from ..exporters.runner import Open, RunnerOptions

TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the child does; `open_` must be a function of an importable module."""

    path: Path
    options: RunnerOptions
    open_: Open
    feeds: Feeds


def peak_rss_bytes(job: Job) -> int | None:
    """Return the peak resident memory of a process that opens the artifact and runs it once; None if unmeasurable.

    It is the whole process (Linux VmHWM): interpreter, runtime library, weights, activations; nothing is subtracted.
    VmHWM and not getrusage, because ru_maxrss of a child starts at its parent's value. None: no /proc, an `open_` that
    the child cannot import, or a child that failed or took more than TIMEOUT_SECONDS.
    """
    try:
        return int(ask(open_and_run, job, timeout=TIMEOUT_SECONDS))
    except ChildError:
        return None


def open_and_run(job: Job) -> int:
    """Run the job and return the peak of this process."""
    job.open_(job.path, job.options).run(job.feeds)
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError("/proc/self/status has no VmHWM")
    return int(found[1]) * 1024
