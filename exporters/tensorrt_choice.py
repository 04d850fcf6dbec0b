"""Decide how TensorRT holds each weight of a model, by the bytes of the engine.

A form is kept where the engine gets smaller by it: its constants, and what it costs besides. Convolutions are never
held in fewer than 8 bits, and recurrent operators and transposed convolutions take floats only. Speed needs the device:
`tensorrt_write.best` times whole engines where there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, assert_never

import onnx_ir as ir
import torch

from ..optimizer import activations
from ..optimizer.model import Model
from ..optimizer.packed import Coded
from ..optimizer.weight import Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight, format_name
from .onnx_linear import linear_uses
from .onnx_place import readers
from .onnx_weights import lookups
from .tensorrt_forms import form_bytes, form_of, int8_rows, positive, scales

Use: TypeAlias = Literal["product", "lookup", "convolution", "other"]

LAYER_BYTES = 30_000
"""What a packed layer costs an engine besides its constants, more than a dense one (tensorrt-rtx 1.7.1, SM86, fp16): 16
kB for codebooks and 35 kB for int4 in stories260k, 32 kB for int8 convolutions in ResNet-20; 5 kB in a stack of equal
products, which share their code."""
ENGINE_BYTES = 130_000
"""What an engine has once for decoding, however many layers do: one codebook layer of 64 x 64 makes 18 kB 145 kB, one
int8 convolution 281 kB 410 kB (same build)."""
WORST_SCALE = 2.0**-10
"""Relative error up to which scales may be rounded to float16; below its normal numbers it is larger."""
MOVES = {"Cast", "Concat", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"} | {
    "Unsqueeze"
}
PRODUCTS = {"Gemm", "MatMul"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How TensorRT holds a layer: `kept` where it is the form that the model stores, and why it is so."""

    layer: str
    form: str
    kept: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What forms are chosen by.

    smallest: keep a form only where it makes the engine smaller; else wherever TensorRT has it. floats: keep none but
    those of layers between int8 grids.
    itemsize: bytes of a float in the engine. float32: the layers whose floats take four.
    int4: whether the opset has it. plugin: why no plugin multiplies floats of a type by a weight; None without one.
    """

    smallest: bool = True
    floats: bool = False
    itemsize: int = 2
    float32: frozenset[str] = field(default_factory=frozenset)
    int4: bool = True
    plugin: Callable[[Coded, torch.dtype], str] | None = None
    dtype: torch.dtype = torch.float16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A model with its weights as TensorRT holds them, and the reason for each."""

    model: Model
    decisions: tuple[Decision, ...]


def choose(graph: ir.Graph, model: Model, rule: Rule) -> Choice:
    """Choose for every compressed weight; `graph` is the traced one, with dense weights and int8 layers placed."""
    uses, integers = _uses(graph, model), activations.layers(model)
    open_layers = {
        name: _Layer(name=name, weight=weight, layout=model.layouts[name], uses=uses[name], rule=rule)
        for name, weight in model.weights.items()
        if not isinstance(weight, Dense) and name in uses and name not in integers
    }
    light, full = ({name: layer.best(decoding=d) for name, layer in open_layers.items()} for d in (False, True))
    saved = sum(light[name].bytes - full[name].bytes for name in open_layers)
    pays = not rule.floats and (saved > ENGINE_BYTES or not rule.smallest)
    picked = full if pays else light
    decided = {name: layer.decision(picked[name], full[name], saved) for name, layer in open_layers.items()}
    for name in integers:
        decided[name] = Decision(layer=name, form="int8", kept=True, reason="computes in integers between int8 grids")
    found = model.with_weights({name: pick.weight for name, pick in picked.items()})
    return Choice(model=found, decisions=tuple(decided[name] for name in model.weights if name in decided))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pick:
    """A way to hold a weight; why: what speaks against the stored form, "" where this is it."""

    weight: Weight
    bytes: int
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    name: str
    weight: Weight
    layout: Layout
    uses: Mapping[Use, str]
    rule: Rule

    @property
    def itemsize(self) -> int:
        return 4 if self.name in self.rule.float32 else self.rule.itemsize

    def best(self, *, decoding: bool) -> _Pick:
        """Return the smallest way to hold the weight; without `decoding`, of floats alone."""
        found = self._best(self.weight, decoding)
        dense = self._dense(self.weight, found.why)
        return min(found, dense, key=lambda pick: pick.bytes) if self.rule.smallest else found

    def decision(self, pick: _Pick, full: _Pick, saved: int) -> Decision:
        form, kept = _form_name(pick.weight), not pick.why and _same_kind(pick.weight, self.weight)
        if kept:
            return Decision(layer=self.name, form=form, kept=True, reason=self._kept_because(pick))
        why = pick.why
        if not why and pick is not full and pick.bytes > full.bytes:
            why = f"packed weights would save {max(saved, 0)} bytes in all, decoding costs an engine {ENGINE_BYTES}"
        if not why:
            stored = self._size(self.weight)
            why = f"{format_name(self.weight)} would take {stored} bytes of the engine, {form} takes {pick.bytes}"
        return Decision(layer=self.name, form=form, kept=False, reason=why)

    def _kept_because(self, pick: _Pick) -> str:
        dense = self._dense(self.weight).bytes
        return f"about {pick.bytes} bytes of the engine, {dense} as floats"

    def _size(self, weight: Weight) -> int:
        """Return the bytes of a weight in its own form."""
        match weight:
            case Dense():
                return weight.values.numel() * self.itemsize
            case Uniform() | Codebook():
                return form_bytes(weight, self.itemsize) + LAYER_BYTES
            case LowRank():
                return self._size(weight.left) + self._size(weight.right)
            case Sum():
                return sum(self._size(term) for term in weight.terms)
            case _:
                assert_never(weight)

    def _dense(self, weight: Weight, why: str = "") -> _Pick:
        n, k = weight.shape
        return _Pick(weight=Dense(values=weight.dense()), bytes=n * k * self.itemsize, why=why)

    def _best(self, weight: Weight, decoding: bool) -> _Pick:
        match weight:
            case Dense():
                return self._dense(weight)
            case Uniform() | Codebook():
                return self._coded(weight, decoding)
            case LowRank():
                return self._low_rank(weight, decoding)
            case Sum():
                return self._sum(weight, decoding)
            case _:
                assert_never(weight)

    def _low_rank(self, weight: LowRank, decoding: bool) -> _Pick:
        if "lookup" in self.uses or "other" in self.uses or (self._is_convolved and self.layout.groups > 1):
            return self._dense(weight, self.uses.get("other") or "a product of two factors stands for it here")
        sides = [self._smaller(side, decoding) for side in (weight.left, weight.right)]
        made = LowRank(left=sides[0].weight, right=sides[1].weight)
        why = next((side.why for side in sides if side.why), "")
        return _Pick(weight=made, bytes=sum(side.bytes for side in sides), why=why)

    def _sum(self, weight: Sum, decoding: bool) -> _Pick:
        if set(self.uses) != {"product"}:
            return self._dense(weight, self.uses.get("other") or "a sum of weights is only multiplied term by term")
        terms = [self._smaller(term, decoding) for term in weight.terms]
        why = next((term.why for term in terms if term.why), "")
        return _Pick(
            weight=Sum(terms=tuple(term.weight for term in terms)), bytes=sum(term.bytes for term in terms), why=why
        )

    def _smaller(self, weight: Weight, decoding: bool) -> _Pick:
        """Return the best form of a term or factor, or its floats where these are smaller."""
        found = self._best(weight, decoding)
        if not self.rule.smallest or isinstance(weight, Dense):
            return found
        return min(found, self._dense(weight, found.why), key=lambda pick: pick.bytes)

    @property
    def _is_convolved(self) -> bool:
        return "convolution" in self.uses

    def _coded(self, weight: Uniform | Codebook, decoding: bool) -> _Pick:
        if "other" in self.uses:
            return self._dense(weight, self.uses["other"])
        if not decoding:
            return self._dense(weight)
        picks, why = [], ""
        for form, against in self._forms(weight):
            why, refused = why or against, self._refusal(form)
            if not refused:
                cost = form_bytes(form, self.itemsize) + LAYER_BYTES
                picks.append(_Pick(weight=form, bytes=cost, why=why))
            why = why or refused
        if not picks:
            return self._dense(weight, why or "convolutions take int8 with one scale per row, which it is not")
        return min(picks, key=lambda pick: pick.bytes) if self.rule.smallest else picks[0]

    def _forms(self, weight: Uniform | Codebook) -> Iterator[tuple[Uniform | Codebook, str]]:
        """Yield a weight as it is stored, and as int8, with what speaks against the stored form."""
        rows = int8_rows(weight)
        if not self._is_convolved:
            yield positive(weight), ""
            if rows is not None and form_of(weight) != "int8":
                yield rows, ""
        elif rows is not None:
            yield rows, "" if weight.code_bits == 8 else "convolutions are held in 8 bits or more"

    def _refusal(self, weight: Uniform | Codebook) -> str:
        """Return why the engine cannot hold a weight in its form, "" where it can."""
        if self.rule.plugin is not None and not self._is_convolved:
            dtype = torch.float32 if self.name in self.rule.float32 else self.rule.dtype
            if not self.rule.plugin(weight, dtype):
                return ""
        held = scales(weight)
        if held is not None and self.itemsize == 2 and _rounding(held) > WORST_SCALE:
            return "its scales are too small for float16"
        if not self.rule.int4 and form_of(weight) != "int8" and weight.code_bits <= 4:
            return "4-bit constants need opset 21"
        return ""


def _uses(graph: ir.Graph, model: Model) -> dict[str, dict[Use, str]]:
    """Return what the parameters of a graph are used for; of other uses, why they take floats."""
    aliases, found = model.aliases(), dict[str, dict[Use, str]]()
    for value in graph.initializers.values():
        name = aliases.get(str(value.name), str(value.name))
        if name not in model.weights or not list(readers(value)):
            continue
        layout, known = model.layouts[name], found.setdefault(name, {})
        products, rows = set(linear_uses(value, layout)), set(lookups(value, layout))
        for node, index in _final(value):
            known |= _use(node, index, layout, "product" if node in products else "lookup" if node in rows else "other")
    return found


def _use(node: ir.Node, index: int, layout: Layout, direct: Use) -> dict[Use, str]:
    if direct != "other":
        return {direct: ""}
    if node.op_type in PRODUCTS and layout.kind in ("matrix", "matrix_t"):
        return {"product": ""}
    if node.op_type == "Conv" and index == 1 and layout.kind == "conv":
        return {"convolution": ""}
    return {"other": f"{node.op_type} takes its weights as floats"}


def _final(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Yield the operators that compute with a value, however it is rearranged before."""
    for node, index in readers(value):
        if node.op_type not in (*MOVES, "Shape"):
            yield node, index
        elif node.op_type != "Shape":
            for result in node.outputs:
                yield from _final(result)


def _form_name(weight: Weight) -> str:
    """Return what a weight is in the engine, for tables."""
    match weight:
        case Dense():
            return "dense"
        case Uniform() | Codebook() if form_of(weight) == "int8":
            return "int8"
        case LowRank():
            return f"{_form_name(weight.left)} x {_form_name(weight.right)}"
        case Sum():
            return " + ".join(_form_name(term) for term in weight.terms)
        case _:
            return format_name(weight)


def is_packed(form: str) -> bool:
    """Whether a part of a weight with such a name is held in codes."""
    return any(part not in ("dense", "float32") for part in re.split(r" [+x] ", form))


def _same_kind(have: Weight, stored: Weight) -> bool:
    """Whether all parts of a weight are held as they are stored, an 8-bit one as int8."""
    match have, stored:
        case LowRank(), LowRank():
            return _same_kind(have.left, stored.left) and _same_kind(have.right, stored.right)
        case Sum(), Sum():
            return all(_same_kind(a, b) for a, b in zip(have.terms, stored.terms, strict=True))
        case Dense(), _:
            return isinstance(stored, Dense)
        case ((Uniform() | Codebook()), (Uniform() | Codebook())):
            return have.code_bits == stored.code_bits
        case _:
            return False


def _rounding(values: torch.Tensor) -> float:
    """Return the largest relative error of rounding to float16."""
    known = values[values != 0].double()
    if not known.numel():
        return 0.0
    worst = float(((known.half().double() - known).abs() / known.abs()).max())
    return worst if math.isfinite(worst) else math.inf
