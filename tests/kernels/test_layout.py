"""Layout c16: round trips, and bytes that are where cpu/paredown.h says."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.kernels import layout
from paredown.kernels.lut_spec import LutSpec


@st.composite
def specs(draw: st.DrawFn) -> LutSpec:
    n, k = draw(st.integers(1, 50)), draw(st.integers(1, 150))
    group = draw(st.one_of(st.just(0), st.sampled_from([32, 64]), st.integers(1, 160)))
    return LutSpec(n=n, k=k, bits=draw(st.integers(1, 8)), group=group)


def codes_of(spec: LutSpec, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**spec.bits, (spec.n, spec.k), generator=generator, dtype=torch.uint8)


def slow_code(words: np.ndarray, spec: LutSpec, r: int, c: int) -> int:
    """Read one code from the words as the header describes them."""
    width = spec.group or spec.k
    lengths = [min(width, spec.k - start) for start in range(0, spec.k, width)]
    group, within = c // width, c % width
    step = sum(math.ceil(length / 32) for length in lengths[:group]) + within // 32
    total = sum(math.ceil(length / 32) for length in lengths)
    unit, code, below = ((r // 16) * total + step) * spec.bits, 0, 0
    for w in (8, 4, 2, 1):
        if spec.bits & w:
            of_unit, i = divmod(within % 32, 32 // w)
            f, b = divmod(i, 4)
            word = int(words[(unit + of_unit) * 16 + r % 16])
            code |= (word >> (8 * b + w * f) & (2**w - 1)) << below
            unit, below = unit + w, below + w
    return code


@settings(deadline=None)
@given(spec=specs(), seed=st.integers(0, 9))
def test_codes_survive(spec: LutSpec, seed: int) -> None:
    codes = codes_of(spec, seed)
    packed = layout.pack(codes, spec)
    assert packed.shape == (layout.codes_bytes(spec),)
    assert torch.equal(layout.unpack(packed, spec), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 0), (17, 70, 0), (20, 75, 33), (16, 64, 32), (3, 40, 7)])
def test_each_code_is_where_the_header_says(bits: int, n: int, k: int, group: int) -> None:
    spec = LutSpec(n=n, k=k, bits=bits, group=group)
    codes = codes_of(spec, bits)
    words = layout.pack(codes, spec).numpy().view("<u4")
    assert [slow_code(words, spec, r, c) for r in range(n) for c in range(k)] == codes.flatten().tolist()


@settings(deadline=None)
@given(spec=specs())
def test_what_fills_up_is_zero(spec: LutSpec) -> None:
    full = torch.full((spec.n, spec.k), 2**spec.bits - 1, dtype=torch.uint8)
    ones = sum(int(byte).bit_count() for byte in layout.pack(full, spec))
    assert ones == spec.n * spec.k * spec.bits


@settings(deadline=None)
@given(spec=specs(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_scales_survive(spec: LutSpec, dtype: torch.dtype) -> None:
    scale = torch.randn(spec.scale_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = layout.pack_scale(scale, spec)
    assert packed.is_contiguous()
    assert torch.equal(layout.unpack_scale(packed, spec), scale)
    r, g = spec.n - 1, spec.scale_shape[1] - 1
    assert packed[r // 16, g, r % 16] == scale[r, g]
    assert int((packed != 0).sum()) == int((scale != 0).sum())


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LutSpec(n=100, k=70, bits=3, group=20)
    codes = codes_of(spec, 0)
    whole = layout.pack(codes, spec)
    monkeypatch.setattr(layout, "AT_ONCE", 1)
    assert torch.equal(layout.pack(codes, spec), whole)
    assert torch.equal(layout.unpack(whole, spec), codes)


def test_bad_tensors_are_named() -> None:
    spec = LutSpec(n=20, k=40, bits=4)
    with pytest.raises(ValueError, match=r"codes are torch.uint8 \(20, 41\), must be torch.uint8 \(20, 40\)"):
        layout.pack(torch.zeros(20, 41, dtype=torch.uint8), spec)
    with pytest.raises(ValueError, match=r"packed codes are torch.uint8 \(3,\), must be torch.uint8 \(1024,\)"):
        layout.unpack(torch.zeros(3, dtype=torch.uint8), spec)
    with pytest.raises(ValueError, match=r"scales are \(20, 2\), must be \(20, 1\)"):
        layout.pack_scale(torch.zeros(20, 2), spec)
    with pytest.raises(ValueError, match=r"packed scales are \(20, 1\), must be \(2, 1, 16\)"):
        layout.unpack_scale(torch.zeros(20, 1), spec)
