"""Statistics of every site against what forward hooks see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.optimizer.errors import InputError
from paredown.optimizer.model import Source, from_module
from paredown.optimizer.stats import LayerStats, Stats, collect
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Layout

from ..zoo.nets import ZOO, in_turn
from ..zoo.traced import case
from ..zoo.watched import raw_expected, watched

BOTH = frozenset({"gram", "mean"})


def by_row(stats: LayerStats, layout: Layout) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (row, gram, mean) for each row of a weight."""
    count = len(layout.to_matrix(torch.empty(layout.shape)))
    assert stats.gram is not None
    assert stats.mean is not None
    assert (stats.gram.dtype, stats.mean.dtype) == (torch.float64, torch.float64)
    assert count % len(stats.gram) == 0
    for row in range(count):
        group = row * len(stats.gram) // count
        yield row, stats.gram[group], stats.mean[group]


@pytest.mark.parametrize("name", in_turn(ZOO, 2))
def test_grams_and_means_are_those_of_the_inputs(name: str) -> None:
    net = case(name)
    expected = raw_expected(net.module, net.batches) if name == "raw" else watched(net.module, net.batches)
    wanted = set(expected.parts) | set(expected.counts)
    stats = collect(net.traced, net.model.values(), BOTH, wanted)
    used = {line.split()[0] for line in net.net.sites.splitlines() if line} - {"both_ways"}
    assert set(stats) == wanted == used
    layouts = {param: sites[0].layout for param, sites in net.traced.graph.of_param().items()}
    for param in expected.parts:
        most = 0
        for row, gram, mean in by_row(stats[param], layouts[param]):
            x = expected.of_row(param, row)
            assert torch.allclose(gram, x.T @ x, rtol=1e-4, atol=1e-5 * float((x.T @ x).abs().max()))
            assert torch.allclose(mean, x.mean(0), rtol=1e-4, atol=1e-5 * float(x.abs().max()))
            most = max(most, len(x))
        assert stats[param].rows == most
    for param in set(expected.counts) - set(expected.parts):
        counts = stats[param].row_counts
        assert counts is not None
        assert torch.equal(counts, expected.counts[param])
        assert stats[param].gram is None
        assert stats[param].rows == int(expected.counts[param].sum())


def test_cross_attention_has_three_grams() -> None:
    net = case("cross_attention")
    stats = collect(net.traced, net.model.values(), BOTH)["attention.in_proj_weight"]
    assert stats.gram is not None
    queries, keys, values = stats.gram
    assert torch.allclose(values, 4 * keys)
    assert not torch.allclose(queries, keys)
    assert stats.gram.shape == (3, 8, 8)


def test_only_what_is_needed_is_gathered() -> None:
    net = case("waves")
    grams = collect(net.traced, net.model.values(), frozenset({"gram"}), {"head.weight"})
    means = collect(net.traced, net.model.values(), frozenset({"mean"}), {"head.weight"})
    assert set(grams) == set(means) == {"head.weight"}
    assert (grams["head.weight"].mean, means["head.weight"].gram) == (None, None)
    assert torch.equal(sum_of(grams, "gram"), sum_of(collect(net.traced, net.model.values(), BOTH), "gram"))


def sum_of(stats: Stats, part: str) -> Tensor:
    return torch.as_tensor(getattr(stats["head.weight"], part))


def test_a_weight_in_two_orientations_has_no_statistics() -> None:
    net = case("raw")
    with pytest.raises(InputError) as caught:
        collect(net.traced, net.model.values(), BOTH)
    assert str(caught.value) == '"both_ways": is used in two orientations and has no one set of inputs; skip it'


def gather(make: Callable[[], nn.Module], x: Tensor) -> tuple[Stats, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
    model = from_module(module, (), Source(entry="net.py:net"))
    return collect(trace(module, [(x,)]), model.values(), BOTH), module


class Part(nn.Module):
    """Uses rows 0..4 and 2..6 of eight; rows 6 and 7 are never used."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w[:4]) + F.linear(2 * x[:5], self.w[2:6]).sum(0)


def test_rows_that_overlap_add_up_and_unused_rows_get_nothing() -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    stats, _ = gather(Part, x)
    gram, mean = stats["w"].gram, stats["w"].mean
    assert gram is not None
    assert mean is not None
    wide, part = x.double(), 2 * x[:5].double()
    once, twice = wide.T @ wide, part.T @ part
    assert torch.allclose(gram, torch.stack([once, once + twice, twice, torch.zeros(3, 3).double()]))
    both = torch.cat([wide, part]).mean(0)
    assert torch.allclose(mean, torch.stack([wide.mean(0), both, part.mean(0), torch.zeros(3).double()]))
    assert stats["w"].rows == 14


def test_an_lstm_cell_is_read_step_by_step() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = cell = x.new_zeros(len(x), 4)
            for step in range(3):
                hidden, cell = self.cell(x[:, step], (hidden, cell))
            return hidden

    x = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    stats, module = gather(Net, x)
    hidden = cell = torch.zeros(5, 4)
    seen = []
    with torch.no_grad():
        for step in range(3):
            seen.append(hidden)
            hidden, cell = module.cell(x[:, step], (hidden, cell))  # type: ignore[operator]
    wide, inputs = torch.cat(seen).double(), x.reshape(-1, 3).double()
    assert torch.allclose(torch.as_tensor(stats["cell.weight_hh"].gram)[0], wide.T @ wide, rtol=1e-5, atol=1e-8)
    assert torch.allclose(torch.as_tensor(stats["cell.weight_ih"].gram)[0], inputs.T @ inputs)


@pytest.mark.parametrize("padding", ["valid", "same", 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_in_three_dimensions(padding: int | str, stride: int) -> None:
    """An input row for each output value: X times the matrix of the weight is the output itself."""
    if padding == "same" and stride > 1:
        stride = 1
    x = torch.randn(2, 4, 5, 6, 5, generator=torch.Generator().manual_seed(0))

    def make() -> nn.Module:
        return nn.Conv3d(4, 6, (1, 2, 3), stride=stride, padding=padding, dilation=(1, 2, 1), groups=2)

    stats, module = gather(make, x)
    with torch.no_grad():
        y = module(x).double().transpose(0, 1).reshape(6, -1) - module.bias.double()[:, None]  # type: ignore[union-attr,operator]
    matrix = module.weight.detach().double().reshape(2, 3, -1)  # type: ignore[operator,union-attr]
    gram = torch.as_tensor(stats["weight"].gram)
    energy = (matrix @ gram @ matrix.transpose(1, 2)).diagonal(dim1=1, dim2=2).flatten()
    assert torch.allclose(energy, y.square().sum(1), rtol=1e-4)
    assert stats["weight"].rows == y.shape[1]


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_transposed_convolutions_in_one_and_three_dimensions(dims: int, dilation: int) -> None:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose3d)[dims // 3]
    x = torch.randn(2, 4, *(4, 3, 5)[:dims], generator=torch.Generator().manual_seed(0))

    def make() -> nn.Module:
        return layer(4, 6, 3, stride=2, padding=2, output_padding=1, dilation=dilation, groups=2, bias=False)

    stats, module = gather(make, x)
    with torch.no_grad():
        y = module(x).double().transpose(0, 1).reshape(6, -1)
    weight: Any = module.weight
    matrix = weight.detach().double().reshape(2, 2, 3, -1).transpose(1, 2).reshape(2, 3, -1)
    gram = torch.as_tensor(stats["weight"].gram)
    energy = (matrix @ gram @ matrix.transpose(1, 2)).diagonal(dim1=1, dim2=2).flatten()
    assert torch.allclose(energy, y.square().sum(1), rtol=1e-4)
    mean = torch.as_tensor(stats["weight"].mean)
    assert torch.allclose((matrix @ mean[:, :, None]).flatten(), y.mean(1), atol=1e-5)
