"""The attention that can be pruned: the numbers of nn.MultiheadAttention, and of one with masked heads once sliced."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from paredown.optimizer.attention import Attention
from paredown.optimizer.errors import InputError
from paredown.optimizer.graph import capture, quiet_export

WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A way to build attention and to call it."""

    bias: bool = True
    batch_first: bool = True
    dims: tuple[int | None, int | None] = (None, None)
    batched: bool = True
    inputs: str = "self"
    mask: str = ""
    padding: str = ""
    need_weights: bool = False
    average: bool = True


def built(case: Case, dropout: float = 0.0) -> nn.MultiheadAttention:
    """Return attention with gains and biases that matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kdim, vdim = case.dims
        module = nn.MultiheadAttention(
            WIDTH, HEADS, dropout, case.bias, kdim=kdim, vdim=vdim, batch_first=case.batch_first
        )
        for param in module.parameters():
            nn.init.normal_(param, std=0.5)
    return module.eval()


def arguments(case: Case) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Return the positional and the named arguments of a call."""
    generator = torch.Generator().manual_seed(1)

    def rows(time: int, width: int | None) -> Tensor:
        x = torch.randn(BATCH, time, width or WIDTH, generator=generator)
        return x[0] if not case.batched else x if case.batch_first else x.transpose(0, 1).contiguous()

    keys = QUERIES if case.inputs == "self" else KEYS
    query = rows(QUERIES, None)
    key = query if case.inputs == "self" else rows(keys, case.dims[0])
    value = key if case.inputs in ("self", "memory") else rows(keys, case.dims[1])
    named: dict[str, Any] = {"need_weights": case.need_weights, "average_attn_weights": case.average}
    count = BATCH * HEADS if case.batched else HEADS
    if case.mask:
        shape = (QUERIES, keys) if "2" in case.mask else (count, QUERIES, keys)
        named["attn_mask"] = drawn(shape, "bool" in case.mask, generator)
    if case.padding:
        named["key_padding_mask"] = drawn((BATCH, keys)[not case.batched :], case.padding == "bool", generator)
    return (query, key, value), named


def drawn(shape: tuple[int, ...], boolean: bool, generator: torch.Generator) -> Tensor:
    """Return a mask that leaves the first key of each row in sight."""
    mask = torch.randn(shape, generator=generator)
    if not boolean:
        return mask
    hidden = mask > 0.3
    hidden[..., 0] = False
    return hidden


def assert_same(got: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    assert len(got) == len(expected) == 2
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


BUILDS = [
    Case(bias=bias, batch_first=first, batched=batched, inputs=inputs)
    for bias, first, batched, inputs in itertools.product(
        (True, False), (True, False), (True, False), ("self", "memory", "three")
    )
]
BUILDS += [
    Case(dims=dims, inputs=inputs, bias=bias, batch_first=first)
    for dims, inputs in (((8, 6), "three"), ((9, 9), "memory"), ((None, 6), "three"), ((12, 9), "three"))
    for bias, first in ((True, True), (False, False))
]
CALLS = [
    Case(mask=mask, padding=padding, need_weights=need, average=average, batched=batched, inputs=inputs)
    for mask, padding, (need, average), batched, inputs in itertools.product(
        ("", "bool 2", "float 2", "bool 3", "float 3"),
        ("", "bool", "float"),
        ((False, True), (True, True), (True, False)),
        (True, False),
        ("self", "three"),
    )
]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")
@pytest.mark.parametrize("cases", [BUILDS, CALLS], ids=["builds", "calls"])
def test_the_numbers_are_those_of_the_original(cases: list[Case]) -> None:
    for case in cases:
        original = built(case)
        inputs, named = arguments(case)
        with torch.no_grad():
            assert_same(Attention.from_module(original)(*inputs, **named), original(*inputs, **named))


@pytest.mark.parametrize("padding", ["", "bool"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_hint_is_taken_as_the_original_takes_it(need_weights: bool, padding: str) -> None:
    case = Case(padding=padding, need_weights=need_weights)
    inputs, named = arguments(case)
    named["attn_mask"] = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    original = built(case)
    got = Attention.from_module(original)(*inputs, **named, is_causal=True)
    assert_same(got, original(*inputs, **named, is_causal=True))
    assert_same(got, original(*inputs, **named))


def test_positional_arguments_are_in_the_order_of_the_original() -> None:
    case = Case(mask="bool 2", padding="bool")
    (query, key, value), named = arguments(case)
    flat = (named["key_padding_mask"], True, named["attn_mask"], False)
    original = built(case)
    with torch.no_grad():
        assert_same(Attention.from_module(original)(query, key, value, *flat), original(query, key, value, *flat))


@pytest.mark.parametrize("case", [Case(), Case(bias=False), Case(dims=(8, 6))], ids=["packed", "no bias", "separate"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_parameters_are_the_same_objects_under_the_same_names(case: Case, device: str) -> None:
    original = built(case).to(device)
    ours = Attention.from_module(original)
    pairs = list(zip(original.named_parameters(), ours.named_parameters(), strict=True))
    assert pairs
    assert all(name == again and param is same for (name, param), (again, same) in pairs)
    assert ours.state_dict().keys() == original.state_dict().keys()
    assert ours.training is original.training


def test_training_drops_weights_of_the_attention_and_passes_gradients_on() -> None:
    case = Case(need_weights=True, average=False)
    inputs, named = arguments(case)
    original = built(case, dropout=0.4).train()
    ours = Attention.from_module(original)
    assert ours.training
    for need in (True, False):
        results = []
        for module in (ours, original):
            torch.manual_seed(3)
            results.append(module(*inputs, **{**named, "need_weights": need}))
        assert_same(results[0], results[1])
    weights = ours(*inputs, **named)[1]
    kept = weights[weights > 0] / built(case)(*inputs, **named)[1][weights > 0]
    assert 0.2 < float((weights == 0).float().mean()) < 0.6
    assert torch.allclose(kept, torch.full_like(kept, 1 / 0.6))
    ours(*inputs, **named)[0].square().sum().backward()
    assert all(param.grad is not None and bool(param.grad.abs().sum() > 0) for param in original.parameters())
    assert torch.equal(ours.eval()(*inputs, **named)[0], ours(*inputs, **named)[0])


def sliced(ours: Attention, heads: list[int], queries: list[int], values: list[int]) -> Attention:
    """Return a copy that keeps some heads and, of each, some channels of queries and keys and some of values."""
    size = WIDTH // HEADS
    qk = torch.tensor([h * size + c for h in heads for c in queries])
    v = torch.tensor([h * size + c for h in heads for c in values])
    made = copy.deepcopy(ours)
    made.num_heads, made.head_dim = len(heads), len(queries)
    rows = {"q_proj_weight": qk, "k_proj_weight": qk, "v_proj_weight": v}
    rows["in_proj_weight"] = rows["in_proj_bias"] = torch.cat([qk, WIDTH + qk, 2 * WIDTH + v])
    for name, keep in rows.items():
        if (old := getattr(ours, name)) is not None:
            setattr(made, name, nn.Parameter(old.detach()[keep]))
    made.out_proj.weight = nn.Parameter(ours.out_proj.weight.detach()[:, v])
    return made


def by_hand(original: nn.MultiheadAttention, x: Tensor, y: Tensor, z: Tensor, kept: dict[str, list[int]]) -> np.ndarray:
    """Return attention over some heads and channels, in numpy and loops: softmax(q k / sqrt(head_dim)) v, summed."""
    size = WIDTH // HEADS
    state = {name: value.double().numpy() for name, value in original.state_dict().items()}
    if "in_proj_weight" in state:
        parts = np.split(state["in_proj_weight"], 3)
    else:
        parts = [state[f"{part}_proj_weight"] for part in "qkv"]
    biases = np.split(state.get("in_proj_bias", np.zeros(3 * WIDTH)), 3)
    q, k, v = (a.double().numpy() @ w.T + b for a, w, b in zip((x, y, z), parts, biases, strict=True))
    out = np.zeros((len(x), QUERIES, WIDTH)) + state.get("out_proj.bias", 0.0)
    for sample, head in itertools.product(range(len(x)), kept["heads"]):
        qk = [head * size + c for c in kept["queries"]]
        scores = q[sample][:, qk] @ k[sample][:, qk].T / np.sqrt(size)
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        for c in kept["values"]:
            mixed = weights @ v[sample][:, head * size + c]
            out[sample] += np.outer(mixed, state["out_proj.weight"][:, head * size + c])
    return out


PRUNED = {
    "all": {"heads": [0, 1, 2], "queries": [0, 1, 2, 3], "values": [0, 1, 2, 3]},
    "heads": {"heads": [0, 2], "queries": [0, 1, 2, 3], "values": [0, 1, 2, 3]},
    "one head": {"heads": [1], "queries": [0, 1, 2, 3], "values": [0, 1, 2, 3]},
    "queries": {"heads": [0, 1, 2], "queries": [0, 3], "values": [0, 1, 2, 3]},
    "values": {"heads": [0, 1, 2], "queries": [0, 1, 2, 3], "values": [1]},
    "everything": {"heads": [2, 0], "queries": [1, 2, 3], "values": [0, 2]},
}
KINDS = {
    "self": Case(),
    "memory": Case(inputs="memory"),
    "three": Case(inputs="three", bias=False),
    "separate": Case(inputs="three", dims=(8, 6)),
}


@pytest.mark.parametrize("kept", PRUNED)
@pytest.mark.parametrize("kind", KINDS)
def test_slicing_leaves_the_heads_and_channels_that_are_kept(kind: str, kept: str) -> None:
    case = KINDS[kind]
    original = built(case)
    (query, key, value), _ = arguments(case)
    made = sliced(Attention.from_module(original), **PRUNED[kept])
    expected = torch.from_numpy(by_hand(original, query, key, value, PRUNED[kept]))
    with torch.no_grad():
        for need in (False, True):
            got, weights = made(query, key, value, need_weights=need)
            assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert weights.shape == (BATCH, QUERIES, key.shape[1])


class Masked(nn.Module):
    """Attention with a padding mask and its weights among the outputs, and causal attention."""

    def __init__(self, attention: nn.Module, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, weights = self.attention(x, x, x, key_padding_mask=mask, need_weights=self.need_weights)
        z, _ = self.attention(x, y, y, attn_mask=causal, is_causal=True, need_weights=False)
        return (y, z) if weights is None else (y, z, weights)


@pytest.mark.parametrize(
    ("kept", "need_weights"), [("all", False), pytest.param("everything", True, marks=pytest.mark.slow)]
)
def test_the_exported_program_and_the_onnx_file_give_the_same(kept: str, need_weights: bool) -> None:
    """Captured at one size, run at another."""
    made = Masked(sliced(Attention.from_module(built(Case())), **PRUNED[kept]), need_weights).eval()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time", min=2, max=64)
    shapes = ({0: batch, 1: time}, {0: batch, 1: time})
    inputs, others = call(3, 6), call(2, 9)
    with quiet_export():
        program = torch.export.export(made, inputs, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    file = io.BytesIO()
    exported.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    with torch.no_grad():
        expected = made(*others)
        again = program.module()(*others)
    ran = session.run(None, {name: x.numpy() for name, x in zip(names, others, strict=True)})
    assert len(expected) == len(again) == len(ran) == (3 if need_weights else 2)
    for y, same, onnx in zip(expected, again, ran, strict=True):
        assert torch.allclose(y, same, atol=1e-6)
        assert torch.allclose(y, torch.from_numpy(onnx), atol=1e-5)


def call(batch: int, time: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, time, WIDTH, generator=generator), drawn((batch, time), True, generator)


def test_every_use_of_a_weight_is_a_site() -> None:
    graph = capture(Masked(Attention.from_module(built(Case())), False), call(3, 6))
    found = [
        (site.param.removeprefix("attention."), site.first, site.count)
        for sites in graph.sites.values()
        for site in sites
    ]
    thirds = [("in_proj_weight", i * WIDTH, WIDTH) for i in range(3)]
    out = ("out_proj.weight", 0, WIDTH)
    assert found == [("in_proj_weight", 0, 3 * WIDTH), out, *thirds, out]


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_layers_of_torch_run_with_it(norm_first: bool) -> None:
    """Their fused path reads weights of the embedding's width; it is not taken, here or once heads are gone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=norm_first).eval()
        decoder = nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=norm_first).eval()
    x, padding = call(3, 6)
    with torch.no_grad():
        expected = layer(x, src_key_padding_mask=padding), decoder(x, x[:, :4])
        layer.self_attn = Attention.from_module(layer.self_attn)
        decoder.self_attn = Attention.from_module(decoder.self_attn)
        decoder.multihead_attn = Attention.from_module(decoder.multihead_attn)
        for got, wanted in zip((layer(x, src_key_padding_mask=padding), decoder(x, x[:, :4])), expected, strict=True):
            assert torch.allclose(got, wanted, atol=1e-5)
        stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        assert stack(x, src_key_padding_mask=padding).shape == x.shape


def test_what_is_refused_is_named() -> None:
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(InputError) as caught:
            Attention.from_module(nn.MultiheadAttention(WIDTH, HEADS, **{option: True}), "encoder.attention")
        assert str(caught.value) == f"encoder.attention: attention with {option}=True cannot be pruned; skip it"
    ours, (x, _) = Attention.from_module(built(Case())), call(2, 5)
    with pytest.raises(InputError) as caught:
        ours(x, x, x, is_causal=True)
    assert str(caught.value) == ("is_causal=True without attn_mask; give the causal mask too, as nn.MultiheadAttention")
    with pytest.raises(InputError) as caught:
        ours(x, x, x, attn_mask=torch.zeros(8, 5, 5))
    assert str(caught.value) == (
        "attn_mask has 8 matrices for a batch of 2 and 3 heads; "
        "give one for each sample and head that is left, or one (queries, keys) for all"
    )
    with pytest.raises(InputError) as caught:
        ours(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.int64))
    assert str(caught.value) == "key_padding_mask has dtype int64; use bool or a float"
    with pytest.raises(TypeError, match="is_casual"):
        ours(x, x, x, is_casual=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, WIDTH), torch.zeros(3, WIDTH)])
    with pytest.raises(InputError) as caught:
        Attention.from_module(built(Case()))(nested, nested, nested)
    assert str(caught.value) == (
        "attention cannot read nested tensors; build nn.TransformerEncoder with enable_nested_tensor=False"
    )


def test_copies_share_nothing() -> None:
    ours = Attention.from_module(built(Case()))
    again = copy.deepcopy(ours)
    with torch.no_grad():
        for param in again.parameters():
            param.zero_()
    assert all(bool(param.abs().sum() > 0) for param in ours.parameters())
