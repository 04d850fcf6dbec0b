"""Check the shapes that annotations name (jaxtyping), and nothing else of them, in the tests only."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

SHAPED = re.compile(r"\[\s*(Tensor|ndarray)\s*,")
WRONG_ON_PURPOSE = ("bad", "wrong", "refused")
"""Words in the names of tests that pass wrong tensors to see our own error: they run unchecked."""


def install() -> None:
    """Check every function of the product that is imported from now on."""
    sys.modules.setdefault("paredown_shapes", sys.modules[__name__])
    jaxtyping.install_import_hook("paredown", "paredown_shapes.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its tensors checked; other annotations are mypy's business."""
    shaped = {name: hint for name, hint in function.__annotations__.items() if SHAPED.search(str(hint))}
    if not shaped:
        return function
    function.__annotations__ = shaped
    return beartype(function)
