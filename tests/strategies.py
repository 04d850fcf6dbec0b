"""Shared hypothesis strategies: weights with calibration statistics, and formats to store them in."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from paredown.optimizer.codes import Format
from paredown.optimizer.stats import LayerStats

SEEDS = st.integers(0, 2**31 - 1)


def random_weight(rows: int, columns: int, seed: int, *, heavy: bool = False) -> Tensor:
    """Return Gaussian rows (or Laplace, if heavy) of differing size in float32."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=rng)
    if heavy:
        weight = weight * torch.empty(rows, columns).exponential_(generator=rng).sqrt()
    return weight * (0.2 + torch.rand(rows, 1, generator=rng))


def random_stats(columns: int, seed: int, *, groups: int = 1, samples: int = 0) -> LayerStats:
    """Return the gram of inputs whose neighbours correlate (AR(1), 0.9) and whose columns differ in size."""
    rng = torch.Generator().manual_seed(seed)
    samples = samples or 3 * columns + 8
    noise = torch.randn(groups, samples, columns, generator=rng, dtype=torch.float64)
    inputs = noise.clone()
    for i in range(1, columns):
        inputs[:, :, i] = 0.9 * inputs[:, :, i - 1] + 0.44 * noise[:, :, i]
    inputs = inputs * (0.2 + torch.rand(columns, generator=rng, dtype=torch.float64))
    return LayerStats(rows=samples, gram=inputs.transpose(1, 2) @ inputs)


def output_error(values: Tensor, weight: Tensor, stats: LayerStats) -> float:
    """Return tr(D H D^T), D the error of a weight: its squared output error on the calibration set."""
    assert stats.gram is not None
    delta = (values.double() - weight.double()).reshape(len(stats.gram), -1, weight.shape[1])
    return float(((delta @ stats.gram) * delta).sum())


@st.composite
def layers(draw: st.DrawFn, *, low: int = 1, high: int = 40) -> tuple[Tensor, LayerStats]:
    """Draw a weight and the statistics of its inputs."""
    rows, columns = draw(st.integers(low, high)), draw(st.integers(low, high))
    seed = draw(SEEDS)
    return random_weight(rows, columns, seed, heavy=draw(st.booleans())), random_stats(columns, seed)


@st.composite
def formats(draw: st.DrawFn, *, bits: tuple[int, ...] = (2, 3, 4, 8), feedback: bool | None = None) -> Format:
    """Draw a format; feedback as given, or either."""
    return Format(
        bits=draw(st.sampled_from(bits)),
        group=draw(st.sampled_from((0, 0, 5, 16))),
        table=draw(st.sampled_from(("int8", "fp16"))),
        table_rows=draw(st.sampled_from((0, 16))),
        feedback=draw(st.booleans()) if feedback is None else feedback,
        act_order=draw(st.booleans()),
    )
