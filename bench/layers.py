"""Time single layers in their original and in their compressed form, each pair alternating in one process.

A pair is cut out of the file that ships and of its float form, and runs on what the network feeds it. Its weights stay
in the caches from run to run, as they may not in a large network: what follows is checked on the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..exporters import onnx as target
from ..exporters import onnx_part
from ..exporters.onnx_part import Cut
from ..exporters.runner import Runner, RunnerOptions
from ..kernels import native
from ..optimizer import packed
from ..optimizer.model import Model
from ..optimizer.never_slower import Machine, Measured, Timing
from ..optimizer.packed import Computed
from ..optimizer.verdict import condition
from . import intervals, kernels
from .compare import BUSY
from .feeds import Feeds
from .measure import Call, Samples, Sampling, Seconds, sample
from .rows import Progress

ALONE = "the file has no operators for it that could be cut out"
CHAIN = 65
"""Operators of the longer of two chains whose difference says what one operator costs that does nothing."""


SAMPLING = Sampling(
    min_seconds=0.1,
    min_count=100,
    max_seconds=2.0,
    min_rounds=40,
    burst_seconds=0.002,
    warmup_seconds=0.2,
    warmup_rounds=3,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What to measure under, and for how long each call of a pair; `sampling` may be shortened by tests."""

    batch: tuple[int, ...]
    threads: tuple[int, ...]
    seed: int = 0
    sampling: Sampling = SAMPLING


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What parts read: arrays from the network at a few samples, and the axis of each that grows with the batch."""

    arrays: Mapping[str, np.ndarray]
    axes: Mapping[str, int | None]

    def feeds(self, names: Sequence[str], batch: int) -> Feeds:
        """Return the inputs of a part at a batch size, samples repeated as often as that takes."""
        return {name: self._sized(name, batch) for name in names}

    def _sized(self, name: str, batch: int) -> np.ndarray:
        array, axis = self.arrays[name], self.axes[name]
        if axis is None:
            return array
        count = array.shape[axis] // SEEN * batch
        return np.ascontiguousarray(np.take(array, np.arange(count) % array.shape[axis], axis))


SEEN = 2
"""Samples whose values are looked at; one alone is looked at too, to see which axis counts them."""


def measure(
    model: Model, names: Sequence[str], inputs: Callable[[int], Feeds], place: tuple[Path, Spec, Progress]
) -> list[Measured]:
    """Return what each of the weights `names` costs alone; equal ones are measured once.

    inputs: the network's inputs for so many samples. place: an empty folder, the conditions, and where progress goes.
    """
    folder, spec, progress = place
    cuts = onnx_part.cuts(model, names, folder)
    modes = target.modes(folder / "packed.onnx", model)
    values = _values(folder / "floats.onnx", cuts, inputs)
    kinds: dict[object, list[Cut]] = {}
    for cut in cuts:
        shapes = tuple(values.arrays[name].shape for name in cut.part.inputs)
        kinds.setdefault((cut.signature, shapes), []).append(cut)
    node_us = {threads: _node_us(folder, threads, spec) for threads in spec.threads}
    found = []
    for index, equal in enumerate(kinds.values()):
        progress(index / len(kinds), f"layer {index + 1} of {len(kinds)}: {equal[0].part.layers[0]}")
        timings, operators = _timed(equal[0], values, folder, spec)
        layers = tuple(name for cut in equal for name in cut.part.layers)
        facts = _facts(model, equal[0].part.layers, modes, (spec.threads[0], node_us))
        found.append(replace(facts, layers=layers, timings=timings, operators=operators))
    told = {name for item in found for name in item.layers}
    return [*found, *(Measured(layers=(name,), alone=ALONE) for name in names if name not in told)]


def _values(path: Path, cuts: Sequence[Cut], inputs: Callable[[int], Feeds]) -> Values:
    """Run the float network on one sample and on SEEN, and keep what the parts read."""
    wanted = list(dict.fromkeys(name for cut in cuts for name in cut.part.inputs))
    seen = path.with_name("seen.onnx")
    onnx_part.with_outputs(path, wanted, seen)
    runner = target.open(seen)
    fed = [inputs(count) for count in (1, SEEN)]
    one, more = ([runner.run(feeds)[f"{name}.seen"] for name in wanted] for feeds in fed)
    axes = {
        name: next((axis for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b), None)
        for name, x, y in zip(wanted, one, more, strict=True)
    }
    return Values(arrays=dict(zip(wanted, more, strict=True)), axes=axes)


def _timed(cut: Cut, values: Values, folder: Path, spec: Spec) -> tuple[tuple[Timing, ...], tuple[int, int]]:
    """Return the timings of a pair, and how many operators the runtime runs of each half."""
    paths = folder / "before.onnx", folder / "after.onnx"
    operators = []
    for path, file in zip(paths, (cut.before, cut.after), strict=True):
        onnx_part.write(file, path)
        operators.append(onnx_part.nodes(path))
    timings = []
    for threads in spec.threads:
        options = RunnerOptions(threads=threads)
        runners = [target.open(path, options) for path in (*paths, _chain(folder, 1))]
        for batch in spec.batch:
            feeds = values.feeds(cut.part.inputs, batch)
            timings.append(_timing(runners, feeds, spec, {"batch": batch, "threads": threads}))
    return tuple(timings), (operators[0], operators[1])


def _timing(runners: Sequence[Runner], feeds: Feeds, spec: Spec, place: Mapping[str, object]) -> Timing:
    """Alternate a pair and a call that does next to nothing, whose time is what calling the runtime costs."""
    empty = {"x0": np.zeros(1, np.float32)}
    calls = [_call(runner, fed) for runner, fed in zip(runners, (feeds, feeds, empty), strict=True)]
    samples = sample(calls, spec.sampling)
    before, after = (_net(seconds, samples.seconds[2]) for seconds in samples.seconds[:2])
    return Timing(
        condition=condition(place),
        before_us=float(np.median(before)) * 1e6,
        after_us=float(np.median(after)) * 1e6,
        ratio=intervals.ratio(after, before),
        ci95=_interval(after, before, samples, spec),
    )


def _net(seconds: Seconds, empty: Seconds) -> Seconds:
    """Return a time per run without what the call itself costs in the same round."""
    return np.asarray(seconds - np.median(empty, axis=1, keepdims=True))


def _interval(after: Seconds, before: Seconds, samples: Samples, spec: Spec) -> tuple[float, float] | None:
    """Return the interval of a ratio; None where a core was missing, or a layer is too short to be told from a call."""
    rounds = np.median(before, axis=1), np.median(after, axis=1)
    if (samples.waited or 0.0) > BUSY or min(float(part.min()) for part in rounds) <= 0:
        return None
    return intervals.ratio_interval(after, before, np.random.default_rng(spec.seed))


def _node_us(folder: Path, threads: int, spec: Spec) -> float:
    """Return microseconds of one operator that does nothing, inside a run."""
    options = RunnerOptions(threads=threads)
    fed = {"x0": np.zeros(1, np.float32)}
    calls = [_call(target.open(_chain(folder, count), options), fed) for count in (1, CHAIN)]
    short, long = (float(np.median(seconds)) for seconds in sample(calls, spec.sampling).seconds)
    return max(0.0, (long - short) / (CHAIN - 1) * 1e6)


def _chain(folder: Path, count: int) -> Path:
    path = folder / f"chain-{count}.onnx"
    if not path.exists():
        onnx_part.write_chain(count, path)
    return path


def _call(runner: Runner, feeds: Feeds) -> Call:
    return lambda: runner.run(feeds)


def _facts(
    model: Model, layers: Sequence[str], modes: Mapping[str, Computed], node: tuple[int, Mapping[int, float]]
) -> Measured:
    """Return what explains a layer's time: how it computes, what fills it up, and what this machine can do."""
    weights = [model.weights[name] for name in layers]
    size = sum(weight.shape[0] * weight.shape[1] * weight.dense().element_size() for weight in weights)
    threads, node_us = node
    speed = kernels.read_gb_per_s(size, threads) if native.available() else None
    decoded = [name for name in layers if "decoded" in modes[name].mode]
    because = [packed.decoded_because(model.weights[x], model.layouts[x], modes[x].decoded_for) for x in decoded]
    return Measured(
        layers=tuple(layers),
        decoded="; ".join(dict.fromkeys(because)),
        shape=weights[0].shape,
        filled=packed.filled(weights[0], model.layouts[layers[0]], rounds=layers[0] in model.dynamic),
        weight_bytes=size,
        machine=Machine(node_us=node_us[threads], read_gb_per_s=speed),
    )
