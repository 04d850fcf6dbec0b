"""Peak memory of one artifact on a board, in a fresh process that opens it and runs it once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from . import runners, timing
else:
    import runners
    import timing

SECONDS = 600


def peak_rss_bytes(job: dict[str, Any]) -> int | None:
    """Return what `bench/peak.py` does: VmHWM of the whole process, None where it cannot be had."""
    command = [sys.executable, "-B", str(Path(__file__)), json.dumps(job)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    return int(found[1]) * 1024 if done.returncode == 0 and found else None


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    runners.open_runner(wanted["artifact"], wanted["threads"], wanted["library"]).run(
        timing.load_feeds(wanted["feeds"])
    )
    sys.stdout.write(Path("/proc/self/status").read_text())
