"""Compare the weights in an ONNX file with those of the model, byte by byte.

Outputs are compared within a tolerance, which is wide where inputs are rounded to int8: a few wrong codes pass. Bytes
have none. What a file holds in another form than the exporter gives to a weight (parts of a split matrix) is left to
the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..kernels.lut_conv import ConvSpec
from ..kernels.pack import pack as pack_rows
from ..optimizer import packed
from ..optimizer.model import Model
from ..optimizer.packed import Coded
from ..optimizer.weight import Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight

MIDDLE = 128
"""Code of 0 in unsigned bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Held:
    """A tensor as the exporter may have written it, under this name of the file."""

    name: str
    tensor: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How many tensors of a file are the model's to the bit, and what is wrong with the first that is not, or ""."""

    equal: int = 0
    wrong: str = ""


def compare(path: Path, model: Model) -> Stored:
    """Compare every tensor of a file whose name and size say which of the model's it is."""
    values = ir.load(path).graph.initializers
    equal, wrong = 0, ""
    for forms in _named(model):
        value = values.get(forms[0].name)
        if value is None or value.const_value is None:
            continue
        different = _different(np.frombuffer(value.const_value.tobytes(), np.uint8), forms)
        equal += different == 0
        if different and not wrong:
            wrong = f'{different} of the {value.const_value.nbytes} bytes of "{forms[0].name}"'
    return Stored(equal=equal, wrong=wrong)


def _named(model: Model) -> Iterator[list[_Held]]:
    """Yield the forms that stand under one name, for every name that a file may have."""
    for layer, weight in model.weights.items():
        found = dict[str, list[_Held]]()
        for held in _forms(layer, weight, model.layouts[layer]):
            found.setdefault(held.name, []).append(held)
        yield from found.values()
    for name, tensor in model.tensors.items():
        yield [_Held(name=name, tensor=tensor)]


def _different(have: np.ndarray, forms: list[_Held]) -> int | None:
    """Return how many bytes differ from those of the form that is nearest, None where none has as many bytes."""
    pairs = (_bytes(form.tensor) for form in forms if form.tensor.nbytes == have.nbytes)
    return min((int(np.count_nonzero(want != have)) for want in pairs), default=None)


def _bytes(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().contiguous().flatten().view(torch.uint8).numpy(force=True)
    return found


def _forms(name: str, weight: Weight, layout: Layout) -> Iterator[_Held]:
    """Yield every form that the exporter has for a weight, a term or a factor."""
    match weight:
        case Dense():
            yield from _dense(name, weight, layout)
        case Uniform() | Codebook():
            yield from _coded(name, weight, layout)
        case LowRank():
            yield from _forms(f"{name}.left", weight.left, layout)
            yield from _forms(f"{name}.right", weight.right, layout)
        case Sum():
            for index, term in enumerate(weight.terms):
                yield from _forms(f"{name}.{index}", term, layout)


def _dense(name: str, weight: Dense, layout: Layout) -> Iterator[_Held]:
    values = weight.values
    if values.numel() == np.prod(layout.shape):
        yield _Held(name=name, tensor=layout.to_param(values))
    yield _Held(name=name, tensor=values)
    yield _Held(name=f"{name}.t", tensor=values.T)


def _coded(name: str, weight: Coded, layout: Layout) -> Iterator[_Held]:
    made = [packed.lut_parts(weight)]
    if layout.kind == "conv" and len(layout.shape) == 4 and layout.groups == 1 and weight.scale.shape[1] == 1:
        _, channels, height, width = layout.shape
        if weight.shape[1] == channels * height * width:
            made.append(packed.conv_parts(weight, ConvSpec(channels=channels, kernel=(height, width))))
    for parts in made:
        yield _Held(name=f"{name}.c16.codes", tensor=parts.codes)
        yield _Held(name=f"{name}.c16.scale", tensor=parts.scale)
        yield _Held(name=f"{name}.table", tensor=parts.table)
    yield _Held(name=f"{name}.codes", tensor=pack_rows(weight.codes, weight.code_bits))
    yield _Held(name=f"{name}.scale", tensor=weight.scale)
    yield from _signed(name, weight, layout)


def _signed(name: str, weight: Coded, layout: Layout) -> Iterator[_Held]:
    """Yield signed bytes, their scales and zero points, as QDQ has them."""
    if weight.code_bits != 8 or not isinstance(weight, Uniform):
        return
    codes = (weight.codes.to(torch.int16) - MIDDLE).to(torch.int8)
    if codes.numel() == np.prod(layout.shape):
        yield _Held(name=f"{name}.codes", tensor=layout.to_param(codes))
    yield _Held(name=f"{name}.t.codes", tensor=codes.T)
    yield _Held(name=f"{name}.scale", tensor=weight.scale.flatten().float())
    yield _Held(name=f"{name}.t.scale", tensor=weight.scale.flatten().float())
    zeros = torch.zeros(weight.scale.numel(), dtype=torch.int8)
    yield _Held(name=f"{name}.zero", tensor=zeros)
    yield _Held(name=f"{name}.t.zero", tensor=zeros)
