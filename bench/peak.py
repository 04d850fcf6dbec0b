"""Peak memory of one artifact, measured in a fresh process that opens it and runs it once."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .feeds import Feeds

if TYPE_CHECKING:
    from ..exporters.runner import Open, RunnerOptions

TIMEOUT_SECONDS = 600
_CHILD = "from paredown.bench.peak import child; child()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the child does; it travels by pickle, so `open_` must be a function of an importable module."""

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
        payload = pickle.dumps((job.path, job.options, job.open_, job.feeds))
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD], input=payload, capture_output=True, timeout=TIMEOUT_SECONDS
        )
    except (pickle.PicklingError, AttributeError, TypeError, OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rb"^VmHWM=(\d+)$", done.stdout, re.MULTILINE)
    return int(found[1]) if done.returncode == 0 and found else None


def child() -> None:
    """Run the job on stdin and print the peak of this process. The bytes come from our own parent, by a pipe."""
    path, options, open_, feeds = pickle.load(sys.stdin.buffer)
    open_(path, options).run(feeds)
    print(f"\nVmHWM={_high_water_mark()}")


def _high_water_mark() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError("/proc/self/status has no VmHWM")
    return int(found[1]) * 1024
