"""What hooks see: the inputs of every weight of a network, by patches, loops and recurrent steps written out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.optimizer.graph import quiet_export


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
