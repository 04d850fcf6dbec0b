"""A module that computes from packed weights: its linear layers and embeddings hold codes, as the file does.

A module gives way to a packed one where its own forward is all that uses its weight. What is left (convolutions,
recurrent layers, packed attention projections, functional calls) holds floats as in `Model.module()`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from ..kernels.lut_gather import LutEmbedding
from ..kernels.lut_linear import LutLinear
from ..kernels.lut_spec import LutParts, LutSpec, Mode, refusal
from . import packed
from .activations_module import quantized
from .errors import RecipeError
from .graph import Graph, Site, capture
from .model import Model, fill, module_at
from .packed import Coded
from .weight import Codebook, Dense, LowRank, Uniform, Weight


def packed_module(model: Model) -> nn.Module:
    """Return a fresh runnable module in evaluation mode whose linear layers and embeddings hold packed weights.

    It computes what `Model.module()` does, but for the order of float32 sums, and has no gradient. Tied weights share
    their codes. RecipeError for a model with static int8 activations, which are a graph of their own.
    """
    if model.acts:
        raise RecipeError("static int8 activations have no packed module", fix="use Model.module(), or the ONNX file")
    exact = replace(model, dynamic=frozenset())
    places = _places(capture(exact.module(), model.examples(2)), model)
    module = copy.deepcopy(model.skeleton)
    names = {id(param): name for name, param in module.named_parameters()}
    changed: dict[int, nn.Module] = {}
    for param, paths in places.items():
        maker = _Maker(weight=model.weights[param], mode="int8" if param in model.dynamic else "exact")
        for old in [module_at(module, path) for path in paths]:
            bias = names.get(id(getattr(old, "bias", None)), "")
            changed[id(old)] = maker.layer(old, model.tensors.get(bias))
    module = _exchanged(module, changed)
    fill(module, _values(model, frozenset(places)))
    left = model.dynamic - places.keys()
    made = quantized(module, replace(model, dynamic=left)) if left else module.eval()
    return made.requires_grad_(False)


def _values(model: Model, without: frozenset[str]) -> dict[str, Tensor]:
    kept = {name: weight for name, weight in model.weights.items() if name not in without}
    return replace(model, weights=kept).values()


def _exchanged(module: nn.Module, changed: Mapping[int, nn.Module]) -> nn.Module:
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            parent._modules[key] = changed.get(id(child), child)
    return changed.get(id(module), module)


def _places(graph: Graph, model: Model) -> dict[str, list[str]]:
    """Return weight -> the paths of the modules that can hold it packed, where they are all that uses it."""
    found = {}
    for param, sites in graph.of_param().items():
        uses = [site for site in sites if _fits(site, model)]
        if len(uses) == len(sites) and graph.readers(param) == {site.node for site in sites}:
            found[param] = list(dict.fromkeys(site.module for site in sites))
    return found


def _fits(site: Site, model: Model) -> bool:
    """Whether the module of a site is one that a packed one can stand for, with a weight that has a packed form."""
    owner, weight = module_at(model.skeleton, site.module), model.weights.get(site.param)
    if weight is None or isinstance(weight, Dense):
        return False
    if site.kind == "embedding":
        plain = type(owner) is nn.Embedding and owner.max_norm is None
        return plain and isinstance(weight, Uniform | Codebook) and _is_packable(weight)
    return site.kind == "linear" and type(owner) is nn.Linear and _is_packable(weight)


def _is_packable(weight: Weight) -> bool:
    match weight:
        case Dense():
            return True
        case Uniform() | Codebook():
            made = packed.lut_spec(weight), packed.lut_table(weight).dtype
            return weight.dtype in packed.DTYPES and not refusal(made[0], "exact", made[1])
        case LowRank():
            return _is_packable(weight.left) and _is_packable(weight.right)
        case _:
            found = packed.terms(weight)
            return found is not None and found.low is not None and _is_packable(found.base) and _has_left(found.low)


def _has_left(low: LowRank) -> bool:
    return isinstance(low.left, Uniform | Codebook) and _is_packable(low)


class _Maker:
    """Makes the modules that hold one weight; they share its tensors."""

    def __init__(self, *, weight: Weight, mode: Mode) -> None:
        self.weight, self.mode = weight, mode
        self.known: dict[int, tuple[LutParts, LutSpec]] = {}

    def layer(self, old: nn.Module, bias: Tensor | None) -> nn.Module:
        if isinstance(old, nn.Embedding):
            assert isinstance(self.weight, Uniform | Codebook)
            return LutEmbedding(*self.parts(self.weight), dtype=self.weight.dtype)
        return self.linear(self.weight, bias, self.mode)

    def linear(self, weight: Weight, bias: Float[Tensor, "n"] | None, mode: Mode = "exact") -> nn.Module:
        match weight:
            case Dense():
                return _dense(weight, bias)
            case Uniform() | Codebook():
                return LutLinear(*self.parts(weight), mode=mode, bias=bias)
            case LowRank():
                return nn.Sequential(self.linear(weight.right, None), self.linear(weight.left, bias))
            case _:
                found = packed.terms(weight)
                assert found is not None
                assert found.low is not None
                assert isinstance(found.low.left, Uniform | Codebook)
                left, right = self.parts(found.low.left), self.linear(found.low.right, None)
                return LutLinear(*self.parts(found.base), mode=mode, bias=bias, left=left, right=right)

    def parts(self, weight: Coded) -> tuple[LutParts, LutSpec]:
        if id(weight) not in self.known:
            self.known[id(weight)] = packed.lut_parts(weight), packed.lut_spec(weight)
        return self.known[id(weight)]


def _dense(weight: Dense, bias: Float[Tensor, "n"] | None) -> nn.Linear:
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.values.dtype)
    made.weight = nn.Parameter(weight.values.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made
