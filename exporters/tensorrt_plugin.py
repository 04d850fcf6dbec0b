"""Linear layers as nodes that a plugin computes: the CUDA kernels of `kernels/cuda`, in layout mma16.

None of these kernels was ever executed on a GPU. What they do not take is held as constants (`tensorrt_forms`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import onnx
import onnx_ir as ir
import torch

from ..kernels.cuda import launch
from ..kernels.cuda.cubins import CubinError
from ..kernels.lut_spec import Mode
from ..kernels.tensorrt import embed, node
from ..optimizer import packed
from ..optimizer.errors import RuntimeMissingError
from ..optimizer.packed import Coded
from ..optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight
from .board import plugin_aot
from .onnx_forms import Product
from .onnx_place import Attribute, Place
from .tensorrt_choice import Decision
from .tensorrt_forms import Constants

CODES = ".mma16.codes"
"""How the initializer of codes that a plugin reads ends; before it stands the name of the layer."""
UNTRIED = "its kernels were never run on a GPU"


class Plugin(Constants):
    """Nodes of a plugin where its kernels take the weight; everything else as constants."""

    def refusal(self, weight: Coded, mode: Mode) -> str:
        return refusal(weight, weight.dtype)

    def multiplied(self, place: Place, product: Product) -> ir.Value:
        weight, dtype, low = product.weight, product.weight.dtype, product.low
        spec, table = packed.lut_spec(weight), packed.lut_table(weight)
        words, scale_type = _words(place, weight, product.name)
        rank = 0 if low is None else low.left.shape[1]
        after = node.Epilogue(biased=product.bias is not None, rank=rank, activation=product.activation)
        none = place.initializer(f"none.{str(dtype).removeprefix('torch.')}", torch.zeros(1, dtype=dtype))
        tail = [none if product.bias is None else product.bias, none, none]
        if low is not None:
            left = node.pack_left(low.left.dense(), dtype)
            tail[1:] = [place.initializer(f"{low.name}.mma16.left", left), low.inner]
        found: dict[str, Attribute] = {"plugin_version": "1", "plugin_namespace": node.NAMESPACE}
        found |= node.attributes(spec, node.kind(spec, dtype, table.dtype), scale_type, after)
        return place.add(node.OP, [*words, product.x, none, *tail], dtype, found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """Which layers of a graph a plugin computes; `dtype` is the type of the floats of each layer that is coded."""

    layers: frozenset[str]
    dtypes: Mapping[str, torch.dtype]

    def notes(self, decisions: Iterable[Decision], weights: Mapping[str, Weight]) -> Iterator[Decision]:
        """Yield the decisions, each with what the plugin has to do with it."""
        for decision in decisions:
            note = self._note(decision.layer, weights[decision.layer])
            yield replace(decision, reason=f"{decision.reason}; {note}") if note else decision

    def _note(self, name: str, weight: Weight) -> str:
        if any(layer == name or layer.startswith(f"{name}.") for layer in self.layers):
            return f"multiplied by the plugin, {UNTRIED}"
        reasons = [refusal(coded, self.dtypes.get(name, coded.dtype)) for coded in _coded(weight)]
        why = next((reason for reason in reasons if reason), "")
        return f"not by the plugin: {why}" if why else ""


def refusal(weight: Coded, dtype: torch.dtype) -> str:
    """Return why a plugin does not multiply floats of a type by a weight, "" where it does."""
    return node.refusal(packed.lut_spec(weight), dtype, packed.lut_table(weight).dtype)


def taken(graph: ir.Graph, dtypes: Mapping[str, torch.dtype]) -> Taken:
    """Return which layers of a graph a plugin computes."""
    names = [str(name) for name in graph.initializers]
    return Taken(layers=frozenset(name.removesuffix(CODES) for name in names if name.endswith(CODES)), dtypes=dtypes)


def kinds(proto: onnx.ModelProto) -> list[tuple[launch.Kind, int]]:
    """Return kind and bits of the kernels that a graph runs."""
    told = [{entry.name: entry.i for entry in one.attribute} for one in proto.graph.node if one.op_type == node.OP]
    return sorted({(node.KINDS[one["kind"]], one["bits"]) for one in told})


def write_kernels(proto: onnx.ModelProto, folder: Path) -> None:
    """Write the PTX of what a graph runs to where `board/plugin_aot.py` looks for it."""
    folder.mkdir()
    for kind, bits in kinds(proto):
        try:
            image = embed.ptx(kind, bits)
        except CubinError as error:
            raise RuntimeMissingError(str(error), where="--plugin") from error
        (folder / f"{plugin_aot.kernel_name(node.KINDS.index(kind), bits)}.ptx").write_bytes(image)


def _words(place: Place, weight: Coded, name: str) -> tuple[list[ir.Value], int]:
    """Return codes, table and scales as a plugin reads them, made once for all nodes, and the type of the scales."""
    made = node.pack(weight.codes, packed.lut_table(weight), weight.scale, packed.lut_spec(weight), weight.dtype)
    named = {CODES: made.codes, ".mma16.table": made.table, ".mma16.scale": made.scale}
    return [place.initializer(f"{name}{suffix}", words) for suffix, words in named.items()], made.scale_type


def _coded(weight: Weight) -> Iterator[Coded]:
    match weight:
        case Dense():
            return
        case Uniform() | Codebook():
            yield weight
        case LowRank():
            yield from (*_coded(weight.left), *_coded(weight.right))
        case Sum():
            for term in weight.terms:
                yield from _coded(term)
        case _:
            assert_never(weight)
