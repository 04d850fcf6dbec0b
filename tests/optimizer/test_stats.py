"""Statistics of every site against forward hooks, patches by loops, and recurrent steps written out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.optimizer.errors import InputError
from paredown.optimizer.graph import quiet_export
from paredown.optimizer.model import Source, from_module
from paredown.optimizer.stats import LayerStats, Stats, collect
from paredown.optimizer.walk import trace
from paredown.optimizer.weight import Layout

from ..zoo.nets import ZOO
from ..zoo.traced import case

BOTH = frozenset({"gram", "mean"})


@dataclass(slots=True)
class Expected:
    """What hooks saw: parameter -> (first row, rows, X in float64) of each use; and how often rows were looked up."""

    names: dict[int, str]
    parts: dict[str, list[tuple[int, int, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, param: Any, x: Tensor, first: int = 0, count: int = 0) -> None:
        wide = x.detach().double()
        self.parts[self.names[id(param)]].append((first, count or len(param), wide.reshape(-1, wide.shape[-1])))

    def of_row(self, param: str, row: int) -> Tensor:
        """Return all that one row of a weight multiplied."""
        return torch.cat([x for first, count, x in self.parts[param] if first <= row < first + count])


def watched(module: nn.Module, batches: Any) -> Expected:
    """Run a module with hooks."""
    found = Expected(names={id(p): n for n, p in module.named_parameters()})
    hooks: dict[type, Callable[..., None]] = {
        nn.Linear: lambda m, args, kw: found.add(m.weight, args[0]),
        nn.Conv1d: lambda m, args, kw: conv(found, m, args[0]),
        nn.Conv2d: lambda m, args, kw: conv(found, m, args[0]),
        nn.ConvTranspose2d: lambda m, args, kw: transposed(found, m, args[0]),
        nn.Embedding: lambda m, args, kw: looked_up(found, m, args[0]),
        nn.MultiheadAttention: lambda m, args, kw: attention(found, m, *args[:3]),
        nn.GRU: lambda m, args, kw: recurrent(found, m, args),
        nn.LSTM: lambda m, args, kw: recurrent(found, m, args),
        nn.GRUCell: lambda m, args, kw: cell(found, m, *args),
    }
    handles = [
        part.register_forward_pre_hook(hooks[type(part)], with_kwargs=True)
        for part in module.modules()
        if type(part) in hooks
    ]
    with torch.no_grad(), quiet_export():
        for batch in batches:
            module(*batch)
    for handle in handles:
        handle.remove()
    return found


def conv(found: Expected, layer: Any, x: Tensor) -> None:
    """Add the patches of each group: unfold of a padded image, one row high in one dimension."""
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0,) * (x.ndim - 2)
    elif layer.padding == "same":
        total = layer.dilation[0] * (layer.kernel_size[0] - 1)
        x, padding = F.pad(x, (total // 2, total - total // 2)), (0,)
    else:
        padding = layer.padding
    sizes = {"kernel_size": layer.kernel_size, "dilation": layer.dilation, "padding": padding, "stride": layer.stride}
    if x.ndim == 3:
        x = x[:, :, None]
        sizes = {key: (0 if key == "padding" else 1, *value) for key, value in sizes.items()}
    columns = F.unfold(x.double(), **sizes)  # (batch, in * taps, positions)
    for group, part in enumerate(columns.chunk(layer.groups, dim=1)):
        count = layer.out_channels // layer.groups
        found.add(layer.weight, part.transpose(1, 2), group * count, count)


def transposed(found: Expected, layer: Any, x: Tensor) -> None:
    """Add what each output pixel sums over, by loops: input pixel i reaches o = i * stride - padding + tap."""
    height, width = out_size(layer, x)
    (sy, sx), (py, px), (ky, kx) = layer.stride, layer.padding, layer.kernel_size
    rows = np.zeros((len(x), height, width, x.shape[1], ky, kx))
    values = x.detach().double().numpy()
    for iy, ix, ty, tx in np.ndindex(x.shape[2], x.shape[3], ky, kx):
        oy, ox = iy * sy - py + ty, ix * sx - px + tx
        if 0 <= oy < height and 0 <= ox < width:
            rows[:, oy, ox, :, ty, tx] = values[:, :, iy, ix]
    grouped = torch.from_numpy(rows).reshape(-1, layer.groups, x.shape[1] // layer.groups * ky * kx)
    count = layer.out_channels // layer.groups
    for group in range(layer.groups):
        found.add(layer.weight, grouped[:, group], group * count, count)


def out_size(layer: Any, x: Tensor) -> tuple[int, int]:
    sizes = zip(x.shape[2:], layer.stride, layer.padding, layer.kernel_size, layer.output_padding, strict=True)
    height, width = ((size - 1) * step - 2 * pad + taps + extra for size, step, pad, taps, extra in sizes)
    return height, width


def looked_up(found: Expected, layer: Any, ids: Tensor) -> None:
    name = found.names[id(layer.weight)]
    counts = found.counts.setdefault(name, torch.zeros(layer.num_embeddings, dtype=torch.float64))
    for number in ids.flatten().tolist():
        counts[number] += 1


def attention(found: Expected, layer: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Add queries, keys and values to their thirds of the packed matrix, and the mixed values to the projection."""
    width = layer.embed_dim
    mixed = []
    for i, x in enumerate((query, key, value)):
        found.add(layer.in_proj_weight, x, i * width, width)
        bias = 0 if layer.in_proj_bias is None else layer.in_proj_bias[i * width : (i + 1) * width]
        y = x @ layer.in_proj_weight[i * width : (i + 1) * width].T + bias
        mixed.append(y.double().unflatten(-1, (layer.num_heads, -1)).transpose(1, 2))
    q, k, v = mixed
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    found.add(layer.out_proj.weight, (scores @ v).transpose(1, 2).flatten(2))


def cell(found: Expected, layer: Any, x: Tensor, hidden: Tensor) -> None:
    found.add(layer.weight_ih, x)
    found.add(layer.weight_hh, hidden)


def recurrent(found: Expected, layer: Any, args: tuple[Any, ...]) -> None:
    """Step through an nn.GRU or nn.LSTM in float64 and add every input and every previous hidden state."""
    x = (args[0].transpose(0, 1) if layer.batch_first else args[0]).double()
    directions = 2 if layer.bidirectional else 1
    start = torch.zeros(layer.num_layers * directions, x.shape[1], layer.hidden_size, dtype=torch.float64)
    if len(args) > 1:
        start = (args[1][0] if isinstance(layer, nn.LSTM) else args[1]).double()
    for depth in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{depth}" + ("_reverse" if direction else "")
            w_ih, w_hh = (getattr(layer, f"weight_{part}_{suffix}") for part in ("ih", "hh"))
            hidden = start[depth * directions + direction]
            cell = torch.zeros_like(hidden)
            steps = []
            for step in x.flip(0) if direction else x:
                found.add(w_ih, step)
                found.add(w_hh, hidden)
                gates = (getattr(layer, f"bias_{part}_{suffix}").double() for part in ("ih", "hh"))
                a, b = step @ w_ih.double().T + next(gates), hidden @ w_hh.double().T + next(gates)
                hidden, cell = lstm_step(a + b, cell) if isinstance(layer, nn.LSTM) else (gru_step(a, b, hidden), cell)
                steps.append(hidden)
            outputs.append(torch.stack(steps[::-1] if direction else steps))
        x = torch.cat(outputs, dim=-1)


def gru_step(a: Tensor, b: Tensor, hidden: Tensor) -> Tensor:
    (ra, za, na), (rb, zb, nb) = a.chunk(3, -1), b.chunk(3, -1)
    new = torch.tanh(na + torch.sigmoid(ra + rb) * nb)
    update = torch.sigmoid(za + zb)
    return (1 - update) * new + update * hidden


def lstm_step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def raw_expected(module: Any, batches: Any) -> Expected:
    """Write out the forward of the zoo's `raw` network."""
    found = Expected(names={id(p): n for n, p in module.named_parameters()})
    with torch.no_grad():
        for (x,) in batches:
            found.add(module.expand.weight, x * module.window, count=18)
            a, b, c = ((x * module.window) @ module.expand.weight + module.expand.bias).split(6, -1)
            found.add(module.linear, a * b + c)
            y = torch.tanh((a * b + c) @ module.linear.T + module.linear_bias)
            found.add(module.right, y, count=5)
    return found


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


@pytest.mark.parametrize("name", ZOO)
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
