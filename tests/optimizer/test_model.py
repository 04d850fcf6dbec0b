"""The value of a network: nothing lost, nothing untied, nothing shared with what runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.optimizer import model as models
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.graph import quiet_export
from paredown.optimizer.model import InputSpec, Model, Source, from_module, from_tensors, module_at, skeleton_of
from paredown.optimizer.weight import Dense, Layout

from ..zoo.nets import ZOO

SOURCE = Source(entry="net.py:net")
each = pytest.mark.parametrize("name", ZOO)


def of(module: nn.Module) -> Model:
    return from_module(module, (InputSpec(name="x", shape=("batch", 4)),), SOURCE)


def run(module: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the flat outputs of a module, its attention on the path that the exporter sees."""
    with torch.no_grad(), quiet_export():
        return pytree.tree_leaves(module(*batch))  # type: ignore[no-any-return]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    pairs = zip(one, other, strict=len(one) == len(other))
    return len(one) == len(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def snapshot(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.values().items()}


@each
def test_the_module_is_the_original_bit_for_bit(name: str) -> None:
    net = ZOO[name]
    original, batch = net.build(), net.batch(3)
    model = from_module(original, net.inputs, net.source())
    assert equal(run(model.module(), batch), run(original, batch))
    assert model.parameters() == sum(p.numel() for p in original.parameters())
    state = {id(t): t for t in original.state_dict(keep_vars=True).values()}
    assert model.size_bytes() == sum(t.numel() * t.element_size() for t in state.values())
    assert set(model.weights) == {n for n, p in original.named_parameters() if p.ndim > 1}


@each
def test_changed_weights_are_what_the_module_computes_with(name: str) -> None:
    """Also where a module keeps its own list of parameters, as nn.GRU and nn.LSTM do."""
    net = ZOO[name]
    original, batch = net.build(), net.batch(3)
    model = from_module(original, net.inputs, net.source())
    changed = model.with_weights({n: Dense(values=w.dense() * 0.5 + 0.01) for n, w in model.weights.items()})
    with torch.no_grad():
        for param in original.parameters():
            if param.ndim > 1:
                param.mul_(0.5).add_(0.01)
    assert equal(run(changed.module(), batch), run(original, batch))
    assert not equal(run(changed.module(), batch), run(model.module(), batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["encoder_decoder", "cross_attention", "llama", "gru"])
def test_half_modules_stay_half(name: str, dtype: torch.dtype) -> None:
    net = ZOO[name]
    original = net.build().to(dtype)
    batch = tuple(x.to(dtype) if x.is_floating_point() else x for x in net.batch(2))
    model = from_module(original, net.inputs, net.source())
    assert equal(run(model.module(), batch), run(original, batch))
    assert {p.dtype for p in model.module().parameters()} == {dtype}
    assert {w.dense().dtype for w in model.weights.values()} == {dtype}


class Buffers(nn.Module):
    """A buffer that is saved, one that is not, and a tensor that is neither buffer nor parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: Tensor
        self.cache: Tensor
        self.register_buffer("saved", torch.tensor([1.0, 2.0]))
        self.register_buffer("cache", torch.tensor([3.0, 4.0]), persistent=False)
        self.plain = torch.tensor([5.0, 6.0])
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.saved + self.cache * self.plain
        return y


def test_buffers_and_plain_tensors_are_kept() -> None:
    original = seeded(Buffers)
    model = of(original)
    module: Any = model.module()
    assert (module.saved.tolist(), module.cache.tolist(), module.plain.tolist()) == ([1, 2], [3, 4], [5, 6])
    assert set(model.tensors) == {"saved", "linear.bias"}
    assert equal(run(module, (torch.ones(2, 4),)), run(original, (torch.ones(2, 4),)))
    changed = model.with_tensors({"saved": torch.zeros(2), "cache": torch.ones(2)})
    assert torch.equal(run(changed.module(), (torch.ones(2, 4),))[0], torch.tensor([[5.0, 6.0], [5.0, 6.0]]))
    module.cache.zero_()
    assert model.values()["cache"].tolist() == [3, 4]


class Tied(nn.Module):
    """A weight under three names, a buffer under two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.third = self.first
        self.one: Tensor
        self.two: Tensor
        self.register_buffer("one", torch.ones(4))
        self.register_buffer("two", self.one)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(self.first(x) * self.one) * self.two)
        return y


def test_tied_weights_stay_tied_and_count_once() -> None:
    original = seeded(Tied)
    model = of(original)
    assert model.aliases() == {
        "second.weight": "first.weight",
        "third.weight": "first.weight",
        "third.bias": "first.bias",
        "two": "one",
    }
    assert model.parameters() == 4 * 4 + 4
    assert model.size_bytes() == 4 * (4 * 4 + 4 + 4)
    module: Any = model.module()
    assert module.first.weight is module.second.weight
    assert module.first.weight is module.third.weight
    assert equal(run(module, (torch.ones(2, 4),)), run(original, (torch.ones(2, 4),)))
    changed: Any = model.with_tensors({"one": torch.full((4,), 2.0)}).module()
    assert changed.two is changed.one
    assert changed.two.tolist() == [2.0] * 4


def test_llama_embeddings_are_tied_and_its_rotary_cache_is_real() -> None:
    model = ZOO["llama"].model()
    assert model.aliases() == {"lm_head.weight": "embed_tokens.weight"}
    module: Any = model.module()
    assert module.lm_head.weight is module.embed_tokens.weight
    assert "cos" not in model.tensors
    assert torch.equal(module.cos, ZOO["llama"].build().cos)


def test_training_changes_neither_the_value_nor_another_module() -> None:
    net = ZOO["residual"]
    model = net.model()
    before, batch = snapshot(model), net.batch(4)
    trained, other = model.module(), model.module()
    outputs = run(other, batch)
    trained.train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        trained(*batch).square().sum().backward()
        optimizer.step()
    assert not torch.equal(trained.norm.running_mean, other.norm.running_mean)  # type: ignore[arg-type,union-attr]
    assert not torch.equal(trained.stem.weight, other.stem.weight)  # type: ignore[arg-type,union-attr]
    assert all(torch.equal(model.values()[name], value) for name, value in before.items())
    assert equal(run(other, batch), outputs)
    assert equal(run(model.module(), batch), outputs)


def test_the_original_is_left_as_it_was() -> None:
    original = ZOO["residual"].build().train()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    of(original).module()
    assert original.training
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert not any(value.is_meta for value in original.state_dict().values())


def test_frozen_parameters_stay_frozen() -> None:
    original = nn.Linear(4, 2)
    original.weight.requires_grad_(False)
    module = of(original).module()
    assert {name: p.requires_grad for name, p in module.named_parameters()} == {"weight": False, "bias": True}


def test_a_skeleton_holds_no_parameter() -> None:
    skeleton = skeleton_of(ZOO["vision"].build())
    assert all(p.is_meta for p in skeleton.parameters())
    assert not any(b.is_meta for b in skeleton.buffers())
    assert not skeleton.training


class Hidden(nn.Module):
    """A parameter that PyTorch does not see, in a place that the module computes with."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shown = nn.Parameter(torch.ones(2, 4))
        self.held = wrap(self.shown)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.held[0])


@pytest.mark.parametrize("wrap", [lambda p: [p], lambda p: {0: p}, lambda p: (p,)], ids=["list", "dict", "tuple"])
def test_a_forgotten_meta_parameter_is_an_error(wrap: Callable[[Tensor], Any]) -> None:
    with pytest.raises(InputError) as caught:
        of(Hidden(wrap)).module()
    assert str(caught.value) == 'tensor "held" is still on the meta device; register it as a buffer'


def test_a_missing_or_wrong_value_is_an_error() -> None:
    skeleton = skeleton_of(nn.Linear(4, 2))
    values = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    with pytest.raises(InputError) as caught:
        models.fill(skeleton_of(nn.Linear(4, 2)), {"weight": torch.ones(2, 4)})
    assert str(caught.value) == 'parameter "bias" has no value; the module would run on meta tensors'
    with pytest.raises(InputError) as caught:
        from_tensors(skeleton, {**values, "bias": torch.ones(3)}, (), SOURCE).module()
    assert str(caught.value) == '"bias" has shape (3,), the architecture wants (2,)'
    buffers = skeleton_of(nn.BatchNorm1d(2))
    filled = {"weight": torch.ones(2), "bias": torch.ones(2), "running_mean": torch.ones(3)}
    with pytest.raises(InputError) as caught:
        models.fill(buffers, filled)
    assert str(caught.value) == '"running_mean" has shape (3,), the architecture wants (2,)'


def test_a_meta_attribute_is_an_error() -> None:
    original = nn.Linear(4, 2)
    original.table = torch.ones(2, device="meta")
    with pytest.raises(InputError) as caught:
        of(original).module()
    assert str(caught.value) == 'tensor "table" is still on the meta device; register it as a buffer'


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_network_that_cannot_be_copied_is_an_error() -> None:
    original = torch.nn.utils.weight_norm(nn.Linear(4, 2))
    original(torch.ones(1, 4))
    with pytest.raises(InputError, match=r"the network cannot be copied: .*remove_weight_norm"):
        of(original)


def test_models_are_values() -> None:
    model = ZOO["residual"].model()
    with pytest.raises(TypeError):
        model.weights["head.weight"] = Dense(values=torch.ones(1, 1))  # type: ignore[index]
    with pytest.raises(TypeError):
        del model.tensors["head.bias"]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        model.edits = ()  # type: ignore[misc]
    mapping = dict(model.weights)
    copy = Model(
        skeleton=model.skeleton,
        weights=mapping,
        layouts=model.layouts,
        tensors=model.tensors,
        inputs=model.inputs,
        source=model.source,
    )
    mapping.clear()
    assert set(copy.weights) == set(model.weights)


def test_a_changed_model_shares_what_it_does_not_touch() -> None:
    model = ZOO["residual"].model()
    changed = model.with_weights({"head.weight": Dense(values=torch.zeros(5, 10))})
    assert changed.skeleton is model.skeleton
    assert all(changed.tensors[name] is tensor for name, tensor in model.tensors.items())
    assert [n for n, w in changed.weights.items() if w is not model.weights[n]] == ["head.weight"]
    assert float(model.weights["head.weight"].dense().abs().sum()) > 0


LAYOUTS = {
    "up.weight": Layout(kind="conv_transpose", shape=(8, 6, 3, 3)),
    "grouped_up.weight": Layout(kind="conv_transpose", shape=(12, 2, 2, 2), groups=2),
    "out.weight": Layout(kind="conv", shape=(2, 4, 1, 1)),
}


def test_layouts_follow_the_module() -> None:
    assert {name: ZOO["encoder_decoder"].model().layouts[name] for name in LAYOUTS} == LAYOUTS
    packed = ZOO["vision"].model().layouts["blocks.0.attention.in_proj_weight"]
    assert packed == Layout(kind="matrix", shape=(24, 8))
    depthwise = ZOO["separable"].model().layouts["3.0.weight"]
    assert depthwise == Layout(kind="conv", shape=(8, 1, 3, 3), groups=8)


def test_inputs_have_named_sizes() -> None:
    spec = InputSpec(name="image", shape=("batch", 3, "side", "side"))
    example = spec.example({"batch": 2, "side": 5}, torch.Generator().manual_seed(0))
    assert tuple(example.shape) == (2, 3, 5, 5)
    assert spec.sizes(example) == {"batch": 2, "side": 5}
    for shape in ((2, 3, 5), (2, 4, 5, 5)):
        with pytest.raises(InputError) as caught:
            spec.sizes(torch.zeros(shape))
        assert str(caught.value) == f"input \"image\": shape {shape} does not fit ['batch', 3, 'side', 'side']"
    with pytest.raises(InputError, match="does not fit"):
        spec.sizes(torch.zeros(2, 3, 5, 6))


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        (("batch", 0), "float32", 'input "x" has dimension 0; use positive sizes or names'),
        (("batch", 2), "float33", 'input "x" has unknown dtype "float33"; use float32, int64, ...'),
    ],
)
def test_bad_inputs_are_named(shape: tuple[int | str, ...], dtype: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        InputSpec(name="x", shape=shape, dtype=dtype)
    assert str(caught.value) == text


def test_examples_are_seeded() -> None:
    model = ZOO["bert"].model()
    tokens, mask = model.examples(3, seed=5)
    assert (tuple(tokens.shape), tokens.dtype, tuple(mask.shape)) == ((3, 8), torch.int64, (3, 8))
    assert equal(list(model.examples(3, seed=5)), [tokens, mask])
    assert not equal(list(model.examples(3, seed=6)), [tokens, mask])


def test_a_missing_module_is_named_with_its_neighbour() -> None:
    with pytest.raises(InputError) as caught:
        module_at(ZOO["residual"].build(), "steem")
    assert str(caught.value) == 'there is no module "steem"; did you mean "stem"?'
