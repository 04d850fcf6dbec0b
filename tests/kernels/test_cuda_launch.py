"""How the CUDA kernels are started: forms, grids, shared memory and tables, as pure functions of a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paredown.kernels import layout_mma16
from paredown.kernels.cuda import launch, tables, units
from paredown.kernels.cuda.launch import ARGUMENTS, FORMS, GEMVS, KINDS, POINTERS, TILES
from paredown.kernels.cuda.sources import LINEAR, UNITS
from paredown.kernels.lut_spec import LutSpec

WEIGHT = LutSpec(n=4096, k=4096, bits=4, group=128, zero=128.0)
STATIC_LIMIT, SMALLEST_LIMIT = 48 * 1024, 99 * 1024
"""Bytes of shared memory of a block without asking, and at most on sm_86, sm_89 and sm_120 (CUDA programming guide)."""


@pytest.mark.parametrize(("kind", "bits"), LINEAR)
def test_shared_memory_is_there_on_every_gpu(kind: launch.Kind, bits: int) -> None:
    """For few rows of x no kernel asks for more than it has anyway, so that TensorRT can start it too."""
    for form in FORMS:
        used = launch.shared(form, bits, kind)
        assert 0 < used <= (SMALLEST_LIMIT if form in TILES else STATIC_LIMIT)


@given(st.integers(1, 20_000), st.integers(1, 300), st.sampled_from((0, 16, 48)), st.integers(1, 150))
def test_blocks_cover_rows_and_tokens_and_inputs_once(n: int, m: int, table_rows: int, processors: int) -> None:
    spec = LutSpec(n=n, k=4096, bits=3, table_rows=table_rows, zero=128.0)
    form = launch.choose(spec, m, processors)
    parts = launch.splits(spec, m, form, processors)
    start = launch.linear(spec, m, "s8", form, parts)
    assert start.grid == (math.ceil(n / form.rows), math.ceil(m / form.tokens), parts)
    assert (form in TILES) == (m > 16)
    assert parts == 1 or start.grid[0] * start.grid[1] * parts <= processors
    assert parts <= layout_mma16.shape(spec).units // 8 or parts == 1


def test_wide_weights_take_blocks_of_32_rows() -> None:
    names = {m: launch.choose(WEIGHT, m, 132).name for m in (1, 9, 17, 33)}
    assert names == {1: "gemv_r16_m8", 9: "gemv_r16_m16", 17: "tile_r128_m32", 33: "tile_r128_m64"}
    wide = LutSpec(n=28672, k=8192, bits=4, table_rows=48)
    assert launch.choose(wide, 1, 132).rows == 16
    assert launch.choose(LutSpec(n=28672, k=8192, bits=4), 1, 132).rows == 32


def test_a_small_weight_is_cut_into_parts_until_every_processor_has_a_block() -> None:
    assert launch.splits(WEIGHT, 64, TILES[1], 132) == 4
    assert launch.splits(WEIGHT, 64, TILES[1], 20) == 1
    assert launch.splits(LutSpec(n=128, k=1024, bits=4), 17, TILES[0], 132) == 1


def test_refusals_say_why() -> None:
    cases = {
        "codes of 5 bits": (LutSpec(n=16, k=16, bits=5), "f16", GEMVS[0], 1),
        "at 4 bits, not 3": (LutSpec(n=16, k=16, bits=3), "f16b", GEMVS[0], 1),
        "serves 8 rows": (LutSpec(n=16, k=16, bits=4, table_rows=8), "f16", GEMVS[0], 1),
        "zero point 0.5 is not whole": (LutSpec(n=16, k=16, bits=4, zero=0.5), "s8", GEMVS[0], 1),
        "one table for 32 rows, here each serves 16": (LutSpec(n=32, k=16, bits=4, table_rows=16), "f16", GEMVS[2], 1),
        "does not cut the inputs into 2 parts": (LutSpec(n=16, k=16, bits=4), "f16", GEMVS[0], 2),
    }
    for text, (spec, kind, form, parts) in cases.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            launch.linear(spec, 1, kind, form, parts)


def test_the_kind_follows_activations_mode_and_table() -> None:
    octets, halves = torch.uint8, torch.float16
    three = LutSpec(n=1, k=1, bits=3, zero=128.0)
    assert launch.kind_of(WEIGHT, octets, torch.float16, "exact") == "f16b"
    assert launch.kind_of(three, octets, torch.float16, "exact") == "f16"
    assert launch.kind_of(WEIGHT, halves, torch.float16, "exact") == "f16"
    assert launch.kind_of(WEIGHT, octets, torch.bfloat16, "exact") == "bf16"
    assert launch.kind_of(WEIGHT, octets, torch.float32, "exact") is None
    assert launch.kind_of(WEIGHT, octets, torch.float32, "int8") == "s8"
    assert launch.kind_of(WEIGHT, halves, torch.float16, "int8") is None
    assert launch.kind_of(LutSpec(n=1, k=1, bits=8), octets, torch.float16, "exact") is None


@pytest.mark.parametrize(
    ("group", "k", "stride", "address", "wanted"),
    [
        (128, 256, 256, 32, True),
        (0, 40, 40, 0, True),
        (40, 40, 40, 0, True),
        (48, 96, 96, 0, False),
        (128, 260, 264, 0, False),
        (128, 256, 260, 0, False),
        (128, 256, 256, 8, False),
    ],
)
def test_x_is_read_in_place_where_16_bytes_are_8_inputs_of_a_step(
    group: int, k: int, stride: int, address: int, wanted: bool
) -> None:
    assert launch.reads_in_place(LutSpec(n=1, k=k, bits=4, group=group), stride, address) is wanted


def test_tables() -> None:
    table = torch.tensor([[0, 1, 128, 255], [7, 6, 5, 4]], dtype=torch.uint8)
    spec = LutSpec(n=32, k=1, bits=2, table_rows=16, zero=128.0, unit=0.5)
    assert tables.device_table(table, spec, "s8").view(torch.int8).tolist() == [
        [-128, -127, 0, 127],
        [-121, -122, -123, -124],
    ]
    found = tables.device_table(table, spec, "f16").numpy()
    low, high = found[:, :4].astype(np.uint16), found[:, 4:].astype(np.uint16)
    assert np.array_equal((low | high << 8).view(np.float16), table.numpy().astype(np.float16) - 128)
    assert tables.dense_table(table, spec).tolist() == ((table.double() - 128) / 2).tolist()
    assert tables.shift_bits(spec, "f16b") & 0xFFFFFFFF == 0x64806480
    assert tables.shift_bits(spec, "s8") == 0
    assert tables.shift_bits(spec, "f16") == 0
    assert tables.float_bits(-2.0) & 0xFFFFFFFF == 0xC0000000


def test_arguments_are_those_of_the_source() -> None:
    """Names, order, and which are pointers; the output is last."""
    text = (units.FOLDER / "prepare.cu").read_text() + (units.FOLDER / "linear.cuh").read_text().replace("\\\n", " ")
    lists = {found[1]: found[2] for found in re.finditer(r"paredown_([a-z]+)\((\w[^)]*\w)\) \{", text)}
    lists["linear"] = re.search(r"#define PD_LINEAR_PARAMETERS(.*)", text)[1]
    for name, wanted in ARGUMENTS.items():
        found = [part.split() for part in lists[name].replace("*", "* ").split(",")]
        assert tuple(part[-1] for part in found) == wanted, name
        assert {part[-1] for part in found if "*" in part[-2]} == POINTERS & set(wanted), name
        assert {tuple(part[:-1]) for part in found if "*" not in part[-2]} <= {("int",)}, name
        assert wanted[-1] in POINTERS


def test_units_are_kinds_and_widths() -> None:
    assert len(UNITS) == len(LINEAR) + 1
    for kind, bits in LINEAR:
        text = (units.FOLDER / f"linear_{kind}_{bits}.cu").read_text()
        assert f", {kind}, {bits})" in text
        assert kind in KINDS


def test_scales_become_halves_where_nothing_is_lost() -> None:
    exact, inexact = torch.tensor([[0.5, 0.013]]).bfloat16(), torch.tensor([[1e-9]]).bfloat16()
    assert tables.device_scale(exact).dtype == torch.float16
    assert torch.equal(tables.device_scale(exact).float(), exact.float())
    assert tables.device_scale(inexact) is inexact


@pytest.mark.parametrize("start", [launch.quantize, launch.pad])
def test_as_many_rows_of_x_as_memory_holds(start: Callable[[LutSpec, int], launch.Launch]) -> None:
    """The grid's y and z end at 65535 (CUDA programming guide)."""
    assert max(start(WEIGHT, 10**6).grid[1:]) <= 65535
    assert max(launch.reduce(WEIGHT.n, 10**6).grid[1:]) <= 65535
