"""Call a function in a fresh process: the job goes there by pickle, the answer comes back as JSON."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

_SERVE = "from paredown.bench.child import serve; serve()"


class ChildError(Exception):
    """A process that could not be given its job or did not finish it; the text says why."""


def ask(function: Callable[..., object], *arguments: object, timeout: float) -> Any:
    """Return what `function` returns for the arguments in a process of its own, as JSON carries it.

    The function and what the arguments refer to must be in importable modules. Cost: a start of Python.
    """
    try:
        payload = pickle.dumps((function, arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as problem:
        raise ChildError(f"{problem}") from problem
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _SERVE], input=payload, capture_output=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise ChildError(f"{problem}".replace(_SERVE, "...")) from problem
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ChildError(lines[-1] if lines else f"it ended with status {done.returncode}")
    return json.loads(done.stdout)


def serve() -> None:
    """Do the job on stdin. The bytes come from our own parent, by a pipe; what libraries print goes to stderr."""
    answers = os.dup(1)
    os.dup2(2, 1)
    function, arguments = pickle.load(sys.stdin.buffer)
    answer = json.dumps(function(*arguments))
    with os.fdopen(answers, "w", encoding="utf-8") as pipe:
        pipe.write(answer)
