"""The captured graph: which operators multiply which rows of which parameter."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.optimizer.errors import ExportError
from paredown.optimizer.graph import Graph, Site, argument, capture, quiet_export
from paredown.optimizer.model import InputSpec, Source, from_module

from ..zoo.nets import ZOO
from ..zoo.traced import case

KINDS = {"matrix_t": "_t"}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def sites(graph: Graph) -> list[Site]:
    return [site for node in graph.nodes for site in graph.sites.get(node.name, ())]


def listed(graph: Graph) -> list[str]:
    return [f"{s.param} {s.kind}{KINDS.get(s.layout.kind, '')} {s.first}:{s.first + s.count}" for s in sites(graph)]


@pytest.mark.parametrize("name", ZOO)
def test_every_use_of_a_weight_is_a_site(name: str) -> None:
    net, graph = ZOO[name], case(name).traced.graph
    assert listed(graph) == [line for line in net.sites.splitlines() if line]
    shapes = {name: tuple(p.shape) for name, p in net.build().named_parameters()}
    assert all(site.layout.shape == shapes[site.param] for site in sites(graph))


@pytest.mark.parametrize("name", ZOO)
def test_no_weight_of_the_zoo_is_missed(name: str) -> None:
    """Raw parameters that are added or concatenated are the only ones that nothing multiplies."""
    missed = set(case(name).model.weights) - set(case(name).traced.graph.of_param())
    assert missed == {"vision": {"token", "positions"}, "lstm": {"start"}}.get(name, set())


def test_sites_name_their_module_and_operand() -> None:
    net = ZOO["detector"]
    found = sites(capture(net.build(), net.batch(1)))
    assert [site.module for site in found] == ["stem", "deeper", "head", "head", "score"]
    raw = sites(capture(ZOO["raw"].build(), ZOO["raw"].batch(1)))
    assert [(site.module, site.operand) for site in raw][:2] == [("expand", 1), ("", 0)]


class Twins(nn.Module):
    """One layer registered under two names, and called by the second first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.norm(self.b(x)))
        return y


def test_a_layer_with_two_names_has_one() -> None:
    graph = capture(seeded(Twins), (torch.ones(2, 4),))
    assert listed(graph) == ["a.weight linear 0:4"] * 2
    assert set(graph.of_param()) == {"a.weight"}
    assert len(graph.of_param()["a.weight"]) == 2


class Sliced(nn.Module):
    """Rows of one parameter taken apart by slices, chunks and narrow; a slice of columns is no run of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 4))
        self.square = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second = self.w.chunk(2)
        return (
            F.linear(x, first),
            F.linear(x, second),
            F.linear(x, self.w[2:5]),
            F.linear(x, self.w.narrow(0, 8, 4)),
            x @ self.w[3:7].T,
            F.linear(x[:, :2], self.w[:, :2]),
            x @ self.square,
            F.linear(x, self.square.T),
            F.linear(x, self.square.T.contiguous().t()),
            F.linear(x, self.w[::2]),
        )


def test_runs_of_rows_are_found_through_views() -> None:
    graph = capture(seeded(Sliced), (torch.ones(2, 4),))
    assert listed(graph) == [
        "w linear 0:6",
        "w linear 6:12",
        "w linear 2:5",
        "w linear 8:12",
        "w linear 3:7",
        "square linear_t 0:4",
        "square linear_t 0:4",
        "square linear 0:4",
    ]


def test_convolutions_of_raw_parameters_have_their_layout() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(torch.randn(6, 2, 3))
            self.up = nn.Parameter(torch.randn(6, 1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose1d(F.conv1d(x, self.down, groups=2), self.up, groups=3)

    found = sites(capture(seeded(Net), (torch.ones(2, 4, 9),)))
    assert [(s.kind, s.layout.kind, s.layout.groups, s.count) for s in found] == [
        ("conv", "conv", 2, 6),
        ("conv_transpose", "conv_transpose", 3, 3),
    ]


def test_the_projection_of_an_lstm_is_no_site() -> None:
    """What W_hr multiplies lies within the operator, so nothing could calibrate it."""
    graph = capture(seeded(lambda: nn.LSTM(4, 6, num_layers=2, proj_size=3)), (torch.ones(3, 2, 4),))
    assert [site.param for site in sites(graph)] == ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]


class Counting(nn.Module):
    """Changes a buffer, its input, and a constant through a view."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        x.mul_(2.0)
        mask = torch.zeros(4)
        mask[1:3] = 1.0
        y: Tensor = self.linear(x) * mask
        return y


def test_writing_in_place_leaves_only_the_callers_outputs() -> None:
    graph = capture(seeded(Counting), (torch.ones(2, 4),))
    assert len(graph.outputs) == 1
    assert listed(graph) == ["linear.weight linear 0:4"]
    assert not any(node.target._schema.is_mutable for node in graph.nodes if hasattr(node.target, "_schema"))


def test_an_activation_in_place_keeps_the_graph() -> None:
    net = ZOO["separable"]
    targets = [str(node.target) for node in capture(net.build(), net.batch(1)).nodes]
    assert "aten.batch_norm.default" in targets
    assert any(target.startswith("aten.hardtanh_") for target in targets)


def test_outputs_of_any_structure_are_flat() -> None:
    net = ZOO["detector"]
    graph = capture(net.build(), net.batch(1))
    assert len(graph.outputs) == 3
    assert all(node is not None for node in graph.outputs)

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int, None]:
            return x + 1, 3, None

    assert [node is None for node in capture(Constant(), (torch.ones(1),)).outputs] == [False, True, True]


def test_what_cannot_be_captured_says_why() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError) as caught:
        capture(Branch(), (torch.ones(2),))
    text = str(caught.value)
    assert text.startswith("the network cannot be captured: ")
    assert text.endswith(
        "; torch.export must accept it: no Python branches on tensor values, inputs as the recipe says"
    )
    assert "\n" not in text
    with pytest.raises(ExportError, match=r"^the network cannot be captured: "):
        capture(nn.Linear(4, 2), (torch.ones(1, 5),))


def test_arguments_are_read_by_name() -> None:
    net = ZOO["encoder_decoder"]
    graph = capture(net.build(), net.batch(1))
    nodes = {node.name: node for node in graph.nodes}
    up, grouped = (nodes[site.node] for site in sites(graph) if site.kind == "conv_transpose")
    assert argument(up, "output_padding") == [1, 1]
    assert argument(up, "groups", 1) == 1
    assert argument(grouped, "groups", 1) == 2
    assert argument(grouped, "bias") is None


def test_capturing_is_quiet_and_leaves_settings_alone() -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    net = ZOO["gru"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(net.build(), net.batch(1))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    with pytest.raises(RuntimeError), quiet_export():
        raise RuntimeError
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_model_with_folded_names_is_captured_by_canonical_names() -> None:
    model = from_module(seeded(Twins), (InputSpec(name="x", shape=("batch", 4)),), Source(entry="x.py:y"))
    graph = capture(model.module(), (torch.ones(2, 4),))
    assert set(graph.values.values()) <= set(model.values())
