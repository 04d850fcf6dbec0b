"""Remove units from a model: slice its parameters, and rewrite the width attributes of its modules.

`masked` sets to zero what `cut` removes; that both compute the same is what makes a group right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from . import surgery
from .errors import InfeasibleError
from .groups import Part, Unit
from .model import Model
from .weight import Dense, Layout


def masks(model: Model, units: Iterable[Unit]) -> dict[str, Bool[Tensor, "..."]]:
    """Return for each parameter or buffer that units occupy which of its elements stay."""
    parts: dict[str, list[Part]] = defaultdict(list)
    for unit in units:
        for part in unit.parts:
            parts[part.param].append(part)
    held = dict(model.skeleton.named_buffers()) | dict(model.tensors)
    return {param: _mask(model.layouts.get(param), held.get(param), found) for param, found in parts.items()}


def masked(model: Model, units: Iterable[Unit]) -> Model:
    """Return the model with the units' parameters set to zero, at full width; buffers stay."""
    keep, buffers = masks(model, units), set(dict(model.skeleton.named_buffers()))
    tensors = {
        name: value * keep[name] for name, value in model.tensors.items() if name in keep and name not in buffers
    }
    weights = {
        name: Dense(values=weight.dense() * model.layouts[name].to_matrix(keep[name]))
        for name, weight in model.weights.items()
        if name in keep
    }
    return model.with_tensors(tensors).with_weights(weights)


def cut(model: Model, units: Iterable[Unit], attributes: Mapping[str, int] | None = None) -> Model:
    """Return the model without the units.

    attributes: further width attributes to rewrite, beside those of the modules that torch defines. The weights that
    units occupy must be dense. Raises InfeasibleError where what remains is no tensor (a bug in the groups).
    """
    keep = masks(model, units)
    shapes = {name: _shape(name, mask) for name, mask in keep.items()}
    layouts = {name: _layout(model.layouts[name], shapes[name]) for name in keep if name in model.layouts}
    weights, tensors = {}, {}
    buffers = dict(model.skeleton.named_buffers())
    for name, mask in keep.items():
        if name in layouts:
            param = model.layouts[name].to_param(_dense(model, name).values)
            weights[name] = Dense(values=layouts[name].to_matrix(param[mask].reshape(shapes[name])))
        else:
            value = model.tensors[name] if name in model.tensors else buffers[name]
            tensors[name] = value[mask].reshape(shapes[name])
    widths = {**known_attributes(model, shapes), **(attributes or {})}
    edit = surgery.prune(shapes, widths)
    return replace(
        model,
        skeleton=surgery.apply(model.skeleton, (edit,)),
        weights={**model.weights, **weights},
        layouts={**model.layouts, **layouts},
        tensors={**model.tensors, **tensors},
        edits=(*model.edits, edit),
    )


def known_attributes(model: Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the width attributes of torch's own modules that follow from new shapes of their parameters."""
    found: dict[str, int] = {}
    modules = dict(model.skeleton.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        own = {leaf: shapes.get(f"{path}.{leaf}" if path else leaf) for leaf in _LEAVES}
        for leaf, value in _widths(module, {k: v for k, v in own.items() if v is not None}).items():
            found[f"{path}.{leaf}" if path else leaf] = value
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and f"{path}.out_proj.weight" in shapes:
            found[f"{path}.num_heads"] = shapes[f"{path}.out_proj.weight"][1] // module.head_dim
            found[f"{path}.out_proj.in_features"] = shapes[f"{path}.out_proj.weight"][1]
    return found


_LEAVES = ("weight", "running_mean", "weight_ih_l0", "weight_hh_l0", "weight_ih", "weight_hh")


def _widths(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    shape = shapes.get("weight", ())
    match module:
        case nn.Linear() if shape:
            return {"out_features": shape[0], "in_features": shape[1]}
        case nn.modules.conv._ConvTransposeNd() if shape:
            groups = shape[0] if module.groups == module.in_channels else module.groups
            return {"in_channels": shape[0], "out_channels": shape[1] * groups, "groups": groups}
        case nn.modules.conv._ConvNd() if shape:
            depthwise = module.groups == module.in_channels and module.groups > 1
            groups = shape[0] // (module.out_channels // module.groups) if depthwise else module.groups
            return {"out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}
        case nn.modules.batchnorm._NormBase() if shapes:
            return {"num_features": next(iter(shapes.values()))[0]}
        case nn.GroupNorm() if shape:
            return {"num_channels": shape[0], "num_groups": shape[0] * module.num_groups // module.num_channels}
        case nn.PReLU() if shape:
            return {"num_parameters": shape[0]}
        case nn.Embedding() if shape:
            return {"embedding_dim": shape[1]}
        case nn.RNNBase() if shapes:
            into, back = shapes.get("weight_ih_l0", ()), shapes.get("weight_hh_l0", ())
            return _named(input_size=into[1:2], hidden_size=back[1:2])
        case nn.RNNCellBase() if shapes:
            into, back = shapes.get("weight_ih", ()), shapes.get("weight_hh", ())
            return _named(input_size=into[1:2], hidden_size=back[1:2])
    return {}


def _named(**sizes: Sequence[int]) -> dict[str, int]:
    return {name: size[0] for name, size in sizes.items() if size}


def _mask(layout: Layout | None, held: Tensor | None, parts: Sequence[Part]) -> Tensor:
    if parts[0].axis == "elements":
        shape = layout.shape if layout is not None else held.shape  # type: ignore[union-attr]
        flat = torch.ones(shape, dtype=torch.bool).reshape(-1)
        flat[torch.cat([part.index for part in parts])] = False
        return flat.reshape(shape)
    assert layout is not None
    rows, columns = layout.matrix_shape
    matrix = torch.ones(rows, columns, dtype=torch.bool)
    run = rows // layout.groups
    for part in parts:
        if part.axis == "rows":
            matrix[part.index] = False
        else:
            matrix[part.block * run : (part.block + 1) * run, part.index] = False
    return layout.to_param(matrix)


def _shape(name: str, mask: Tensor) -> tuple[int, ...]:
    """Return the shape of what stays, which may lie ragged: rows of a grouped convolution lose different columns."""
    kept = mask.nonzero()
    if not len(kept):
        raise InfeasibleError(f'nothing of "{name}" would be left', fix="prune less, or name its layer in skip")
    first = kept[0].tolist()
    through = [mask[(*first[:axis], slice(None), *first[axis + 1 :])] for axis in range(mask.ndim)]
    counts = [int(mask.reshape(len(mask), -1).any(1).sum()), *(int(line.sum()) for line in through[1:])]
    if torch.Size(counts).numel() != len(kept):
        raise InfeasibleError(f'what remains of "{name}" is no tensor', fix="name its layer in skip")
    return tuple(counts)


def _layout(layout: Layout, shape: Sequence[int]) -> Layout:
    groups = layout.groups
    if groups > 1 and layout.kind == "conv" and layout.shape[1] == 1:
        groups = shape[0] * groups // layout.shape[0]
    elif groups > 1 and layout.kind == "conv_transpose" and layout.shape[0] == groups:
        groups = shape[0]
    return replace(layout, shape=tuple(shape), groups=groups)


def _dense(model: Model, name: str) -> Dense:
    weight: Any = model.weights[name]
    if not isinstance(weight, Dense):
        raise InfeasibleError(f'layer "{name}" is compressed already', fix="prune before it is quantized or factorized")
    return weight
