"""A module that holds packed weights computes what the decoded one does, in about the bytes of the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.kernels.lut_gather import LutEmbedding
from paredown.kernels.lut_linear import LutLinear
from paredown.kernels.lut_spec import LutParts, LutSpec
from paredown.optimizer.errors import RecipeError
from paredown.optimizer.model import ActQuant, InputSpec, Model
from paredown.optimizer.packed import (
    Reader,
    decoded_because,
    int8_refusal,
    low_refusal,
    lut_parts,
    lut_spec,
    refusal,
    terms,
)
from paredown.optimizer.packed_module import packed_module
from paredown.optimizer.weight import Codebook, Dense, Layout, LowRank, Sum, Uniform, Weight

from ..exporters.conftest import FORMS, NETS, TOKENS, Attention, build, pack_all, packed

WIDE = InputSpec(name="x", shape=("batch", 96))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 160), nn.Linear(160, 96, bias=False)
        self.third = nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(x + self.second(torch.relu(self.first(x))))
        return y


def outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(module(*inputs)) if isinstance(leaf, Tensor)]


def assert_same(model: Model, step: float) -> nn.Module:
    module = packed_module(model)
    for size in (1, 3):
        inputs = model.examples(size)
        for have, want in zip(outputs(module, inputs), outputs(model.module(), inputs), strict=True):
            assert have.dtype == want.dtype
            assert (have - want).abs().max() <= step * want.abs().max()
    return module


@pytest.mark.parametrize("name", NETS)
def test_it_computes_what_the_decoded_module_does(name: str) -> None:
    assert_same(NETS[name](), 5e-3 if name == "half" else 1e-5)


def test_every_layer_that_can_is_packed_and_ties_share_their_codes() -> None:
    module = assert_same(pack_all(build(Attention, TOKENS)), 1e-5)
    kinds = {path: type(part) for path, part in module.named_modules()}
    assert kinds["embedding"] is LutEmbedding
    assert all(kinds[path] is LutLinear for path in ("inner", "back", "head", "pool", "pool_plain"))
    head, table = module.get_submodule("head"), module.get_submodule("embedding")
    assert head.get_buffer("codes").data_ptr() == table.get_buffer("codes").data_ptr()
    assert {name for name, _ in module.named_parameters()} == {
        *("attention.in_proj_weight", "attention.in_proj_bias"),
        *("attention.out_proj.weight", "attention.out_proj.bias"),
    }


def residual(model: Model, left: Callable[[Tensor], Weight]) -> Model:
    generator, changed = torch.Generator().manual_seed(0), dict[str, Weight]()
    for name, weight in model.weights.items():
        w = weight.dense()
        low = LowRank(left=left(w[:, :8].contiguous()), right=packed(w[:8], "uniform 8", generator))
        changed[name] = Sum(terms=(packed(w, "codebook 4 groups", generator), low))
    return model.with_weights(changed)


@pytest.mark.parametrize("rounds", [False, True])
def test_low_ranks_and_rounded_inputs_too(rounds: bool) -> None:
    model = residual(build(Stack, WIDE), lambda w: packed(w, "uniform 8", torch.Generator().manual_seed(0)))
    model = replace(model, dynamic=frozenset(model.weights) if rounds else frozenset())
    module = assert_same(model, 1e-5)
    layers = [part for part in module.modules() if isinstance(part, LutLinear) and part.right is not None]
    assert [layer.mode for layer in layers] == 3 * ["int8" if rounds else "exact"]


def test_a_low_rank_of_floats_stays_dense_as_a_whole() -> None:
    model = residual(build(Stack, WIDE), lambda w: Dense(values=w))
    module = assert_same(model, 1e-5)
    assert not [part for part in module.modules() if isinstance(part, LutLinear)]


def test_what_cannot_be_packed_rounds_its_inputs_all_the_same() -> None:
    model = pack_all(build(Attention, TOKENS), ("codebook 4", "codebook 3"))
    module = assert_same(replace(model, dynamic=frozenset(model.weights)), 1e-5)
    assert "attention.in_proj_weight" in dict(module.named_parameters())


def test_its_buffers_take_the_bytes_of_the_file_and_come_back_from_a_state() -> None:
    model = pack_all(build(Stack, WIDE), ("codebook 4", "codebook 3", "codebook 2"))
    module = packed_module(model)
    held = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    assert model.size_bytes() <= held <= 1.01 * model.size_bytes()
    other = packed_module(pack_all(build(Stack, WIDE), ("codebook 4", "codebook 3", "codebook 2"), seed=1))
    other.load_state_dict(module.state_dict())
    x = torch.randn(4, 96)
    with torch.no_grad():
        assert torch.equal(other(x), module(x))
        assert module.half()(x.half()).dtype == torch.float16


def test_static_activations_are_refused() -> None:
    model = replace(build(Stack, WIDE), acts={"input/x": ActQuant(scale=1.0, zero=0, signed=True)})
    with pytest.raises(RecipeError, match=r"^static int8 activations have no packed module; use Model.module\(\)"):
        model.packed_module()


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 8), st.sampled_from((0, 5, 32, 40)), st.booleans())
def test_an_embedding_looks_up_the_rows_of_dense(n: int, k: int, bits: int, group: int, blocks: bool) -> None:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    table = torch.randint(-127, 128, (math.ceil(n / 16) if blocks else 1, 2**bits), generator=generator)
    scale = torch.randn(n, math.ceil(k / group) if group else 1, generator=generator).half()
    weight = Codebook(
        codes=codes, table=table.to(torch.int8), scale=scale, code_bits=bits, group=group, table_rows=16 * blocks
    )
    embedding = LutEmbedding(lut_parts(weight), lut_spec(weight), dtype=torch.float32)
    rows = torch.randint(0, n, (3, 2), generator=generator)
    assert torch.equal(embedding(rows), weight.dense()[rows])
    assert embedding(rows[:0]).shape == (0, 2, k)
    assert torch.equal(embedding.half()(rows), weight.dense()[rows].half())
    assert embedding.scale.dtype == torch.float16


def test_reasons_say_what_has_no_kernel() -> None:
    generator = torch.Generator().manual_seed(0)

    def made(form: str) -> Codebook | Uniform:
        weight = packed(torch.randn(20, 24), form, generator)
        assert isinstance(weight, Codebook | Uniform)
        return weight

    book = made("codebook 4")
    assert [refusal(made(form)) for form in FORMS] == [""] * len(FORMS)
    assert refusal(made("codebook 5")) == "5 bits have no operator"
    assert refusal(replace(book, dtype=torch.float64)) == "float64 has no kernel"
    low = LowRank(left=made("codebook 3"), right=Dense(values=torch.randn(24, 24)))
    assert low_refusal(low) == "a left factor of 3 bits has no operator"
    assert low_refusal(replace(low, left=Dense(values=torch.randn(20, 24)))) == "the left factor is no table of codes"
    assert low_refusal(replace(low, left=book)) == ""
    assert int8_refusal(Dense(values=torch.randn(2, 2))) == "its weights are floats"
    assert int8_refusal(low) == "a product of two factors is computed exactly"
    assert int8_refusal(Sum(terms=(book, Dense(values=torch.randn(20, 24))))) == "a sum of this form has no kernel"
    assert int8_refusal(made("codebook 2 fp16")).startswith("int8 products need a table of bytes")
    found = terms(Sum(terms=(book, low)))
    assert found is not None
    assert (found.base, found.low) == (book, low)


@pytest.mark.parametrize(
    ("form", "kind", "readers", "why"),
    [
        ("codebook 5", "matrix", ["MatMul"], "5 bits have no operator"),
        ("codebook 4", "matrix", ["MatMul"], "what multiplies it is no linear layer"),
        ("codebook 4", "matrix", ["GRU", "GRU"], "recurrent layers have no kernel"),
        ("codebook 4", "matrix", ["part MatMul"], "MatMul reads a part of it"),
        ("codebook 4", "matrix", ["Mul", "LSTM"], "Mul reads it, which has no kernel; recurrent layers have no kernel"),
        ("codebook 4", "matrix", ["Gather"], "what looks it up is no embedding"),
        ("codebook 4", "matrix", [], "nothing reads it packed"),
        ("product", "matrix", ["Gather"], "rows of a sum or a product have no kernel"),
        ("product", "matrix", ["MatMul"], "5 bits have no operator"),
        ("product", "conv", ["Conv"], "a sum or a product of weights is not convolved in int8"),
        ("codebook 4", "conv", ["Conv"], "exact convolutions have no kernel, activations: dynamic has one"),
        ("codebook 5", "conv", ["Conv"], "5 bits have no operator"),
        ("product", "conv_transpose", ["ConvTranspose", "Conv"], "transposed convolutions have no kernel"),
    ],
)
def test_reasons_of_what_is_decoded_name_its_readers(form: str, kind: str, readers: list[str], why: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if form == "product":
        left = packed(torch.randn(20, 3), "codebook 5", generator)
        weight: Weight = LowRank(left=left, right=packed(torch.randn(3, 24), "codebook 4", generator))
    else:
        weight = packed(torch.randn(20, 24), form, generator)
    shape = (20, 24) if kind == "matrix" else (20, 24, 1, 1)
    found = [Reader(op=name.removeprefix("part "), part=name.startswith("part ")) for name in readers]
    assert decoded_because(weight, Layout(kind=kind, shape=shape), found) == why  # type: ignore[arg-type]


def test_parts_and_spec_mean_the_weight() -> None:
    weight = packed(torch.randn(20, 24), "uniform 4 groups", torch.Generator().manual_seed(0))
    assert isinstance(weight, Uniform)
    spec, parts = lut_spec(weight), lut_parts(weight)
    assert spec == LutSpec(n=20, k=24, bits=4, group=5, zero=8.0)
    assert isinstance(parts, LutParts)
    product = LutLinear(parts, spec)(torch.eye(24))
    assert torch.equal(product.T, weight.dense())
