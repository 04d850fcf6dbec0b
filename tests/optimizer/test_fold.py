"""Folded normalizations: the same network, and only where nothing else sees what is between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.optimizer import fold, store, surgery
from paredown.optimizer.errors import InputError
from paredown.optimizer.fold import Fold
from paredown.optimizer.graph import capture
from paredown.optimizer.model import Model, Source, from_module

from ..zoo.nets import NORMALIZED
from ..zoo.traced import case

FOLDS = {
    "residual": "stem+norm blocks.0.conv1+blocks.0.bn1 blocks.0.conv2+blocks.0.bn2 "
    "blocks.1.conv1+blocks.1.bn1 blocks.1.conv2+blocks.1.bn2",
    "separable": "0+1 3.0+3.1 3.3+3.4 4.0+4.1 4.3+4.4",
    "waves": "encode+norm head+head_norm",
    "encoder_decoder": "down1+norm1 down2+norm2 up+norm3",
    "squeeze_excite": "conv+norm",
    "grouped": "first+norm",
    "detector": "stem+stem_norm deeper+deeper_norm",
}


def run(module: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(module(*batch))  # type: ignore[no-any-return]


def seeded(make: Callable[[], nn.Module]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
                nn.init.normal_(part.running_mean)
                nn.init.uniform_(part.running_var, 0.3, 3.0)  # type: ignore[arg-type]
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
        return from_module(module, (), Source(entry="net.py:net"))


def folded(model: Model, x: Tensor) -> tuple[Model, tuple[Fold, ...]]:
    folds = fold.plan(model, capture(model.module(), (x,)))
    return fold.apply(model, folds), folds


@pytest.mark.parametrize("name", NORMALIZED)
def test_a_folded_network_is_the_same_network(name: str, tmp_path: Path) -> None:
    net = case(name)
    folds = fold.plan(net.model, net.traced.graph)
    assert " ".join(f"{f.into}+{f.norm}" for f in folds) == FOLDS[name]
    model = fold.apply(net.model, folds)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.module().modules())
    store.save(model, tmp_path)
    loaded = store.load(tmp_path)
    assert loaded.edits == model.edits
    for batch in net.batches:
        before, after, again = (run(m, batch) for m in (net.module, model.module(), loaded.module()))
        for one, other, third in zip(before, after, again, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
            assert torch.equal(other, third)


@pytest.mark.parametrize("name", NORMALIZED)
def test_folding_leaves_the_model_and_its_skeleton_alone(name: str) -> None:
    net = case(name)
    before = {key: value.clone() for key, value in net.model.values().items()}
    names = [path for path, _ in net.model.skeleton.named_modules()]
    model = fold.apply(net.model, fold.plan(net.model, net.traced.graph))
    assert all(torch.equal(net.model.values()[key], value) for key, value in before.items())
    assert [path for path, _ in net.model.skeleton.named_modules()] == names
    assert {param for param, _ in model.skeleton.named_parameters()} == set(model.weights) | (
        set(model.tensors) & {param for param, _ in model.skeleton.named_parameters()}
    )


class Chain(nn.Module):
    """A layer and a normalization, joined in a way that the subclass tells."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3)
        self.other, self.other_norm = nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3)


class Branch(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.norm(y) + y
        return out


class Output(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), y


class SharedLayer(Chain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.other_norm(self.conv(2 * x))
        return out


class SharedNorm(Chain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.norm(self.other(x))
        return out


class SharedNormTwoNames(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.other_norm = self.norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.other_norm(self.other(x))
        return out


class SharedGain(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.other_norm.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.other_norm(self.other(x))
        return out


class SharedBias(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.other.bias = self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.other_norm(self.other(x))
        return out


class SharedWeight(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)) + self.other_norm(self.other(x))
        return out


class Activated(Chain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(torch.relu(self.conv(x)))
        return out


class Before(Chain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(self.conv(x))[:, :2])
        return out


class Untracked(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class Sequence(nn.Module):
    """A linear layer on sequences: its normalization counts positions as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(7, 5), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(x).flatten(2)[..., 0])
        return out


UNFOLDED = (
    Branch,
    Output,
    SharedLayer,
    SharedNorm,
    SharedNormTwoNames,
    SharedGain,
    SharedBias,
    SharedWeight,
    Activated,
    Before,
    Untracked,
    Sequence,
)


@pytest.mark.parametrize("make", UNFOLDED)
def test_what_others_use_is_not_folded(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    model = seeded(make)
    before = run(model.module(), (x,))
    changed, folds = folded(model, x)
    assert folds == ()
    assert all(torch.equal(one, other) for one, other in zip(before, run(changed.module(), (x,)), strict=True))


class Plain(Chain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.norm(self.conv(x)))
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_and_without_a_bias(bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = seeded(lambda: Plain(bias).to(dtype))
    changed, folds = folded(model, x)
    assert folds == (Fold(into="conv", norm="norm"),)
    module: Any = changed.module()
    assert (module.conv.weight.dtype, module.conv.bias.dtype) == (dtype, dtype)
    values = model.values()
    gain = values["norm.weight"].double() / (values["norm.running_var"].double() + 1e-5).sqrt()
    old = values["conv.bias"].double() if bias else 0.0
    wanted = (old - values["norm.running_mean"].double()) * gain + values["norm.bias"].double()
    assert torch.equal(module.conv.bias, wanted.to(dtype))
    assert torch.equal(module.conv.weight, (values["conv.weight"].double() * gain[:, None, None, None]).to(dtype))


def test_an_unknown_edit_or_module_is_an_error() -> None:
    skeleton = seeded(Plain).skeleton
    with pytest.raises(InputError) as caught:
        surgery.apply(skeleton, [{"edit": "split"}])
    assert str(caught.value) == 'unknown edit "split"; use the version of paredown that wrote it'
    with pytest.raises(InputError) as caught:
        surgery.apply(skeleton, [surgery.fold_norm("conf", "norm")])
    assert str(caught.value) == 'there is no module "conf"; did you mean "conv"?'
