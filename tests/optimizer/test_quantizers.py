"""Properties that every file in optimizer/quantizers keeps, and what single methods promise."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paredown.optimizer.quantizers
from paredown.optimizer.clusters import fit_table, lloyd, optimal
from paredown.optimizer.codes import Format, grid_of, prepare, table_levels
from paredown.optimizer.errors import RecipeError
from paredown.optimizer.quantizers import dp, kmeans, lnq, nf, power, uniform
from paredown.optimizer.scales import codebook, scale_losses
from paredown.optimizer.stats import LayerStats
from paredown.optimizer.weight import Codebook, Uniform

from ..strategies import SEEDS, formats, layers, output_error, random_stats, random_weight

NAMES = sorted(p.stem for p in Path(paredown.optimizer.quantizers.__path__[0]).glob("*.py") if p.stem != "__init__")
MODULES = [importlib.import_module(f"paredown.optimizer.quantizers.{name}") for name in NAMES]
FAST = settings(max_examples=10, deadline=None, derandomize=True)
SLOW = {"power"}
"""Those left to the whole run: it takes half of the processor time of this file."""
every = pytest.mark.parametrize(
    "quantizer",
    [
        pytest.param(module, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for module, name in zip(MODULES, NAMES, strict=True)
    ],
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> object:
    """Small matrices: a second thread only adds hand-over time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(quantizer: ModuleType, w: Tensor, stats: LayerStats | None, spec: Format) -> Uniform | Codebook:
    weight = quantizer.quantize(w, stats, quantizer.Spec(format=spec))
    assert isinstance(weight, Uniform | Codebook)
    return weight


@every
def test_file_defines_the_contract(quantizer: ModuleType) -> None:
    assert isinstance(quantizer.needs, frozenset)
    assert quantizer.Spec(format=Format(bits=4)).format.bits == 4
    assert quantizer.quantize.__doc__


@every
@FAST
@given(layers(), formats(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans())
def test_shape_dtype_codes_and_bytes(
    quantizer: ModuleType, layer: tuple[Tensor, LayerStats], spec: Format, dtype: torch.dtype, calibrated: bool
) -> None:
    w, stats = layer[0].to(dtype), layer[1] if calibrated or spec.feedback else None
    weight = run(quantizer, w, stats, spec)
    assert weight.shape == tuple(w.shape)
    assert weight.dense().dtype == dtype
    assert bool(weight.dense().isfinite().all())
    assert int(weight.codes.max()) < 2**spec.bits
    assert (weight.code_bits, weight.group) == (spec.bits, spec.group)
    again = run(quantizer, w, stats, spec)
    assert all(torch.equal(a, b) for a, b in zip(weight.tensors().values(), again.tensors().values(), strict=True))
    assert weight.bits() == sum(t.numel() * t.element_size() * 8 for t in weight.tensors().values())


@every
@FAST
@given(layers(), formats(), st.integers(-2, 4))
def test_a_power_of_two_passes_through(
    quantizer: ModuleType, layer: tuple[Tensor, LayerStats], spec: Format, exponent: int
) -> None:
    w, stats = layer
    expected = run(quantizer, w, stats, spec).dense() * 2.0**exponent
    assert torch.equal(run(quantizer, w * 2.0**exponent, stats, spec).dense(), expected)


@pytest.mark.parametrize("quantizer", [uniform, nf], ids=["uniform", "nf"])
@FAST
@given(layers(low=2), formats(), st.integers(-2, 4))
def test_rows_are_independent_without_a_fitted_table(
    quantizer: ModuleType, layer: tuple[Tensor, LayerStats], spec: Format, exponent: int
) -> None:
    w, stats = layer
    factor = torch.ones(len(w), 1).index_fill(0, torch.tensor([1]), 2.0**exponent)
    assert torch.equal(run(quantizer, w * factor, stats, spec).dense(), run(quantizer, w, stats, spec).dense() * factor)


@every
@FAST
@given(layers(low=2), formats(bits=(2, 3, 4)), SEEDS)
def test_row_order_passes_through(
    quantizer: ModuleType, layer: tuple[Tensor, LayerStats], spec: Format, seed: int
) -> None:
    w, stats = layer
    rng = torch.Generator().manual_seed(seed)
    step = spec.table_rows or len(w)
    order = torch.cat([low + torch.randperm(min(step, len(w) - low), generator=rng) for low in range(0, len(w), step)])
    assert torch.equal(run(quantizer, w[order], stats, spec).dense(), run(quantizer, w, stats, spec).dense()[order])


@every
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [0, 16])
def test_calibration_lowers_the_error_on_its_set(quantizer: ModuleType, bits: int, group: int) -> None:
    for seed in range(2):
        w, stats = random_weight(20, 40, seed, heavy=seed % 2 == 1), random_stats(40, seed)
        plain = run(quantizer, w, None, Format(bits=bits, group=group)).dense()
        fed = run(quantizer, w, stats, Format(bits=bits, group=group, feedback=True)).dense()
        assert output_error(fed, w, stats) < output_error(plain, w, stats)


@every
@pytest.mark.parametrize(
    "spec", [Format(bits=2), Format(bits=2, group=16, table="fp16"), Format(bits=2, feedback=True)]
)
def test_more_bits_never_raise_the_error(quantizer: ModuleType, spec: Format) -> None:
    for seed in range(2):
        w, stats = random_weight(18, 48, seed, heavy=seed == 1), random_stats(48, seed)
        errors = [
            output_error(run(quantizer, w, stats, replace(spec, bits=bits)).dense(), w, stats) for bits in (2, 3, 4, 8)
        ]
        assert errors == sorted(errors, reverse=True)


@every
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", [(1, 37), (37, 1), (1, 1), (33, 21), (3, 200)])
@pytest.mark.parametrize("group", [0, 16])
def test_odd_shapes(quantizer: ModuleType, shape: tuple[int, int], group: int, calibrated: bool) -> None:
    w, stats = random_weight(*shape, 0), random_stats(shape[1], 0)
    spec = Format(bits=4, group=group, table_rows=16, feedback=calibrated)
    weight = run(quantizer, w, stats if calibrated else None, spec)
    identity = LayerStats(rows=1, gram=torch.eye(shape[1], dtype=torch.float64)[None])
    assert weight.shape == shape
    against = stats if calibrated else identity
    assert output_error(weight.dense(), w, against) < 0.05 * output_error(w * 0, w, against)


@every
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_and_constant_rows(quantizer: ModuleType, bits: int, calibrated: bool) -> None:
    stats = random_stats(12, 0) if calibrated else None
    spec = Format(bits=bits, group=5, feedback=calibrated, table_rows=16)
    assert torch.equal(run(quantizer, torch.zeros(18, 12), stats, spec).dense(), torch.zeros(18, 12))
    w = torch.tensor([0.0, 0.75, -3.0, 1.5])[:, None].expand(4, 12)
    torch.testing.assert_close(run(quantizer, w, stats, replace(spec, table="fp16")).dense(), w)


@every
@pytest.mark.parametrize("size", [1e-8, 1e4, 1e6])
def test_size_does_not_matter(quantizer: ModuleType, size: float) -> None:
    w, stats = random_weight(12, 30, 0), random_stats(30, 0)
    for spec in (Format(bits=3), Format(bits=3, feedback=True)):
        small = run(quantizer, w * size, stats, spec)
        expected = run(quantizer, w, stats, spec)
        error, reference = (
            output_error(weight.dense().double() / scale, w, stats) for weight, scale in ((small, size), (expected, 1))
        )
        assert error == pytest.approx(reference, rel=0.1)


@every
@pytest.mark.parametrize("groups", [2, 8, 16])
def test_conv_groups_use_their_own_inputs(quantizer: ModuleType, groups: int) -> None:
    w, stats = random_weight(16, 18, 0), random_stats(18, 0, groups=groups)
    fed = run(quantizer, w, stats, Format(bits=3, feedback=True)).dense()
    assert output_error(fed, w, stats) < output_error(run(quantizer, w, None, Format(bits=3)).dense(), w, stats)


@every
def test_feedback_without_calibration_is_an_error(quantizer: ModuleType) -> None:
    with pytest.raises(RecipeError, match="feedback needs calibration data, and this layer has none"):
        run(quantizer, torch.ones(4, 4), None, Format(bits=4, feedback=True))


@every
@pytest.mark.parametrize("feedback", [False, True])
def test_eight_bits_of_int8_are_the_int8_grid(quantizer: ModuleType, feedback: bool) -> None:
    w, stats = random_weight(6, 30, 0), random_stats(30, 0)
    weight = run(quantizer, w, stats, Format(bits=8, feedback=feedback))
    assert isinstance(weight, Uniform)
    assert weight.zero == 128
    assert torch.equal(weight.dense(), run(uniform, w, stats, Format(bits=8, feedback=feedback)).dense())
    fp16 = run(quantizer, w, stats, Format(bits=8, table="fp16", feedback=feedback))
    assert isinstance(fp16, Codebook) == (quantizer is not uniform)


# What single methods promise about exactness: kmeans, dp and lnq reproduce rows that share 2**bits ratios to their
# largest magnitude, where ratios and magnitudes are fp16 numbers and the table is fp16; uniform reproduces rows within
# {-a, 0, a}; nf rows within {-a, 0, a} with an fp16 table; power constant rows with an fp16 table.


@pytest.mark.parametrize("quantizer", [kmeans, dp, lnq], ids=["kmeans", "dp", "lnq"])
@FAST
@given(
    SEEDS,
    st.sampled_from([2, 3, 4]),
    st.sampled_from([0, 16]),
    st.booleans(),
    st.lists(st.integers(-2047, 2047), min_size=15, max_size=15, unique=True),
)
def test_rows_of_few_values_are_exact(
    quantizer: ModuleType, seed: int, bits: int, table_rows: int, feedback: bool, ratios: list[int]
) -> None:
    rng = torch.Generator().manual_seed(seed)
    values = torch.tensor([2048, *ratios[: 2**bits - 1]]) / 2048
    w = values[torch.randint(2**bits, (20, 25), generator=rng)]
    w[:, 3] = 1.0
    w = w * torch.randint(1024, 2048, (20, 1), generator=rng) / 1024
    stats = random_stats(25, seed) if feedback else None
    spec = Format(bits=bits, table="fp16", table_rows=table_rows, feedback=feedback)
    assert torch.equal(run(quantizer, w, stats, spec).dense(), w)


@pytest.mark.parametrize("quantizer", [uniform, nf], ids=["uniform", "nf"])
@FAST
@given(SEEDS, st.sampled_from([2, 3, 4, 8]), st.booleans())
def test_ternary_rows_are_exact(quantizer: ModuleType, seed: int, bits: int, feedback: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    w = torch.randint(-1, 2, (9, 20), generator=rng) * torch.randint(1024, 2048, (9, 1), generator=rng) / 64.0
    spec = Format(bits=bits, table="fp16", feedback=feedback)
    assert torch.equal(run(quantizer, w, random_stats(20, seed), spec).dense(), w)


def test_methods_rank_as_they_should() -> None:
    layers = [(random_weight(32, 144, seed, heavy=seed > 1), random_stats(144, seed)) for seed in range(4)]
    for bits in (2, 3, 4):
        plain, fed = Format(bits=bits), Format(bits=bits, feedback=True)
        ranking = ((lnq, fed), (kmeans, fed), (kmeans, plain), (uniform, plain))
        errors = [sum(output_error(run(q, *layer, spec).dense(), *layer) for layer in layers) for q, spec in ranking]
        assert errors == sorted(errors)
        assert errors[1] < 0.5 * errors[2]


def test_dp_has_no_more_table_error_than_kmeans() -> None:
    w, stats = random_weight(40, 60, 0, heavy=True), random_stats(60, 0)
    for bits in (2, 3, 4):
        job = prepare(w, stats, Format(bits=bits))
        exact, local = (float(scale_losses(job, *fit_table(job, solve)).sum()) for solve in (optimal, lloyd))
        assert exact <= local * 1.01


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_power_one_is_uniform(bits: int) -> None:
    w, stats = random_weight(10, 50, 0), random_stats(50, 0)
    for feedback in (False, True):
        spec = Format(bits=bits, table="fp16", feedback=feedback)
        weight = power.quantize(w, stats, power.Spec(format=spec, exponent=1.0))
        assert isinstance(weight, Codebook)
        assert torch.equal(weight.dense(), run(uniform, w, stats, spec).dense())


@FAST
@given(st.floats(0.3, 1.2), st.sampled_from([2, 3, 4]))
def test_power_levels_multiply_as_codes_do(exponent: float, bits: int) -> None:
    levels = power.power_levels(torch.tensor([exponent], dtype=torch.float64), bits)[0]
    half = 2 ** (bits - 1)
    codes = torch.arange(2**bits, dtype=torch.float64) - half
    product = codes[:, None] * codes / half**2
    torch.testing.assert_close(levels[:, None] * levels, product.sign() * product.abs() ** (1 / exponent))


@pytest.mark.parametrize("table_rows", [0, 16])
def test_power_search_beats_every_fixed_exponent(table_rows: int) -> None:
    w = random_weight(20, 60, 0, heavy=True)
    identity = LayerStats(rows=1, gram=torch.eye(60, dtype=torch.float64)[None])
    spec = Format(bits=4, table_rows=table_rows)
    searched = output_error(run(power, w, None, spec).dense(), w, identity)
    for exponent in (0.4, 0.6, 0.8, 1.0):
        fixed = power.quantize(w, None, power.Spec(format=spec, exponent=exponent))
        assert searched <= output_error(fixed.dense(), w, identity) * 1.001


def test_power_of_an_unclipped_scale_loses_to_the_search() -> None:
    w = random_weight(20, 200, 0)
    job = prepare(w, None, Format(bits=4))
    levels = power.power_levels(torch.tensor([0.7], dtype=torch.float64), 4)
    unclipped = codebook(job, levels, job.weight.abs().amax(1, keepdim=True)).dense()
    assert float((run(power, w, None, job.format).dense() - w).norm()) < 0.95 * float((unclipped - w).norm())


def test_power_says_what_is_wrong() -> None:
    with pytest.raises(RecipeError, match=r"exponent=0.0 is out of range; use 0.3 to 1.2, or leave it out"):
        power.Spec(format=Format(bits=4), exponent=0.0)


def test_nf4_is_the_table_of_qlora() -> None:
    known = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    known += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    torch.testing.assert_close(nf.normal_levels(4)[0], torch.tensor(known, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nf_clip_lowers_the_error(bits: int) -> None:
    w = random_weight(10, 80, 0)
    plain, clipped = (
        nf.quantize(w, None, nf.Spec(format=Format(bits=bits), clip=clip)).dense() for clip in (False, True)
    )
    assert float((clipped - w).norm()) < float((plain - w).norm())


@FAST
@given(layers(low=2), formats(bits=(2, 3, 4)), st.sampled_from([1, 2]))
def test_lnq_never_raises_its_loss(layer: tuple[Tensor, LayerStats], spec: Format, cycles: int) -> None:
    w, stats = layer
    fixed, start = _lnq_start(w, stats, spec)
    _, trace = lnq.descend(fixed, start, 3, cycles)
    assert len(trace) >= 1 + 2 + cycles
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in pairwise(trace))


@FAST
@given(layers(low=2), formats(bits=(2, 3, 4)))
def test_lnq_is_never_worse_than_kmeans(layer: tuple[Tensor, LayerStats], spec: Format) -> None:
    w, stats = layer
    fixed, _ = _lnq_start(w, stats, spec)
    losses = [_lnq_loss(fixed, run(quantizer, w, stats, spec)) for quantizer in (lnq, kmeans)]
    assert losses[0] <= losses[1]


@pytest.mark.parametrize("table_rows", [0, 16])
@pytest.mark.parametrize("group", [0, 4])
def test_lnq_levels_are_least_squares(table_rows: int, group: int) -> None:
    w, stats = random_weight(18, 10, 0), random_stats(10, 0, groups=2)
    fixed, start = _lnq_start(w, stats, Format(bits=2, table_rows=table_rows, group=group))
    found = lnq.fit_levels(fixed, start)
    root = np.linalg.cholesky(fixed.gram)
    scale, blocks = start.full_scale(fixed), len(start.levels)
    for block in range(blocks):
        rows = [r for r in range(18) if (r // 16 if table_rows else 0) == block]
        left, right = [], []
        for row in rows:
            here = (row // 9, slice(None), row % 9)
            onehot = np.eye(4 * blocks)[start.flat[here]][:, block * 4 : block * 4 + 4] * scale[here][:, None]
            left.append(root[row // 9].T @ onehot)
            right.append(root[row // 9].T @ fixed.weight[here])
        expected = np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0]
        np.testing.assert_allclose(found.levels[block], np.sort(expected), rtol=1e-5)


def test_lnq_scales_are_least_squares() -> None:
    w, stats = random_weight(8, 12, 0), random_stats(12, 0)
    fixed, start = _lnq_start(w, stats, Format(bits=3))
    root = np.linalg.cholesky(fixed.gram[0]).T
    picked = start.levels.ravel()[start.flat][0]
    expected = [np.linalg.lstsq(root @ picked[:, [r]], root @ fixed.weight[0][:, r], rcond=None)[0] for r in range(8)]
    np.testing.assert_allclose(lnq.fit_scales(fixed, start).scale, expected, rtol=1e-9)


def test_lnq_codes_equal_descent_one_weight_at_a_time() -> None:
    w, stats = random_weight(6, 140, 0), random_stats(140, 0, groups=2)
    fixed, start = _lnq_start(w, stats, Format(bits=2, group=16))
    found = lnq.fit_codes(fixed, start)
    scale, values = start.full_scale(fixed), start.values(fixed)
    for g, r in np.ndindex(2, 3):
        gram, weight, q = fixed.gram[g], fixed.weight[g, :, r], values[g, :, r].copy()
        for i in range(140):
            rest = gram[i] @ (q - weight) - gram[i, i] * (q[i] - weight[i])
            options = start.levels[0] * scale[g, i, r]
            q[i] = options[np.abs(options - (weight[i] - rest / gram[i, i])).argmin()]
        np.testing.assert_allclose(found.values(fixed)[g, :, r], q)


def test_lnq_without_a_gram_is_kmeans() -> None:
    w = random_weight(10, 20, 0)
    assert torch.equal(run(lnq, w, None, Format(bits=3)).dense(), run(kmeans, w, None, Format(bits=3)).dense())


def test_codebooks_ship_what_was_assigned() -> None:
    w, stats = random_weight(20, 30, 0), random_stats(30, 0)
    weight = run(lnq, w, stats, Format(bits=4, group=8, table_rows=16, feedback=True))
    assert isinstance(weight, Codebook)
    assert torch.equal(table_levels(weight.table), grid_of(weight).levels)
    torch.testing.assert_close(grid_of(weight).values(weight.codes).float(), weight.dense(), rtol=1e-6, atol=0)


def _lnq_start(w: Tensor, stats: LayerStats, spec: Format) -> tuple[lnq.Layer, lnq.State]:
    fixed = lnq.Layer.of(prepare(w, stats, spec))
    weight = run(kmeans, w, stats, spec)
    return fixed, lnq.State.of(grid_of(weight), weight.codes, fixed)


def _lnq_loss(fixed: lnq.Layer, weight: Uniform | Codebook) -> float:
    return fixed.loss(lnq.State.of(grid_of(weight), weight.codes, fixed))
