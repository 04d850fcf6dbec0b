"""Weights against a slow numpy decode, their stored bytes, and the layouts of parameters."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.optimizer.errors import InputError
from paredown.optimizer.weight import (
    Codebook,
    Dense,
    Layout,
    LowRank,
    Sum,
    Uniform,
    Weight,
    format_name,
    rebuild,
)

FAST = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def coded(draw: st.DrawFn, rows: int = 0, columns: int = 0) -> Uniform | Codebook:
    """Draw a weight of codes: any bits, groups that do not divide, blocks of rows that are not full."""
    n, k = rows or draw(st.integers(1, 37)), columns or draw(st.integers(1, 23))
    bits, group = draw(st.integers(1, 8)), draw(st.sampled_from((0, 0, 1, 4, 5, 64)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.randn(n, math.ceil(k / group) if group else 1, generator=generator)
    scale = scale.to(draw(st.sampled_from((torch.float16, torch.float32))))
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        zero = draw(st.integers(0, 2**bits - 1))
        return Uniform(codes=codes, scale=scale, zero=zero, code_bits=bits, group=group, dtype=dtype)
    table_rows = draw(st.sampled_from((0, 16)))
    shape = (math.ceil(n / table_rows) if table_rows else 1, 2**bits)
    table = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    if draw(st.booleans()):
        table = torch.randn(shape, generator=generator).half()
    return Codebook(
        codes=codes, table=table, scale=scale, code_bits=bits, group=group, table_rows=table_rows, dtype=dtype
    )


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """Draw any form of weight."""
    kind = draw(st.sampled_from(("coded", "dense", "low_rank", "sum")))
    if kind == "coded":
        return draw(coded())
    n, k, r = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dense = Dense(values=torch.randn(n, k, generator=generator).to(draw(st.sampled_from(DTYPES))))
    if kind == "dense":
        return dense
    low_rank = LowRank(left=draw(coded(n, r)), right=draw(coded(r, k)))
    return low_rank if kind == "low_rank" else Sum(terms=(draw(coded(n, k)), low_rank, dense))


def slow_dense(weight: Uniform | Codebook) -> np.ndarray:
    """Decode one number after the other, in float32 as the docstrings promise."""
    n, k = weight.codes.shape
    out = np.zeros((n, k), dtype=np.float32)
    scale = weight.scale.float().numpy()
    for i in range(n):
        for j in range(k):
            code = int(weight.codes[i, j])
            if isinstance(weight, Uniform):
                level = np.float32(code - weight.zero)
            else:
                entry = weight.table[i // weight.table_rows if weight.table_rows else 0, code]
                level = np.float32(float(entry)) * np.float32(1 / 127 if entry.dtype == torch.int8 else 1)
            out[i, j] = level * scale[i, j // weight.group if weight.group else 0]
    return out


def rounded(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes."""
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))


@FAST
@given(coded())
def test_codes_decode_as_documented(weight: Uniform | Codebook) -> None:
    assert same(weight.dense(), rounded(slow_dense(weight), weight.dtype))
    assert weight.shape == tuple(weight.codes.shape)


@FAST
@given(st.data(), st.integers(1, 9), st.integers(1, 5), st.integers(1, 9))
def test_low_rank_and_sum_are_products_and_sums(data: st.DataObject, n: int, r: int, k: int) -> None:
    left, right, base = data.draw(coded(n, r)), data.draw(coded(r, k)), data.draw(coded(n, k))
    product = LowRank(left=left, right=right)
    wide = [rounded(slow_dense(part), part.dtype).double().numpy() for part in (left, right)]
    tolerance = 4e-2 if left.dtype != torch.float32 else 1e-5
    size = np.abs(wide[0]) @ np.abs(wide[1])
    assert product.dense().dtype == left.dtype
    assert bool((np.abs(product.dense().double().numpy() - wide[0] @ wide[1]) <= tolerance * size + 1e-6).all())
    total = Sum(terms=(base, product))
    reference = rounded(slow_dense(base), base.dtype).float() + product.dense().float()
    assert same(total.dense(), reference.to(base.dtype))
    assert total.shape == (n, k)
    assert total.dtype == base.dtype


@FAST
@given(weight=weights())
def test_stored_bytes_are_the_bits_and_come_back(tmp_path_factory: pytest.TempPathFactory, weight: Weight) -> None:
    path = tmp_path_factory.getbasetemp() / "weight.safetensors"
    save_file({name: tensor.clone() for name, tensor in weight.tensors().items()}, path)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert weight.bits() == 8 * (path.stat().st_size - header)
    again = rebuild(weight.meta(), load_file(path))
    assert type(again) is type(weight)
    assert again.meta() == weight.meta()
    assert same(again.dense(), weight.dense())
    assert all(same(again.tensors()[name], tensor) for name, tensor in weight.tensors().items())


def test_four_bit_bytes_are_counted_by_hand() -> None:
    codes = torch.zeros(33, 10, dtype=torch.uint8)
    table = torch.zeros(3, 16, dtype=torch.int8)
    weight = Codebook(codes=codes, table=table, scale=torch.ones(33, 3).half(), code_bits=4, group=4, table_rows=16)
    assert weight.bits() == 8 * (33 * 10 // 2 + 3 * 16 + 33 * 3 * 2)
    uniform = Uniform(codes=codes, scale=torch.ones(33, 1), zero=8, code_bits=3)
    assert uniform.bits() == 8 * (math.ceil(330 / 8) * 3 + 33 * 4)


CODES = torch.zeros(4, 6, dtype=torch.uint8)
ONE = torch.ones(4, 1)
BAD: dict[str, tuple[object, str]] = {
    "dtype": (
        lambda: Uniform(codes=CODES.int(), scale=ONE, zero=0, code_bits=4),
        "codes are torch.int32 (4, 6), must be a uint8 matrix",
    ),
    "bits": (
        lambda: Uniform(codes=CODES, scale=ONE, zero=0, code_bits=9),
        "code_bits=9 is out of range; use 2, 3, 4 or 8",
    ),
    "range": (
        lambda: Uniform(codes=CODES + 4, scale=ONE, zero=0, code_bits=2),
        "code 4 does not fit 2 bits",
    ),
    "scale": (
        lambda: Uniform(codes=CODES, scale=ONE, zero=0, code_bits=2, group=4),
        "scale (4, 1) must be (4, 2) for group=4",
    ),
    "table": (
        lambda: Codebook(codes=CODES, table=torch.zeros(1, 4).half(), scale=ONE, code_bits=3),
        "table (1, 4) must be (1, 8)",
    ),
    "entries": (
        lambda: Codebook(codes=CODES, table=torch.zeros(1, 8), scale=ONE, code_bits=3),
        "table entries are torch.float32, must be int8 or float16",
    ),
    "factors": (
        lambda: LowRank(left=Dense(values=torch.ones(2, 3)), right=Dense(values=torch.ones(2, 3))),
        "factors (2, 3) and (2, 3) have no product",
    ),
    "terms": (
        lambda: Sum(terms=(Dense(values=torch.ones(2, 3)), Dense(values=torch.ones(3, 2)))),
        "terms of shapes [(2, 3), (3, 2)] have no sum",
    ),
    "no terms": (lambda: Sum(terms=()), "terms of shapes [] have no sum"),
    "format": (
        lambda: rebuild(
            {"format": "ternary", "code_bits": 2, "shape": [1, 4], "group": 0, "dtype": "float32"},
            {"codes": torch.zeros(1, dtype=torch.uint8), "scale": ONE},
        ),
        'unknown weight format "ternary"; use the version of paredown that wrote it',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parts_are_named(name: str) -> None:
    make, text = BAD[name]
    assert callable(make)
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value) == text


def test_format_names() -> None:
    uniform = Uniform(codes=CODES, scale=ONE, zero=0, code_bits=3)
    table = Codebook(codes=CODES, table=torch.zeros(1, 16).half(), scale=ONE, code_bits=4)
    rank = LowRank(left=Dense(values=torch.ones(4, 2)), right=Dense(values=torch.ones(2, 6)))
    names = [format_name(w) for w in (Dense(values=ONE), uniform, table, rank, Sum(terms=(table, rank)))]
    assert names == ["dense", "uniform 3", "codebook 4", "rank 2", "codebook 4 + rank 2"]


def test_weights_are_values() -> None:
    weight = Uniform(codes=CODES, scale=ONE, zero=0, code_bits=4)
    with pytest.raises(AttributeError):
        weight.zero = 3  # type: ignore[misc]
    changed = replace(weight, zero=3)
    assert (weight.zero, changed.zero) == (0, 3)
    assert changed.codes is weight.codes


LAYOUTS = (
    Layout(kind="matrix", shape=(6, 4)),
    Layout(kind="matrix", shape=(2, 3, 4)),
    Layout(kind="matrix_t", shape=(4, 6)),
    Layout(kind="conv", shape=(6, 4, 3, 2)),
    Layout(kind="conv", shape=(6, 2, 3), groups=3),
    Layout(kind="conv_transpose", shape=(4, 6, 3, 2)),
    Layout(kind="conv_transpose", shape=(4, 3, 3), groups=2),
    Layout(kind="conv_transpose", shape=(6, 1, 2, 2, 2), groups=6),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind} {layout.shape} {layout.groups}")
def test_a_layout_goes_there_and_back(layout: Layout) -> None:
    param = torch.arange(math.prod(layout.shape)).reshape(layout.shape)
    matrix = layout.to_matrix(param)
    assert matrix.ndim == 2
    assert torch.equal(layout.to_param(matrix), param)
    assert torch.equal(layout.to_matrix(layout.to_param(matrix.clone())), matrix)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_row_is_an_output_channel(groups: int, dims: int) -> None:
    """Zero one row of the matrix: exactly that output channel falls silent, in each kind of layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, *(5,) * dims, generator=generator)
    conv, transposed = ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d))[dims - 1]
    for kind, run, shape in (
        ("conv", conv, (12, 8 // groups, *(3,) * dims)),
        ("conv_transpose", transposed, (8, 12 // groups, *(3,) * dims)),
    ):
        layout = Layout(kind=kind, shape=shape, groups=groups)  # type: ignore[arg-type]
        matrix = layout.to_matrix(torch.randn(shape, generator=generator)).clone()
        full = run(x, layout.to_param(matrix), groups=groups)
        for row in (0, 5, 11):
            changed = matrix.clone()
            changed[row] = 0
            quiet = run(x, layout.to_param(changed), groups=groups)
            assert int((quiet[:, row] != 0).sum()) == 0
            others = [c for c in range(12) if c != row]
            assert torch.equal(quiet[:, others], full[:, others])


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_are_inputs_times_taps(groups: int) -> None:
    """A conv's matrix times the patch at one position is its output there; a transposed conv's adjoint is that conv."""
    generator = torch.Generator().manual_seed(1)
    layout = Layout(kind="conv", shape=(6, 4 // groups, 3, 2), groups=groups)
    param, patch = torch.randn(layout.shape, generator=generator), torch.randn(4, 3, 2, generator=generator)
    rows = torch.stack([patch[r * groups // 6 * (4 // groups) :][: 4 // groups].flatten() for r in range(6)])
    expected = F.conv2d(patch[None], param, groups=groups).flatten()
    assert torch.allclose((layout.to_matrix(param) * rows).sum(1), expected, atol=1e-5)
    up = Layout(kind="conv_transpose", shape=(4, 6 // groups, 3, 2), groups=groups)
    param = torch.randn(up.shape, generator=generator)
    pixel = torch.randn(1, 4, 1, 1, generator=generator)
    taps = up.to_matrix(param).reshape(6, 4 // groups, 3, 2)
    inputs = torch.stack([pixel.flatten()[r * groups // 6 * (4 // groups) :][: 4 // groups] for r in range(6)])
    image = (taps * inputs[:, :, None, None]).sum(1)
    assert torch.allclose(F.conv_transpose2d(pixel, param, groups=groups)[0], image, atol=1e-5)
