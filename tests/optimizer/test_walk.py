"""The lockstep walk: what the module computes, every site once, replaced weights onward, nothing kept alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paredown.optimizer import walk as walks
from paredown.optimizer.errors import InputError
from paredown.optimizer.graph import Site, quiet_export
from paredown.optimizer.model import Model, Source, from_module
from paredown.optimizer.walk import Reader, Visitor, trace, walk
from paredown.optimizer.weight import Dense

from ..zoo.nets import ZOO
from ..zoo.traced import case

each = pytest.mark.parametrize("name", ZOO)


def run(module: nn.Module, batch: tuple[Tensor, ...]) -> list[object]:
    with torch.no_grad(), quiet_export():
        return pytree.tree_leaves(module(*batch))


def seeded(make: Callable[[], nn.Module]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return from_module(make().eval(), (), Source(entry="net.py:net"))


def assert_equal(walked: Sequence[tuple[object, ...]], expected: Sequence[list[object]]) -> None:
    assert len(walked) == len(expected)
    for outputs, wanted in zip(walked, expected, strict=True):
        assert len(outputs) == len(wanted)
        for one, other in zip(outputs, wanted, strict=True):
            assert isinstance(one, Tensor)
            assert isinstance(other, Tensor)
            assert one.dtype == other.dtype
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)  # kernels round by how memory is aligned


@each
def test_a_walk_gives_the_outputs_of_the_module(name: str) -> None:
    net = case(name)
    expected = [run(net.module, batch) for batch in net.batches]
    assert_equal(walk(net.traced, net.model.values()), expected)
    assert net.traced.samples == 6


@each
def test_every_site_is_visited_once_and_sees_every_batch(name: str) -> None:
    traced = case(name).traced
    seen: list[Site] = []

    def before(site: Site, reader: Reader) -> None:
        inputs = [x.shape for x in reader.inputs()]
        assert inputs == [x.shape for x in reader.inputs()]
        assert len(inputs) == 3
        seen.append(site)

    walk(traced, case(name).model.values(), Visitor(before=before))
    expected = [site for node in traced.graph.nodes for site in traced.graph.sites.get(node.name, ())]
    assert sorted(seen, key=repr) == sorted(expected, key=repr)


@each
def test_replaced_weights_feed_what_follows(name: str) -> None:
    net, model = case(name), case(name).model
    values = model.values()
    before_walk = {key: value.clone() for key, value in values.items()}
    halved = model.with_weights({key: Dense(values=weight.dense() / 2) for key, weight in model.weights.items()})
    used = {line.split()[0] for line in net.net.sites.splitlines() if line}
    halved = model.with_weights({key: halved.weights[key] for key in used})
    module = halved.module()
    outputs = walk(net.traced, values, Visitor(before=lambda site, reader: before_walk[site.param] / 2))
    assert_equal(outputs, [run(module, batch) for batch in net.batches])
    assert all(torch.equal(values[key], value) for key, value in before_walk.items())


def test_a_replaced_weight_is_seen_by_the_next_layer_only() -> None:
    net = ZOO["waves"]
    model, batches = net.model(), net.batches(3, 2)
    inputs: dict[str, list[Tensor]] = {}

    def before(site: Site, reader: Reader) -> Tensor | None:
        inputs[site.param] = [x.clone() for x in reader.inputs()]
        return torch.zeros(site.layout.shape) if site.param == "context.weight" else None

    walk(trace(model.module(), batches), model.values(), Visitor(before=before))
    module = model.module()
    for (wave,), context, head in zip(batches, inputs["context.weight"], inputs["head.weight"], strict=True):
        with torch.no_grad():
            x = torch.relu(module.norm(module.encode(wave)))  # type: ignore[operator]
            bias = module.context.bias  # type: ignore[union-attr]
            assert torch.equal(context, x)
            assert torch.equal(head, (x + torch.tanh(bias[:, None])).amax(2))  # type: ignore[index]


def test_outputs_may_be_replaced() -> None:
    net = ZOO["waves"]
    model, batches = net.model(), net.batches(2, 1)

    def after(site: Site, node: fx.Node, outputs: Sequence[Tensor]) -> list[Tensor] | None:
        return [torch.ones_like(y) for y in outputs] if site.param == "head.weight" else None

    walked = walk(trace(model.module(), batches), model.values(), Visitor(after=after))
    norm = model.module().head_norm
    with torch.no_grad():
        assert_equal(walked, [[norm(torch.ones(size, 6))] for size in (2, 1)])  # type: ignore[operator]


class InPlace(nn.Module):
    """Writes into its input, a buffer, and a constant through a view."""

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
        y = self.linear(x) * mask
        y[:, 0] = self.calls
        return y


def test_writing_in_place_changes_neither_data_nor_values() -> None:
    model = seeded(InPlace)
    batches = [(torch.randn(3, 4, generator=torch.Generator().manual_seed(i)),) for i in range(2)]
    kept, values = [batch[0].clone() for batch in batches], model.values()
    traced = trace(model.module(), [(x.clone(),) for x in kept])
    first = walk(walks.Traced(graphs=traced.graphs, batches=tuple(batches)), values)
    again = walk(walks.Traced(graphs=traced.graphs, batches=tuple(batches)), values)
    expected = [run(model.module(), (x.clone(),)) for x in kept]
    assert_equal(first, expected)
    assert_equal(again, expected)
    assert all(torch.equal(batch[0], x) for batch, x in zip(batches, kept, strict=True))
    assert float(values["calls"]) == 0.0


class Constants(nn.Module):
    """A layer whose input is made of parameters alone, and one that is fed a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, 4))
        self.inner, self.table = nn.Linear(4, 4), nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.start)).sum(0) + self.table(torch.arange(x.shape[1])).sum(0)


def test_weights_that_no_input_reaches_are_visited_and_replaced() -> None:
    model = seeded(Constants)
    x = torch.ones(3, 4)
    rows: dict[str, list[tuple[int, ...]]] = {}

    def before(site: Site, reader: Reader) -> Tensor:
        rows[site.param] = [tuple(value.shape) for value in reader.inputs()]
        return torch.zeros(site.layout.shape)

    (walked,) = walk(trace(model.module(), [(x,)]), model.values(), Visitor(before=before))
    assert rows == {"inner.weight": [(2, 4)], "table.weight": [(4,)]}
    expected = x + 2 * torch.tanh(model.tensors["inner.bias"])
    assert torch.allclose(walked[0], expected, atol=1e-6)


def test_activations_are_freed_after_their_last_use() -> None:
    model = seeded(lambda: nn.Sequential(*(part for _ in range(24) for part in (nn.Linear(32, 32), nn.Tanh()))))
    batches = [(torch.randn(8, 32),), (torch.randn(8, 32),)]
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def after(site: Site, node: fx.Node, outputs: Sequence[Tensor]) -> None:
        nonlocal most
        made.extend(weakref.ref(y) for y in outputs)
        most = max(most, sum(ref() is not None for ref in made))

    walk(trace(model.module(), batches), model.values(), Visitor(after=after))
    assert len(made) == 48
    assert most <= 4


def test_a_skip_connection_lives_as_long_as_it_is_needed() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            kept = x = self.layers[0](x)
            for layer in self.layers[1:]:
                x = torch.relu(layer(x))
            return torch.relu(x + kept)

    model = seeded(Skip)
    batch = (torch.randn(2, 4),)
    alive: list[list[int]] = []
    made: list[weakref.ref[Tensor]] = []

    def after(site: Site, node: fx.Node, outputs: Sequence[Tensor]) -> None:
        made.append(weakref.ref(outputs[0]))
        alive.append([i for i, ref in enumerate(made) if ref() is not None])

    walked = walk(trace(model.module(), [batch]), model.values(), Visitor(after=after))
    assert_equal(walked, [run(model.module(), batch)])
    assert alive == [[0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]


@pytest.mark.parametrize("shape", [(7, 3, 6, 5), (3, 6, 5)], ids=["batch", "no batch"])
def test_rows_come_in_pieces_that_make_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pieces: list[list[Tensor]] = []

    def before(site: Site, reader: Reader) -> None:
        pieces.append([rows.clone() for rows in reader.rows()])

    traced = trace(model.module(), [(x,)])
    for limit in (2**30, 4000):
        monkeypatch.setattr(walks, "CHUNK_BYTES", limit)
        walk(traced, model.values(), Visitor(before=before))
    assert len(pieces[0]) == 1
    assert len(pieces[1]) == (7 if len(shape) == 4 else 1)
    assert torch.equal(torch.cat(pieces[1], dim=1), pieces[0][0])
    columns = F.unfold(x if len(shape) == 4 else x[None], 3, padding=1).transpose(1, 2).reshape(1, -1, 27)
    assert torch.equal(pieces[0][0], columns)


def test_shapes_that_use_different_weights_are_an_error() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if len(x) > 2 else self.b(x)

    with pytest.raises(InputError) as caught:
        trace(Branch(), [(torch.ones(3, 2),), (torch.ones(2, 2),)])
    assert str(caught.value) == (
        "calibration batches of different shapes use different weights; give batches of one shape"
    )


def test_each_shape_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = ZOO["waves"]
    captured: list[torch.Size] = []
    capture = walks.capture
    monkeypatch.setattr(walks, "capture", lambda module, x: (captured.append(x[0].shape), capture(module, x))[1])
    trace(net.build(), net.batches(3, 2, 3, 2))
    assert [shape[0] for shape in captured] == [3, 2]
