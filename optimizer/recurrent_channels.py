"""Channel numbers of recurrent operators: the hidden units of each layer and direction are its channels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from .channels import Follower, Value, flat
from .graph import aten, flat_weights


def recurrent(follower: Follower, node: fx.Node) -> Any:
    """Follow aten.gru.input and its kin: (x, hx, weights, biases, layers, dropout, train, bidirectional, first).

    All layers and directions have one hidden size, so that each must lose equally many units.
    """
    x, layers, directions = follower.value(node.args[0]), cast(int, node.args[4]), 2 if node.args[7] else 1
    names, biases = flat_weights(node), bool(node.args[3])
    per_cell, expected = len(names) // (layers * directions), 4 if biases else 2
    if per_cell != expected:
        follower.freeze_all([x], "a recurrent layer with projections reads it")
    states, hidden = [flat([follower.value(node.args[1])])], list[Tensor]()
    line = _last(follower, x)
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = (layer * directions + direction) * per_cell
            units = _cell(follower, node, line, names[place : place + per_cell])
            if per_cell != expected:
                follower.ledger.freeze(units, "its recurrent layer has projections")
            outputs.append(units)
        hidden += outputs
        line = torch.cat(outputs)
    follower.balance(hidden)
    stacked = torch.stack(hidden)[:, None]
    for state in states[0]:
        shape = (len(hidden), state.shape[-2], len(hidden[0]))
        three = stacked if len(state.shape) == 3 else stacked[:, 0]
        follower.elementwise(
            [Value(ids=three, shape=shape if len(state.shape) == 3 else state.shape), state], state.shape
        )
    outputs = node.meta["val"]
    sequence = line.reshape((1,) * (outputs[0].ndim - 1) + (-1,))
    last = [stacked if y.ndim == 3 else stacked[:, 0] for y in outputs[1:]]
    values = [sequence, *last]
    return [Value(ids=ids, shape=tuple(y.shape)) for ids, y in zip(values, outputs, strict=True)]


def cell(follower: Follower, node: fx.Node) -> Any:
    """Follow one step of a cell: (x, hidden or [hidden, cell], W_ih, W_hh, b_ih, b_hh)."""
    names = [arg for arg in node.args[2:6] if isinstance(arg, fx.Node)]
    units = _cell(follower, node, _last(follower, follower.value(node.args[0])), names)
    for state in flat([follower.value(node.args[1])]):
        follower.elementwise(
            [Value(ids=units.reshape((1,) * (len(state.shape) - 1) + (-1,)), shape=state.shape), state], state.shape
        )
    val = node.meta["val"]
    made = [Value(ids=units.reshape((1,) * (y.ndim - 1) + (-1,)), shape=tuple(y.shape)) for y in _list(val)]
    return made[0] if isinstance(val, Tensor) else made


def _list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _last(follower: Follower, value: Value) -> Tensor:
    """Return the numbers along the last dimension, those along all others joined."""
    value = follower.current(value)
    value = follower.merge_along(value, [a for a in value.varying if a != len(value.shape) - 1])
    line = value.ids.reshape(-1)
    return line.expand(value.shape[-1]) if len(line) == 1 else line


def _cell(follower: Follower, node: fx.Node, line: Tensor, names: list[fx.Node]) -> Tensor:
    """Join the parameters of one layer and direction; return the numbers of its hidden units.

    The gates of a unit are rows h, H + h, 2 H + h, ... of W_ih and W_hh (PyTorch's order r z n, i f g o).
    """
    sites = {site.param: site for site in follower.graph.sites[node.name]}
    params = [follower.graph.values[name.name] for name in names]
    into, back = (follower.matrix(sites[param]) for param in params[:2])
    follower.contract(Value(ids=line.clone(), shape=(len(line),)), 0, into.columns)
    units = back.columns[0]
    size = len(units) if len(into.rows) % len(units) == 0 else 0
    if not size:
        follower.ledger.freeze(torch.cat([into.rows, back.rows, units]), "its recurrent layer has projections")
        return into.rows.reshape(-1)[: len(into.rows) // (3 if node.target == aten.gru.input else 4)]
    for rows in (into.rows, back.rows):
        follower.ledger.join(rows.reshape(-1, size), units)
    for name in names[2:4]:
        bias = follower.value(name)
        if isinstance(bias, Value) and len(bias.shape) == 1:
            follower.ledger.join(bias.full().reshape(-1, size), units)
    return units
