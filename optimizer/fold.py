"""Fold batch normalization into the layer before it, so that row scales are in units of the output.

w' = w g / sqrt(v + eps), b' = (b - m) g / sqrt(v + eps) + beta (Jacob et al. 2018, section 3.2), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from . import surgery
from .graph import Graph, Site, aten, module_path
from .model import Model
from .weight import Dense

NORMS = {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A layer and the batch normalization that follows it and nothing else."""

    into: str
    norm: str


def plan(model: Model, graph: Graph) -> tuple[Fold, ...]:
    """Find layers whose only user is a batch normalization with running statistics; both used once."""
    uses = graph.of_param()
    calls = [module_path(node) for node in graph.nodes if node.target in NORMS]
    found = []
    for node in graph.nodes:
        if node.target in NORMS and calls.count(module_path(node)) == 1:
            fold = _foldable(model, node, graph.sites.get(node.all_input_nodes[0].name, ()))
            if fold is not None and len(uses[f"{fold.into}.weight"]) == 1:
                found.append(fold)
    return tuple(found)


def apply(model: Model, folds: tuple[Fold, ...]) -> Model:
    """Return the model with the normalizations folded; weights of the folded layers must still be dense."""
    for fold in folds:
        model = _fold(model, fold)
    return model


def _foldable(model: Model, node: fx.Node, sites: tuple[Site, ...]) -> Fold | None:
    source = node.all_input_nodes[0]
    if len(sites) != 1 or len(source.users) != 1 or sites[0].kind not in ("conv", "conv_transpose", "linear"):
        return None
    (site,), norm = sites, module_path(node)
    modules = dict(model.skeleton.named_modules())
    layer, batch_norm = modules.get(site.module), modules.get(norm)
    if site.param != f"{site.module}.weight" or not hasattr(layer, "bias"):
        return None
    if not isinstance(batch_norm, nn.modules.batchnorm._BatchNorm) or batch_norm.running_mean is None:
        return None
    if site.kind == "linear" and source.meta["val"].ndim != 2:
        return None
    if not _owns_its_tensors(model, norm, batch_norm) or _is_shared(model, f"{site.module}.bias"):
        return None
    return Fold(into=site.module, norm=norm) if isinstance(model.weights.get(site.param), Dense) else None


def _owns_its_tensors(model: Model, path: str, norm: nn.Module) -> bool:
    """Return whether a normalization's tensors are stored under its own name and under no other."""
    own = [f"{path}.{leaf}" for leaf, _ in (*norm.named_parameters(), *norm.named_buffers())]
    return all(name in model.tensors and not _is_shared(model, name) for name in own)


def _is_shared(model: Model, name: str) -> bool:
    names = model.aliases()
    return name in names or name in names.values()


def _fold(model: Model, fold: Fold) -> Model:
    name, bias = f"{fold.into}.weight", f"{fold.into}.bias"
    weight = model.weights[name].dense()
    gain, shift = _affine(model, fold.norm)
    old = model.tensors[bias].double() if bias in model.tensors else torch.zeros_like(shift)
    tensors = {key: value for key, value in model.tensors.items() if not key.startswith(f"{fold.norm}.")}
    tensors[bias] = (old * gain + shift).to(weight.dtype)
    edit = surgery.fold_norm(fold.into, fold.norm)
    return replace(
        model,
        skeleton=surgery.apply(model.skeleton, (edit,)),
        weights={**model.weights, name: Dense(values=(weight.double() * gain[:, None]).to(weight.dtype))},
        tensors=tensors,
        edits=(*model.edits, edit),
    )


def _affine(model: Model, norm: str) -> tuple[Tensor, Tensor]:
    """Return (gain, shift) such that the normalization is x * gain + shift."""
    module = model.skeleton.get_submodule(norm)
    values = {key: model.tensors.get(f"{norm}.{key}") for key in ("weight", "bias", "running_mean", "running_var")}
    mean, variance = values["running_mean"], values["running_var"]
    assert mean is not None
    assert variance is not None
    gain = (variance.double() + float(module.eps)).rsqrt()  # type: ignore[arg-type]
    if values["weight"] is not None:
        gain = gain * values["weight"].double()
    shift = -mean.double() * gain
    return gain, shift if values["bias"] is None else shift + values["bias"].double()
