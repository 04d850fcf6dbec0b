"""Layout mma16: back and forth, bit by bit, and through the fragments of mma."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.kernels import layout_mma16
from paredown.kernels.lut_spec import LutSpec

from ..strategies import SEEDS
from . import fragments


@st.composite
def specs(draw: st.DrawFn) -> LutSpec:
    group = draw(st.sampled_from((0, 3, 8, 32, 40, 64, 96, 128, 160, 256, 1000)))
    bits = draw(st.sampled_from(layout_mma16.BITS))
    return LutSpec(n=draw(st.integers(1, 50)), k=draw(st.integers(1, 400)), bits=bits, group=group)


def random_codes(spec: LutSpec, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=rng, dtype=torch.uint8)


@settings(deadline=None)
@given(specs(), SEEDS)
def test_unpack_undoes_pack(spec: LutSpec, seed: int) -> None:
    codes = random_codes(spec, seed)
    packed = layout_mma16.pack(codes, spec)
    assert packed.numel() == layout_mma16.codes_bytes(spec)
    assert torch.equal(layout_mma16.unpack(packed, spec), codes)


@pytest.mark.parametrize("bits", layout_mma16.BITS)
@pytest.mark.parametrize("size", [1, 2])
def test_the_layout_multiplies_through_the_fragments_of_mma(bits: int, size: int) -> None:
    """This proves the packed order and the order of x together, against a plain product."""
    rng = np.random.default_rng(bits)
    spec = LutSpec(n=16, k=128, bits=bits)
    codes, table = random_codes(spec, bits), rng.integers(-128, 128, 2**bits).astype(float)
    x = rng.integers(-127, 128, (8, 128)).astype(float)
    found = fragments.multiply(layout_mma16.pack(codes, spec).numpy(), bits, table, x, size)
    assert np.array_equal(found, table[codes.numpy()] @ x.T)


@settings(deadline=None)
@given(specs(), SEEDS)
def test_each_scale_is_where_its_codes_are(spec: LutSpec, seed: int) -> None:
    sizes = layout_mma16.shape(spec)
    scale = torch.randn(spec.scale_shape, generator=torch.Generator().manual_seed(seed))
    packed = layout_mma16.pack_scale(scale, spec)
    assert packed.shape == (sizes.blocks, sizes.slots, 16)
    for column in range(0, spec.k, 7):
        group, within = divmod(column, spec.group_columns)
        step = group * sizes.group_steps + within // 32
        slot = step // 4 // sizes.units_per_slot if sizes.steps_per_slot == 4 else step // sizes.steps_per_slot
        assert packed[(spec.n - 1) // 16, slot, (spec.n - 1) % 16] == scale[spec.n - 1, group]


@pytest.mark.parametrize(
    ("group", "k", "wanted"),
    [
        (0, 700, (4, 6, 1)),
        (128, 700, (4, 1, 6)),
        (256, 700, (4, 2, 3)),
        (64, 700, (2, 1, 12)),
        (32, 700, (1, 1, 24)),
        (96, 700, (1, 1, 24)),
        (192, 700, (2, 1, 12)),
    ],
)
def test_slots(group: int, k: int, wanted: tuple[int, int, int]) -> None:
    """Of groups of 128 and its multiples, slots are units; others share a unit."""
    sizes = layout_mma16.shape(LutSpec(n=16, k=k, bits=4, group=group))
    assert (sizes.steps_per_slot, sizes.units_per_slot, sizes.slots) == wanted


def test_packing_refuses_what_the_layout_has_not() -> None:
    with pytest.raises(ValueError, match="2, 3, 4 bits, not 5"):
        layout_mma16.pack(torch.zeros(1, 1, dtype=torch.uint8), LutSpec(n=1, k=1, bits=5))
    with pytest.raises(ValueError, match=r"codes are torch.uint8 \(1, 2\)"):
        layout_mma16.pack(torch.zeros(1, 2, dtype=torch.uint8), LutSpec(n=1, k=1, bits=4))
    with pytest.raises(ValueError, match="packed codes are"):
        layout_mma16.unpack(torch.zeros(5, dtype=torch.uint8), LutSpec(n=1, k=1, bits=4))
