"""The exceptions of Paredown: each says what was wrong, where, and what to do, and carries its exit code.

Error                     1
├── RecipeError           2   usage, recipe, unknown or out-of-range value
├── InputError            3   a checkpoint, data set or folder that cannot be used
├── InfeasibleError       4   a constraint that nothing satisfies
├── AccuracyError         5   the accuracy gate
├── ExportError           6   export or verification
└── RuntimeMissingError   7   a device that does not answer, a library that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Error(Exception):
    """Base of every error that a user can cause and mend.

    `str(error)` is one sentence: "where: what; fix".
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__((f"{where}: " if where else "") + what + (f"; {fix}" if fix else ""))


class RecipeError(Error):
    exit_code = 2


class InputError(Error):
    exit_code = 3


class InfeasibleError(Error):
    exit_code = 4


class AccuracyError(Error):
    exit_code = 5


class ExportError(Error):
    exit_code = 6


class RuntimeMissingError(Error):
    exit_code = 7


def nearest(name: str, known: Iterable[str]) -> str:
    """Return 'did you mean "x"?' or a list of what is known, for the `fix` part of an error."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f'did you mean "{close[0]}"?'
    return "use one of " + ", ".join(known) if known else "there is nothing to choose from"
