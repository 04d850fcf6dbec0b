"""Recorded changes of an architecture: each is data, applied to a skeleton, replayed when a folder is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from .errors import InputError
from .model import Edit, module_at


def apply(skeleton: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Return a copy of a skeleton with the edits made in order; the skeleton is left as it was.

    Raises InputError for an edit of an unknown kind or a module that is not there.
    """
    edits = tuple(edits)
    changed = copy.deepcopy(skeleton) if edits else skeleton
    for edit in edits:
        if edit["edit"] != "fold_norm":
            raise InputError(f'unknown edit "{edit["edit"]}"', fix="use the version of paredown that wrote it")
        _fold_norm(changed, edit["into"], edit["norm"])
    return changed


def fold_norm(into: str, norm: str) -> Edit:
    """Return the edit that gives module `into` a bias and makes its batch normalization `norm` the identity."""
    return {"edit": "fold_norm", "into": into, "norm": norm}


def _fold_norm(root: nn.Module, into: str, norm: str) -> None:
    layer, batch_norm = module_at(root, into), module_at(root, norm)
    if getattr(layer, "bias", None) is None:
        channels = cast(Tensor, batch_norm.running_mean).shape[0]
        dtype = next(layer.parameters()).dtype
        layer.bias = nn.Parameter(torch.empty(channels, device="meta", dtype=dtype))
    parent, _, leaf = norm.rpartition(".")
    setattr(root.get_submodule(parent), leaf, nn.Identity())
