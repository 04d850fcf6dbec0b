"""Compare the weights in an ONNX file with those of the model, byte by byte.

Outputs are compared within a tolerance, which is wide where inputs are rounded to int8: a few wrong codes pass. Bytes
have none. What a file holds in another form than the exporter gives to a whole tensor (parts of a split matrix, folded
constants) is left to the outputs.
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
from ..optimizer.activations_graph import has_codes
from ..optimizer.model import Model
from ..optimizer.packed import Coded
from ..optimizer.weight import Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight
from .onnx_forms import named
from .onnx_qdq import bias_codes, dequantizer, integer_parts


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
    """Compare every tensor of a file whose name and size say which of the model's it is, and the int8 grids."""
    graph = ir.load(path).graph
    tensors = list(_tensors(graph, model))
    grids, biases = (list(_grids(graph, model)), list(_biases(graph, model))) if model.acts else ([], [])
    wrong = next((wrong for wrong in (*tensors, *grids, *biases) if wrong), "")
    return Stored(equal=(*tensors, *biases).count(""), wrong=wrong)


def _tensors(graph: ir.Graph, model: Model) -> Iterator[str]:
    """Yield what is wrong with each tensor that has a name of the model's, "" for nothing."""
    for forms in _named(model):
        value = graph.initializers.get(forms[0].name)
        if value is None or value.const_value is None:
            continue
        different = _different(np.frombuffer(value.const_value.tobytes(), np.uint8), forms)
        if different is not None:
            yield _wrong(different, value.const_value.nbytes, forms[0].name)


def _wrong(different: int, count: int, name: str) -> str:
    return f'{different} of the {count} bytes of "{name}"' if different else ""


def _grids(graph: ir.Graph, model: Model) -> Iterator[str]:
    """Yield the values whose int8 grid is none of the model's."""
    known = {(float(np.float32(act.scale)), act.zero, act.signed) for act in model.acts.values()}
    for node in graph:
        scale, zero = _array(node, 1), _array(node, 2)
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or scale is None or zero is None or scale.ndim:
            continue
        if (float(scale), int(zero), zero.dtype == np.int8) not in known:
            yield f'the scale and zero point of "{node.outputs[0].name}"'


def _biases(graph: ir.Graph, model: Model) -> Iterator[str]:
    """Yield what is wrong with the codes, and with the scales, of each bias of an int8 layer."""
    for node in graph:
        codes, scale = _array(node, 0), _array(node, 1)
        if node.op_type != "DequantizeLinear" or codes is None or codes.dtype != np.int32 or scale is None:
            continue
        names = [str(value.name) for value in node.inputs[:2] if value is not None]
        for layer in (use.node for use in node.outputs[0].uses() if use.idx == 2):
            x, weight = (_array(dequantizer(value), 1) for value in layer.inputs[:2])
            if x is not None and weight is not None:
                yield _wrong(_unequal(x * weight, scale), scale.nbytes, names[1])
        if (bias := _owner(names[0].removesuffix(".codes"), model)) is not None:
            wanted = bias_codes(bias.detach(), torch.from_numpy(scale.copy()))
            yield _wrong(_unequal(wanted.numpy(), codes), codes.nbytes, names[0])


def _owner(name: str, model: Model) -> Tensor | None:
    """Return the bias that stands in a file under a name, which where several layers share it has more behind it."""
    while name and name not in model.tensors:
        name = name.rpartition(".")[0]
    return model.tensors.get(name)


def _array(node: ir.Node | None, index: int) -> np.ndarray | None:
    """Return an input of a node that is stored in the file."""
    value = None if node is None or len(node.inputs) <= index else node.inputs[index]
    held = None if value is None else value.const_value
    return None if held is None else held.numpy()


def _unequal(want: np.ndarray, have: np.ndarray) -> int:
    """Return how many bytes of two arrays of one type differ."""
    pairs = (np.frombuffer(np.ascontiguousarray(side).tobytes(), np.uint8) for side in (want.astype(have.dtype), have))
    return int(np.count_nonzero(np.not_equal(*pairs)))


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
    """Return how many bytes differ from those of the form that is nearest.

    None where none has as many bytes, or the same bytes stand in an order of their own, as in a transposed convolution.
    """
    found = [_bytes(form.tensor) for form in forms if form.tensor.nbytes == have.nbytes]
    least = min((int(np.count_nonzero(want != have)) for want in found), default=None)
    return None if least and any(np.array_equal(_counts(want), _counts(have)) for want in found) else least


def _counts(content: np.ndarray) -> np.ndarray:
    """Return how often each byte occurs."""
    return np.bincount(content, minlength=256)


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
        yield from (_Held(name=known, tensor=tensor) for known, tensor in named(name, parts).items())
    yield _Held(name=f"{name}.codes", tensor=pack_rows(weight.codes, weight.code_bits))
    yield _Held(name=f"{name}.scale", tensor=weight.scale)
    if isinstance(weight, Uniform) and has_codes(weight) and weight.codes.numel() == np.prod(layout.shape):
        for stem, turned in ((name, False), (f"{name}.t", True)):
            parts_of = integer_parts(weight, layout, turned=turned)
            yield from (_Held(name=f"{stem}.{key}", tensor=tensor) for key, tensor in parts_of.items())
