"""Costs against PyTorch's own counter of operations and against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paredown.optimizer import cost
from paredown.optimizer.graph import capture

from ..zoo.traced import case

CONVOLUTIONS = ("residual", "separable", "waves", "encoder_decoder", "squeeze_excite", "grouped", "detector")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_multiplies_are_half_of_the_counted_operations(name: str) -> None:
    net = case(name)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net.module(*net.batches[1])
    assert cost.macs(net.traced.graph) == counter.get_total_flops() // 2


BY_HAND = {
    "llama": 7 * (2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 20) + 16 * 24),
    "bert": 7 * 2 * (4 * 8 * 8 + 2 * 8 * 16) + 8 * 8,
    "vision": 4 * (8 * 3 * 16) + 5 * 2 * (4 * 8 * 8 + 2 * 8 * 16) + 8 * 4,
    "cross_attention": 2 * (5 * 8 * 8 + 2 * 7 * 8 * 8 + 5 * 8 * 8) + 5 * 8 * 3,
    "raw": 5 * (6 * 18 + 6 * 8 + 8 * 5 + 2 * 5 * 5),
    "gru": 6 * (2 * 18 * (5 + 6) + 2 * 18 * (12 + 6) + 12 * 4),
    "lstm": 6 * (24 * (5 + 6) + 24 * (6 + 6) + 6 * 4),
    "cells": 4 * 18 * (5 + 6) + 6 * 2,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_multiplies_of_weights_by_hand(name: str) -> None:
    assert cost.macs(case(name).traced.graph) == BY_HAND[name]


@pytest.mark.parametrize("name", ["residual", "bert", "lstm", "encoder_decoder"])
def test_multiplies_are_those_of_one_sample(name: str) -> None:
    graphs = case(name).traced.graphs
    assert cost.macs(graphs[0]) == cost.macs(graphs[1])


def test_the_estimate_grows_with_the_samples_and_knows_the_live_activations() -> None:
    module = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 10)).eval()
    batch = (torch.zeros(4, 10),)
    graph = capture(module, batch)
    one, ten = (cost.estimate(graph, batch, samples, 7_000_000) for samples in (8, 80))
    assert one.peak_bytes == 7_000_000 + 2 * (8 * 1010 * 4)
    assert ten.peak_bytes == 7_000_000 + 2 * (80 * 1010 * 4)
    assert 0 < one.seconds < 60
    assert ten.seconds > 0


@pytest.mark.parametrize("name", ["residual", "vision", "gru", "raw", "encoder_decoder"])
def test_every_kind_of_network_has_an_estimate(name: str) -> None:
    net = case(name)
    found = cost.estimate(net.traced.graph, net.batches[0], 512, 0)
    assert found.seconds > 0
    assert found.peak_bytes > 0
