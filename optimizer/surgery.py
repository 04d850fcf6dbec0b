"""Recorded changes of an architecture: each is data, applied to a skeleton, replayed when a folder is loaded."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import Attention
from .errors import InputError
from .model import Edit, module_at


def apply(skeleton: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Return a copy of a skeleton with the edits made in order; the skeleton is left as it was.

    Raises InputError for an edit of an unknown kind or a module that is not there.
    """
    edits = tuple(edits)
    changed = copy.deepcopy(skeleton) if edits else skeleton
    for edit in edits:
        match edit["edit"]:
            case "fold_norm":
                _fold_norm(changed, edit["into"], edit["norm"])
            case "prune":
                _prune(changed, edit["shapes"], edit["attributes"])
            case kind:
                raise InputError(f'unknown edit "{kind}"', fix="use the version of paredown that wrote it")
    return changed


def fold_norm(into: str, norm: str) -> Edit:
    """Return the edit that gives module `into` a bias and makes its batch normalization `norm` the identity."""
    return {"edit": "fold_norm", "into": into, "norm": norm}


def prune(shapes: Mapping[str, Sequence[int]], attributes: Mapping[str, Any]) -> Edit:
    """Return the edit that gives parameters and buffers other shapes, and width attributes of modules other values.

    attributes: "path.of.module.attribute" -> number, or list of numbers. A MultiheadAttention whose inner width changes
    becomes an `Attention`, which does not tie it to the width of what it reads.
    """
    plain = {name: [int(size) for size in shape] for name, shape in shapes.items()}
    return {"edit": "prune", "shapes": plain, "attributes": dict(attributes)}


def _prune(root: nn.Module, shapes: Mapping[str, Sequence[int]], attributes: Mapping[str, Any]) -> None:
    _open_attention(root, {name.rpartition(".")[0].removesuffix(".out_proj") for name in shapes})
    made: dict[int, Tensor] = {}
    held = (*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False))
    wanted = {id(value): shapes[name] for name, value in held if name in shapes}
    missing = next((name for name in shapes if name not in dict(held)), None)
    if missing:
        raise InputError(f'there is no parameter or buffer "{missing}" to cut')
    for name, value in held:
        if id(value) in wanted:
            path, _, leaf = name.rpartition(".")
            new = made.setdefault(id(value), _resized(value, wanted[id(value)]))
            setattr(root.get_submodule(path), leaf, new)
    for name, number in attributes.items():
        path, _, leaf = name.rpartition(".")
        setattr(module_at(root, path), leaf, tuple(number) if isinstance(number, list) else number)


def _open_attention(root: nn.Module, paths: Collection[str]) -> None:
    """Put an `Attention` in the place of each MultiheadAttention at these paths, wherever else it is registered."""
    held = list(root.named_modules(remove_duplicate=False))
    cut = {id(module) for path, module in held if path in paths and isinstance(module, nn.MultiheadAttention)}
    made: dict[int, Attention] = {}
    for path, module in held:
        if id(module) in cut and isinstance(module, nn.MultiheadAttention):
            if id(module) not in made:
                made[id(module)] = Attention.from_module(module, where=path)
            _put(root, path, made[id(module)])
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _resized(value: Tensor, shape: Sequence[int]) -> Tensor:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty(*shape, dtype=value.dtype, device="meta"), requires_grad=value.requires_grad)
    return torch.zeros(*shape, dtype=value.dtype, device=value.device)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _fold_norm(root: nn.Module, into: str, norm: str) -> None:
    layer, batch_norm = module_at(root, into), module_at(root, norm)
    if getattr(layer, "bias", None) is None:
        channels = cast(Tensor, batch_norm.running_mean).shape[0]
        dtype = next(layer.parameters()).dtype
        layer.bias = nn.Parameter(torch.empty(channels, device="meta", dtype=dtype))
    _put(root, norm, nn.Identity())
