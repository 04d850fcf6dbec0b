"""A model is a value: a skeleton without parameters, and the tensors and weights that fill it.

Nothing here is ever mutated. A pass returns `replace(model, ...)`; tensors that it does not touch are shared.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import InputError, RecipeError, nearest
from .weight import Dense, Layout, Weight

Edit: TypeAlias = Mapping[str, Any]
"""One recorded change of the architecture, replayed on the skeleton that the entry builds (`surgery.apply`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One input of the network: dimensions are numbers, or names where they may vary."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise RecipeError(f'input "{self.name}" has unknown dtype "{self.dtype}"', fix="use float32, int64, ...")
        for size in self.shape:
            if not isinstance(size, str) and size < 1:
                raise RecipeError(f'input "{self.name}" has dimension {size}', fix="use positive sizes or names")

    def example(self, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        """Return a seeded example: normal values for floats, 0 or 1 for integers and booleans."""
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)

    def sizes(self, example: Tensor) -> dict[str, int]:
        """Return the named dimensions of an example; an InputError where it does not fit."""
        known: dict[str, int] = {}
        fits = example.ndim == len(self.shape) and all(
            size == (known.setdefault(want, size) if isinstance(want, str) else want)
            for size, want in zip(example.shape, self.shape, strict=True)
        )
        if not fits:
            shape = tuple(example.shape)
            raise InputError(f'input "{self.name}": shape {shape} does not fit {list(self.shape)}')
        return known


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A Python file that builds the architecture, kept in the output folder."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model came from: "file.py:function" (the first of `files`) or "module:function", and its arguments."""

    entry: str
    args: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[SourceFile, ...] = ()
    checkpoint_sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActQuant:
    """An int8 grid of an activation: (code - zero) * scale."""

    scale: float
    zero: int
    signed: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A network as data.

    skeleton  parameters on the meta device, buffers real; tied parameters are one object
    weights   canonical parameter name -> Weight, for each floating parameter of two or more dimensions
    layouts   the same names -> how the matrix lies in the parameter
    tensors   every other parameter and persistent buffer, and any other buffer that a pass has changed
    edits     how the skeleton differs from what `source` builds, in order
    acts      name of a value (`activations_names`) -> its int8 grid
    dynamic   the weights whose layers round their inputs to int8 at run time (`activations_dynamic`)
    """

    skeleton: nn.Module
    weights: Mapping[str, Weight]
    layouts: Mapping[str, Layout]
    tensors: Mapping[str, Tensor]
    inputs: tuple[InputSpec, ...]
    source: Source
    acts: Mapping[str, ActQuant] = field(default_factory=lambda: MappingProxyType({}))
    edits: tuple[Edit, ...] = ()
    dynamic: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("weights", "layouts", "tensors", "acts"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def module(self) -> nn.Module:
        """Return a fresh runnable module in evaluation mode that shares no memory with this value."""
        module = copy.deepcopy(self.skeleton)
        fill(module, self.values())
        if not self.acts and not self.dynamic:
            return module.eval()
        from .activations_module import quantized

        return quantized(module, self)

    def packed_module(self) -> nn.Module:
        """Return such a module whose linear layers and embeddings compute from codes (`packed_module`)."""
        from .packed_module import packed_module

        return packed_module(self)

    def values(self) -> dict[str, Tensor]:
        """Return every parameter and buffer by canonical name, weights decoded."""
        weights = {name: self.layouts[name].to_param(weight.dense()) for name, weight in self.weights.items()}
        return {**dict(self.skeleton.named_buffers()), **self.tensors, **weights}

    def aliases(self) -> dict[str, str]:
        """Return other name -> canonical name of each parameter or buffer that has several."""
        return aliases(self.skeleton)

    def parameters(self) -> int:
        """Return how many numbers the network's parameters hold; tied ones count once."""
        buffers = {name for name, _ in self.skeleton.named_buffers()}
        rest = sum(t.numel() for name, t in self.tensors.items() if name not in buffers)
        return rest + sum(w.shape[0] * w.shape[1] for w in self.weights.values())

    def size_bytes(self) -> int:
        """Return the bytes of all tensors as `store.save` writes them to model.safetensors."""
        rest = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        return rest + sum(weight.bits() // 8 for weight in self.weights.values())

    def with_weights(self, changed: Mapping[str, Weight]) -> Model:
        return replace(self, weights={**self.weights, **changed})

    def with_tensors(self, changed: Mapping[str, Tensor]) -> Model:
        return replace(self, tensors={**self.tensors, **changed})

    def examples(self, size: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Return seeded example inputs; the first named dimension gets `size`, every other one 8."""
        names = list(dict.fromkeys(d for spec in self.inputs for d in spec.shape if isinstance(d, str)))
        sizes = {name: (size if i == 0 else 8) for i, name in enumerate(names)}
        generator = torch.Generator().manual_seed(seed)
        return tuple(spec.example(sizes, generator) for spec in self.inputs)


def from_module(module: nn.Module, inputs: Sequence[InputSpec], source: Source) -> Model:
    """Return the value of a module whose parameters are real, copied: training the module goes unseen."""
    params = dict(module.named_parameters())
    values = {**params, **persistent_buffers(module)}
    tensors = {name: value.detach().clone() for name, value in values.items()}
    return from_tensors(skeleton_of(module), tensors, inputs, source)


def from_tensors(
    skeleton: nn.Module, values: Mapping[str, Tensor], inputs: Sequence[InputSpec], source: Source
) -> Model:
    """Return a model from a skeleton and one tensor per canonical name."""
    layouts = layouts_of(skeleton)
    return Model(
        skeleton=skeleton,
        weights={name: Dense(values=layout.to_matrix(values[name])) for name, layout in layouts.items()},
        layouts=layouts,
        tensors={name: value for name, value in values.items() if name not in layouts},
        inputs=tuple(inputs),
        source=source,
    )


def skeleton_of(module: nn.Module) -> nn.Module:
    """Return a copy of a module with its parameters on the meta device, ties kept and buffers real.

    `module.to("meta")` would untie shared parameters and drop the values of buffers.
    """
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        for param in module.parameters()
    }
    try:
        skeleton: nn.Module = copy.deepcopy(module, memo)
    except RuntimeError as error:
        fix = "undo torch.nn.utils.weight_norm and the like in the entry (remove_weight_norm)"
        raise InputError(f"the network cannot be copied: {str(error).splitlines()[0]}", fix=fix) from error
    skeleton.eval()
    return skeleton


def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write copies of `values` into a module's parameters and buffers; an InputError if one stays on meta.

    Module code that keeps its own list of parameters (nn.LSTM and nn.GRU do) sees the new ones too.
    """
    filled: dict[int, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        owner, leaf = _owner(module, name)
        if id(old) not in filled:
            if name not in values:
                raise InputError(f'parameter "{name}" has no value', fix="the module would run on meta tensors")
            _check_shape(name, values[name], old)
            value = values[name].detach().clone(memory_format=torch.contiguous_format)
            filled[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(owner, leaf, filled[id(old)])
    shared: dict[int, Tensor] = {}
    for name, buffer in list(module.named_buffers(remove_duplicate=False)):
        owner, leaf = _owner(module, name)
        if id(buffer) not in shared:
            _check_shape(name, values.get(name, buffer), buffer)
            shared[id(buffer)] = values.get(name, buffer).detach().clone()
        owner._buffers[leaf] = shared[id(buffer)]
    stray = [name for name, value in _all_tensors(module) if value.is_meta]
    if stray:
        raise InputError(f'tensor "{stray[0]}" is still on the meta device', fix="register it as a buffer")


def aliases(module: nn.Module) -> dict[str, str]:
    """Return other name -> first name, for parameters and buffers that a module holds under several names."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, value in _named(module):
        if first.setdefault(id(value), name) != name:
            found[name] = first[id(value)]
    return found


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state dict holds, under their first names."""
    saved = set(module.state_dict())
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def layouts_of(module: nn.Module) -> dict[str, Layout]:
    """Return the layout of each floating parameter of two or more dimensions, under its first name."""
    found: dict[str, Layout] = {}
    conv, transposed = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for name, param in module.named_parameters():
        if param.ndim < 2 or not param.is_floating_point():
            continue
        owner, _ = _owner(module, name)
        shape = tuple(param.shape)
        if isinstance(owner, conv):
            found[name] = Layout(kind="conv", shape=shape, groups=owner.groups)
        elif isinstance(owner, transposed):
            found[name] = Layout(kind="conv_transpose", shape=shape, groups=owner.groups)
        else:
            found[name] = Layout(kind="matrix", shape=shape)
    return found


def module_at(module: nn.Module, path: str) -> nn.Module:
    """Return a submodule by its path; an InputError names the nearest one."""
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if path not in modules:
        raise InputError(f'there is no module "{path}"', fix=nearest(path, modules))
    return modules[path]


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _all_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yield parameters, buffers and plain tensor attributes, those in lists and dictionaries too."""
    yield from _named(module)
    for path, part in module.named_modules():
        for key, value in vars(part).items():
            held = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            )
            yield from ((f"{path}.{key}".lstrip("."), item) for item in held if isinstance(item, Tensor))


def _check_shape(name: str, value: Tensor, old: Tensor) -> None:
    if value.shape != old.shape:
        raise InputError(f'"{name}" has shape {tuple(value.shape)}, the architecture wants {tuple(old.shape)}')
