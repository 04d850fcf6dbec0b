"""Check the shapes that annotations name (jaxtyping), and nothing else of them, in the tests only.

Each function is checked for its first CALLS calls in every test: checking all of them made the quantizers' property
tests 2.4 times slower, through inner functions that are called a hundred thousand times.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import beartype

SHAPED = re.compile(r"\[\s*(Tensor|ndarray)\s*,")
WRONG_ON_PURPOSE = ("bad", "wrong", "refused")
"""Words in the names of tests that pass wrong tensors to see our own error: they run unchecked."""
CALLS = 16

seen: Counter[FunctionType] = Counter()
"""How often each function was called in the current test."""
_jaxtyped: Any = jaxtyping.jaxtyped


def install() -> None:
    """Check every function and dataclass of the product that is imported from now on."""
    sys.modules.setdefault("paredown_shapes", sys.modules[__name__])
    jaxtyping.jaxtyped = sampled
    jaxtyping.install_import_hook("paredown", "paredown_shapes.check")


def sampled(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Stand in for `jaxtyping.jaxtyped`: leave functions without shapes alone, and check the others a few times."""

    def decorate(target: Any) -> Any:
        if not isinstance(target, FunctionType):
            return _jaxtyped(target, typechecker=typechecker)
        if not _shaped(target):
            return target
        checked = _jaxtyped(target, typechecker=typechecker)

        @functools.wraps(target)
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[target] += 1
            return (checked if seen[target] <= CALLS else target)(*args, **kwargs)

        return call

    return decorate


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its tensors checked; other annotations are mypy's business."""
    shaped = _shaped(function)
    if not shaped:
        return function
    function.__annotations__ = shaped
    return beartype(function)


def _shaped(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in function.__annotations__.items() if SHAPED.search(str(hint))}
