"""Every network of the zoo through the whole pipeline: pruned, factorized, quantized, exported and verified."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.exporters import onnx as target
from paredown.exporters import onnx_integer
from paredown.exporters.verify import Spec, compare, judge, verify
from paredown.optimizer import activations, data, factorize, prune, quantize
from paredown.optimizer.codes import Format
from paredown.optimizer.data import Calibration
from paredown.optimizer.errors import InfeasibleError
from paredown.optimizer.graph import quiet_export
from paredown.optimizer.model import Model
from paredown.optimizer.quantizers import kmeans, uniform
from paredown.optimizer.steps import Ground, Hooks, Result, StepModule
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Dense, LowRank, Weight

from ..zoo.nets import NETS, ZOO

ALONE = {"gru", "lstm", "cells"}
"""Networks without a group: their hidden states are outputs."""
QUICK = {"grouped", "raw"}
"""Networks of a second or two; the others are marked slow."""
QUICK_INTEGER = {"squeeze_excite"}
"""The same, for int8: floats between int8 layers."""
CNNS = [net.name for net in NETS if net.file in ("convolutions", "features")]
FLOATS = {
    "dense": ("BatchNormalization",),
    "excited": ("Mul", "Mul", "Mul"),
    "multiplied": ("Elu",),
    "restorer": ("Add", "Add", "PRelu"),
    "segmenter": ("Add",),
    "squeeze_excite": ("Mul",),
}
"""What computes in float between int8 layers, in no network but these."""
MANY = 256
"""Samples whose argmax is compared."""


def cases(names: Iterable[str], quick: set[str] = QUICK) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def sites(name: str) -> list[tuple[str, str]]:
    """Return (parameter, kind) of each use of a weight, as the zoo lists them."""
    lines = (line.split() for line in ZOO[name].sites.splitlines() if line)
    return [(param, kind) for param, kind, _ in lines]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def original(name: str) -> Model:
    return ZOO[name].model()


@functools.cache
def calibration(name: str) -> Calibration:
    return data.batches(ZOO[name].batch(32, seed=4), original(name).inputs, 32)


def stepped(step: StepModule, model: Model, name: str, spec: Any, *extras: Any) -> Result:
    """Plan a step on a model as it is, and apply it, as a run does."""
    known = calibration(name)
    ground = Ground(graph=trace(model.module(), known.batches[:1]).graph, calibration=known)
    return step.apply(model, spec, step.plan(model, spec, extras, ground), known, Hooks())


@functools.cache
def pruned(name: str) -> Model:
    return stepped(prune, original(name), name, prune.Spec(ratio=0.3)).model


def bits(weights: Iterable[Weight]) -> int:
    return sum(weight.bits() for weight in weights)


def outputs(model: Model, batch: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad(), quiet_export():
        return [y for y in pytree.tree_leaves(model.module()(*batch)) if y.is_floating_point()]


def off(model: Model, other: Model, batch: Sequence[Tensor]) -> float:
    """Return the norm of the difference of two models' outputs, relative to the first's."""
    pairs = list(zip(outputs(model, batch), outputs(other, batch), strict=True))
    wrong = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return float((wrong / sum(float(a.double().square().sum()) for a, _ in pairs)) ** 0.5)


def quantizable(name: str) -> set[str]:
    """Return the weights that an operator multiplies by, or looks up in, in one orientation."""
    turned = {param for param, kind in sites(name) if kind == "linear_t"}
    straight = {param for param, kind in sites(name) if kind != "linear_t"}
    return turned ^ straight


@pytest.mark.parametrize("name", cases(ZOO))
def test_every_network_is_pruned_factorized_quantized_exported_and_verified(name: str, tmp_path: Path) -> None:
    """Each step takes the value that the step before it made; the file of the last one computes what torch does."""
    model, path = original(name), tmp_path / "net.onnx"
    if name in ALONE:
        with pytest.raises(InfeasibleError, match=r"^no channel of the network can be removed"):
            pruned(name)
        narrow = model
    else:
        narrow = pruned(name)
        assert narrow.parameters() < 0.95 * model.parameters()
    thin = stepped(factorize, narrow, name, factorize.Spec(energy=0.98)).model
    low = [key for key, weight in thin.weights.items() if isinstance(weight, LowRank)]
    assert all(thin.weights[key].bits() < narrow.weights[key].bits() for key in low)
    assert all(thin.weights[key].shape == weight.shape for key, weight in narrow.weights.items())
    small = stepped(quantize, thin, name, quantize.Spec(quantizer="kmeans"), kmeans.Spec(format=Format(bits=4))).model
    coded = quantizable(name)
    for key, weight in small.weights.items():
        parts = (weight.left, weight.right) if isinstance(weight, LowRank) else (weight,)
        assert isinstance(weight, LowRank) is (key in low)
        assert all(isinstance(part, Dense) is (key not in coded) for part in parts)
    assert bits(small.weights[key] for key in coded) < 0.6 * bits(thin.weights[key] for key in coded)
    assert off(model, small, calibration(name).batches[0]) < 0.35
    target.export(small, path)
    rows = verify(small, path, target.open)
    assert [row.batch for row in rows] == [1, 3]
    assert max(row.rel for row in rows) < 1e-5


def integer_layers(name: str) -> set[str]:
    """Return the convolutions and linear layers: transposed convolutions have no integer kernel."""
    return {param for param, kind in sites(name) if kind in ("conv", "linear")}


def agreements(want: Sequence[Tensor], have: Sequence[np.ndarray[Any, Any]]) -> list[float]:
    """Return of each output which part of its rows (of an image's: pixels) has its largest entry in the same place."""
    shares = []
    for a, b in zip(want, have, strict=True):
        if a.ndim < 2:
            continue  # a number for each sample
        axis = 1 if a.ndim in (2, 4) else a.ndim - 1
        assert a.numel() >= 200 * a.shape[axis]
        shares.append(float(np.mean(a.numpy().argmax(axis) == b.argmax(axis))))
    return shares


@pytest.mark.parametrize("name", cases(CNNS, QUICK_INTEGER))
def test_every_convolutional_network_runs_in_integers_as_torch_computes_it(name: str, tmp_path: Path) -> None:
    """W8A8 of the pruned network. Of a few samples no rounding falls elsewhere, so errors are those of floats."""
    net, path = ZOO[name], tmp_path / "net.onnx"
    spec = quantize.Spec(quantizer="uniform", activations="int8")
    model = stepped(quantize, pruned(name), name, spec, uniform.Spec(format=Format(bits=8))).model
    target.export(model, path)
    found = onnx_integer.kernels(path)
    assert found.layers == activations.layers(model) == integer_layers(name)
    assert tuple(sorted(entry.split()[0] for entry in found.floats)) == FLOATS.get(name, ())
    many = net.batch(MANY, seed=7)
    rows = compare(model, path, target.open, Spec(batches=(1, 3, MANY), inputs=many))
    judge(rows, path)
    assert max(row.rel for row in rows[:2]) < 1e-5
    assert rows[2].rel <= 2e-2
    have = target.open(path).run({given.name: x.numpy() for given, x in zip(model.inputs, many, strict=True)})
    assert min(agreements(outputs(model, many), list(have.values())), default=1.0) >= 0.995
