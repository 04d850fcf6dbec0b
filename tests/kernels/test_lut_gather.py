"""Rows of a weight in torch, and the embedding of them, against numpy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.kernels import layout, lut_gather, native
from paredown.kernels.lut_arguments import numbers, tensors
from paredown.kernels.lut_spec import LutParts, LutSpec

from .lut_cases import SPECS, case, specs

WAYS = ["reference", *(["compiled"] if native.available() else [])]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(native, "available", lambda: False)
    return str(request.param)


@settings(deadline=None)
@given(spec=specs(tuple(range(1, 9))), seed=st.integers(0, 9), count=st.integers(0, 40))
def test_codes_of_rows_are_those_of_the_whole(spec: LutSpec, seed: int, count: int) -> None:
    weight = case(spec, seed)
    rows = torch.randint(0, spec.n, (count,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layout.unpack_rows(weight.parts.codes, spec, rows), weight.codes[rows])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_rounded_once(shape: tuple[int, ...], dtype: torch.dtype, way: str) -> None:
    for spec in SPECS:
        weight = case(spec)
        for kind in (torch.int64, torch.int32):
            indices = torch.randint(0, spec.n, shape, generator=torch.Generator().manual_seed(0)).to(kind)
            have = lut_gather.lut_gather(indices, weight.parts, spec, dtype)
            assert have.dtype == dtype
            assert torch.equal(have, torch.from_numpy(weight.weight)[indices.long()].to(dtype))


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_opcheck(spec: LutSpec, way: str) -> None:
    indices, weight = torch.tensor([[0, spec.n - 1]]), case(spec)
    arguments = (indices, *tensors(weight.parts), *numbers(spec), torch.float16)
    result = torch.library.opcheck(torch.ops.paredown.lut_gather.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


def test_an_embedding_is_compiled_exported_and_converted(way: str) -> None:
    spec = SPECS[1]
    weight = case(spec)
    made, indices = lut_gather.LutEmbedding(weight.parts, spec), torch.tensor([[3, 32, 0]])
    want = torch.from_numpy(weight.weight)[indices]
    assert torch.equal(made(indices), want)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(indices), want)
    exported = torch.export.export(made, (indices,), dynamic_shapes=({1: torch.export.Dim("tokens")},))
    assert torch.equal(exported.module()(indices[:, :2]), want[:, :2])
    assert [*made.state_dict()] == ["codes", "table", "scale"]
    assert str(made) == "LutEmbedding(33, 30, bits=4)"
    assert torch.equal(made.half()(indices), want.half())
    assert made.scale.dtype == torch.float32


BAD: list[tuple[type[Exception], str, torch.Tensor, dict[str, Any]]] = [
    (IndexError, "indices 0 to 33, the weight has 33 rows", torch.tensor([0, 33]), {}),
    (IndexError, "indices -1 to 2, the weight has 33 rows", torch.tensor([-1, 2]), {}),
    (ValueError, "indices are torch.float32, must be torch.int64 or torch.int32", torch.zeros(2), {}),
    (ValueError, r"lut_gather: table is torch.uint8 \(1,\)", torch.tensor(0), {"table": torch.zeros(1).byte()}),
    (ValueError, "tensors are on meta and cpu, must be on one device", torch.tensor(0, device="meta"), {}),
]


@pytest.mark.parametrize(("error", "text", "indices", "change"), BAD, ids=[text for _, text, *_ in BAD])
def test_bad_arguments_are_named(
    error: type[Exception], text: str, indices: torch.Tensor, change: dict[str, Any], way: str
) -> None:
    parts = case(SPECS[1]).parts
    tensors_of = {"codes": parts.codes, "table": parts.table, "scale": parts.scale} | change
    with pytest.raises(error, match=text):
        lut_gather.lut_gather(indices, LutParts(**tensors_of), SPECS[1])
