"""Models that carry state from frame to frame: outputs fed back as inputs, and how latency compares with real time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..exporters.runner import Runner
from ..optimizer.errors import InputError, RecipeError, nearest
from .feeds import Feeds
from .measure import Seconds


def with_constants(
    runner: Runner, feeds: Feeds, constants: Mapping[str, int | float], state: Mapping[str, str]
) -> Feeds:
    """Return feeds in which the named inputs are filled with one value, and the inputs of `state` start at zero."""
    known = {spec.name for spec in runner.inputs}
    for key, names in (("inputs", constants.keys()), ("state", state.values())):
        for name in names:
            if name not in known:
                raise RecipeError(f'the model has no input "{name}"', where=f"bench {key}", fix=nearest(name, known))
    filled = {name: _full(name, feeds[name], value) for name, value in constants.items()}
    zeros = {name: np.zeros_like(feeds[name]) for name in state.values()}
    return feeds | filled | zeros


def check_state(outputs: Mapping[str, np.ndarray], feeds: Feeds, state: Mapping[str, str], where: str) -> None:
    """Raise where an output that is fed back is absent, or is not what its input takes."""
    for output, name in state.items():
        if output not in outputs:
            raise RecipeError(f'the model has no output "{output}"', where="bench state", fix=nearest(output, outputs))
        have, want = outputs[output], feeds[name]
        if (have.shape, have.dtype) != (want.shape, want.dtype):
            what = f'output "{output}" is {have.dtype} {list(have.shape)}, its input "{name}" {want.dtype}'
            raise InputError(f"{what} {list(want.shape)}", where=where, fix="pair each state with its own input")


def real_time(seconds: Seconds, frame_ms: float) -> dict[str, object]:
    """Return latency over the duration of a frame, and the share of frames that took longer than that."""
    if not frame_ms:
        return {}
    p50, p99 = (float(value) for value in np.percentile(seconds, [50, 99]) * 1e3)
    return {
        "frame_ms": frame_ms,
        "real_time_factor_p50": p50 / frame_ms,
        "real_time_factor_p99": p99 / frame_ms,
        "missed_deadline_share": float(np.mean(seconds * 1e3 > frame_ms)),
    }


def _full(name: str, like: np.ndarray, value: int | float) -> np.ndarray:
    filled = np.full_like(like, value)
    if filled.size and filled.flat[0] != np.float64(value) and np.issubdtype(like.dtype, np.integer):
        what = f'{value} is no value of input "{name}", which is {like.dtype}'
        raise RecipeError(what, where="bench inputs", fix="give a whole number in its range")
    return filled
