"""The operator in torch, in both modes and with all it can add, against numpy in float64."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paredown.kernels import lut_linear as module
from paredown.kernels import lut_reference, native
from paredown.kernels.lut_arguments import PARTS, numbers, tensors
from paredown.kernels.lut_linear import LowRank, LutLinear, lut_linear
from paredown.kernels.lut_spec import ACTIVATIONS, MODES, LutParts, LutSpec

from .lut_cases import BYTES, SPECS, Case, Float64, activate, case, rounded, specs

WAYS = ["reference", *(["compiled"] if native.available() else [])]
ALL_BITS = tuple(range(1, 9))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(module.native, "available", lambda: False)
    return str(request.param)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_spec(spec: LutSpec) -> LutSpec:
    """The same sizes with a table of bytes, which int8 products need."""
    sizes = {"n": spec.n, "k": spec.k, "bits": spec.bits, "group": spec.group, "table_rows": spec.table_rows}
    return LutSpec(**sizes, zero=BYTES[0], unit=BYTES[1])


def wanted(x: torch.Tensor, weight: Case, mode: str) -> tuple[Float64, Float64]:
    """x W^T without rounding, and how far a product of this type may be from it."""
    rows = x.float().numpy().reshape(-1, weight.spec.k)
    used = (rounded(rows, weight.spec) if mode == "int8" else rows).astype(np.float64)
    y, size = used @ weight.weight.T.astype(np.float64), np.abs(used) @ np.abs(weight.weight.T)
    shape = (*x.shape[:-1], weight.spec.n)
    error = size * (weight.spec.k + 4) * 2.0**-24 + np.abs(y) * torch.finfo(x.dtype).eps
    return y.reshape(shape), error.reshape(shape) + 1e-30


@settings(deadline=None)
@given(spec=specs(ALL_BITS), seed=st.integers(0, 9))
def test_decode_equals_numpy_bit_for_bit(spec: LutSpec, seed: int) -> None:
    weight = case(spec, seed)
    assert np.array_equal(lut_reference.decode(weight.parts, spec).numpy(), weight.weight)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_identity_reproduces_the_weight(spec: LutSpec, way: str) -> None:
    weight = case(spec)
    assert np.array_equal(lut_linear(torch.eye(spec.k), weight.parts, spec).T.numpy(), weight.weight)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_products_stay_within_their_bound(shape: tuple[int, ...], dtype: torch.dtype, mode: Any, way: str) -> None:
    for spec in map(bytes_spec, SPECS):
        weight = case(spec)
        for x in (random(*shape, spec.k), random(*shape, 2 * spec.k)[..., ::2], random(spec.k).expand(*shape, -1)):
            y, error = wanted(x.to(dtype), weight, mode)
            have = lut_linear(x.to(dtype), weight.parts, spec, mode=mode)
            assert have.dtype == dtype
            assert have.shape == y.shape
            assert (np.abs(have.double().numpy() - y) <= error).all()


@settings(max_examples=30, deadline=None)
@given(spec=specs(ALL_BITS), seed=st.integers(0, 9), mode=st.sampled_from(MODES), m=st.integers(1, 5))
def test_both_ways_mean_the_same(spec: LutSpec, seed: int, mode: Any, m: int) -> None:
    weight, x = case(bytes_spec(spec), seed), random(m, spec.k, seed=seed)
    y, error = wanted(x, weight, mode)
    assert (np.abs(lut_linear(x, weight.parts, weight.spec, mode=mode).double().numpy() - y) <= error).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_low_rank_and_activation(activation: Any, mode: Any, dtype: torch.dtype, way: str) -> None:
    spec, left = bytes_spec(SPECS[3]), case(LutSpec(n=SPECS[3].n, k=5, bits=8, zero=BYTES[0], unit=BYTES[1]), 1)
    weight, x, t = case(spec), random(2, 3, spec.k).to(dtype), random(2, 3, 5, seed=2).to(dtype)
    bias = random(2 * spec.n, seed=3).to(dtype)[::2]
    y, error = wanted(x, weight, mode)
    low, low_error = wanted(t, left, "exact")
    total = activate(y + low + bias.double().numpy(), activation)
    bound = 1.2 * (error + low_error) + (np.abs(total) + np.abs(y + low) + 1) * torch.finfo(dtype).eps * 4
    term = LowRank(t=t, parts=left.parts, spec=left.spec)
    have = lut_linear(x, weight.parts, spec, mode=mode, activation=activation, bias=bias, low=term)
    assert have.dtype == dtype
    assert (np.abs(have.double().numpy() - total) <= bound).all()


def test_doubles_are_summed_in_doubles() -> None:
    weight, x = case(SPECS[1]), random(4, SPECS[1].k).double()
    have = lut_linear(x, weight.parts, SPECS[1])
    assert have.dtype == torch.float64
    np.testing.assert_allclose(have.numpy(), x.numpy() @ weight.weight.T.astype(np.float64), rtol=1e-12, atol=1e-12)


def test_rounding_leaves_tiny_runs_zero() -> None:
    x = torch.tensor([[3e-37, -1e-40, 0.0, 1.0]])
    assert lut_reference.round_inputs(x, 2).tolist() == [[0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS[1:3], ids=str)
def test_opcheck(spec: LutSpec, mode: Any, way: str) -> None:
    spec = bytes_spec(spec)
    weight, left = case(spec), case(LutSpec(n=spec.n, k=3, bits=4, zero=8.0))
    for extra in ((), (random(spec.n), random(2, 3), *tensors(left.parts), *numbers(left.spec))):
        arguments = (random(2, spec.k), *tensors(weight.parts), *numbers(spec), mode, "gelu", *extra)
        result = torch.library.opcheck(torch.ops.paredown.lut_linear.default, arguments)
        assert set(result.values()) == {"SUCCESS"}


def layer(mode: Any = "exact", seed: int = 0) -> LutLinear:
    spec = bytes_spec(SPECS[3])
    weight, left = case(spec, seed), case(LutSpec(n=spec.n, k=4, bits=8, zero=BYTES[0], unit=BYTES[1]), seed)
    right = nn.Linear(spec.k, 4, bias=False)
    nn.init.constant_(right.weight, 0.25)
    return LutLinear(
        weight.parts, spec, mode=mode, bias=random(spec.n), left=(left.parts, left.spec), right=right, activation="relu"
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_is_the_operator(mode: Any) -> None:
    made = layer(mode)
    x, spec = random(3, made.in_features), made.spec
    parts = LutParts(codes=made.codes, table=made.table, scale=made.scale)
    left = LutParts(codes=made.left_codes, table=made.left_table, scale=made.left_scale)
    assert made.left_spec is not None
    low = LowRank(t=x @ torch.full((spec.k, 4), 0.25), parts=left, spec=made.left_spec)
    want = lut_linear(x, parts, spec, mode=mode, activation="relu", bias=made.bias, low=low)
    torch.testing.assert_close(made(x), want)
    assert str(made).startswith(f"LutLinear(\n  70, 40, bits=2, mode={mode}, activation=relu\n  (right): Linear(")


def test_the_state_of_a_layer_is_its_codes() -> None:
    made, other, file = layer(), layer(seed=3), io.BytesIO()
    x = random(3, made.in_features)
    torch.save(made.state_dict(), file)
    file.seek(0)
    assert not torch.equal(made(x), other(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(made(x), other(x))
    assert [*made.state_dict()] == [
        *("codes", "table", "scale", "left_codes", "left_table", "left_scale", "bias", "right.weight")
    ]


def test_conversion_leaves_codes_tables_and_scales_alone() -> None:
    spec = LutSpec(n=20, k=24, bits=3, group=8)
    weight = case(spec)
    made = LutLinear(weight.parts, spec, bias=random(20)).bfloat16()
    assert made.bias is not None
    assert [made.codes.dtype, made.table.dtype, made.scale.dtype, made.bias.dtype] == [
        *(torch.uint8, torch.float16, torch.float32, torch.bfloat16)
    ]
    assert torch.equal(made.scale, weight.parts.scale)
    assert made(random(2, 24).bfloat16()).dtype == torch.bfloat16
    assert LutLinear(weight.parts, spec).to("meta").half().scale.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch 2.13 warns of itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_layer_can_be_compiled(backend: str, way: str) -> None:
    net = nn.Sequential(layer("int8"), nn.LayerNorm(40), nn.ReLU()).requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 5):
        x = random(rows, 70)
        torch.testing.assert_close(compiled(x), net(x))


def test_a_layer_can_be_exported() -> None:
    net = nn.Sequential(layer(), nn.ReLU())
    exported = torch.export.export(net, (random(3, 70),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert "paredown.lut_linear.default" in str(exported.graph)
    x = random(7, 70)
    torch.testing.assert_close(exported.module()(x), net(x))


def test_another_device_brings_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend sees a checked call; the meta device stands for one here."""
    seen: list[module.Call] = []
    library = torch.library.Library("paredown", "FRAGMENT")  # type: ignore[no-untyped-call]
    monkeypatch.setattr(module, "_LIBRARY", library)

    def run(call: module.Call) -> torch.Tensor:
        seen.append(call)
        return call.x.new_empty((*call.x.shape[:-1], call.spec.n))

    module.backend("SparseCPU", run)
    weight = case(SPECS[1])
    with pytest.raises(ValueError, match="x is"):
        lut_linear(torch.zeros(2, 3).to_sparse(), weight.parts, SPECS[1])
    assert lut_linear(torch.zeros(2, 30).to_sparse(), weight.parts, SPECS[1]).shape == (2, 33)
    assert [call.spec for call in seen] == [SPECS[1]]
    library._destroy()


def test_there_is_no_gradient() -> None:
    weight, x = case(SPECS[1]), random(2, 30).requires_grad_()
    with pytest.raises(RuntimeError, match=r"compressed models are for inference, use torch.no_grad\(\)"):
        lut_linear(x, weight.parts, SPECS[1])
    with torch.no_grad():
        assert lut_linear(x, weight.parts, SPECS[1]).shape == (2, 33)


BAD: list[tuple[str, dict[str, Any]]] = [
    (r"x is \(2, 12\), the weight \(33, 30\) takes 30 columns", {"x": torch.zeros(2, 12)}),
    ("activations of torch.int64 are not floating point", {"x": torch.zeros(2, 30, dtype=torch.int64)}),
    (r"bias is torch.float32 \(3,\), must be torch.float32 \(33,\) like x", {"bias": torch.zeros(3)}),
    (r"bias is torch.float16 \(33,\), must be torch.float32 \(33,\) like x", {"bias": torch.zeros(33).half()}),
    (r"codes is torch.uint8 \(3,\), must be torch.uint8 \(3072,\)", {"codes": torch.zeros(3, dtype=torch.uint8)}),
    (r"table is torch.int8 \(3, 16\), must be torch.uint8 or", {"table": torch.zeros(3, 16, dtype=torch.int8)}),
    (r"scale is torch.float32 \(3, 4, 16\) with gaps, must be", {"scale": torch.zeros(3, 4, 32)[..., ::2]}),
    ("int8 products need a table of bytes, this one is float16", {"mode": "int8"}),
    ("no mode 'fast' with activation ''", {"mode": "fast"}),
    ("no mode 'exact' with activation 'tanh'", {"activation": "tanh"}),
    (r"t is torch.float32 \(2, 4\), must be torch.float32 \(2, 5\) like x", {"t": torch.zeros(2, 4)}),
]


@pytest.mark.parametrize(("text", "change"), BAD, ids=[text for text, _ in BAD])
def test_bad_arguments_are_named(text: str, change: dict[str, Any]) -> None:
    spec = SPECS[1]
    weight, left = case(spec), case(LutSpec(n=spec.n, k=5, bits=8, zero=1.0))
    parts = {name: change.get(name, getattr(weight.parts, name)) for name in PARTS}
    low = LowRank(t=change["t"], parts=left.parts, spec=left.spec) if "t" in change else None
    rest = {name: value for name, value in change.items() if name in ("mode", "activation", "bias")}
    with pytest.raises(ValueError, match=text):
        lut_linear(change.get("x", torch.zeros(2, 30)), LutParts(**parts), spec, low=low, **rest)


@pytest.mark.parametrize("part", ["x", "bias", "t", *PARTS])
def test_tensors_of_two_devices_are_refused(part: str) -> None:
    """Kernels read addresses: of a tensor that is elsewhere they would read anything."""
    spec = SPECS[1]
    weight, left = case(spec), case(LutSpec(n=spec.n, k=5, bits=8, zero=1.0))
    given = {"x": torch.zeros(2, 30), "bias": torch.zeros(33), "t": torch.zeros(2, 5)}
    given |= dict(zip(PARTS, tensors(weight.parts), strict=True))
    given[part] = given[part].to("meta")
    low = LowRank(t=given["t"], parts=left.parts, spec=left.spec)
    with pytest.raises(ValueError, match=r"tensors are on (cpu and meta|meta and cpu), must be on one device"):
        lut_linear(given["x"], LutParts(**{name: given[name] for name in PARTS}), spec, bias=given["bias"], low=low)


def test_numbers_that_are_missing_are_named() -> None:
    parts = tensors(case(SPECS[1]).parts)
    with pytest.raises(ValueError, match=r"sizes=\(33, 30\), grid=\(0.0, 1.0\): must be n, k, bits, group, table_rows"):
        torch.ops.paredown.lut_linear(torch.zeros(2, 30), *parts, [33, 30], [0.0, 1.0])


def test_bad_weights_are_named() -> None:
    with pytest.raises(ValueError, match="bits=9 is out of range; use 1 to 8"):
        LutSpec(n=1, k=1, bits=9)
    with pytest.raises(ValueError, match=r"\(0, 1\), group=0, table_rows=0 is no weight"):
        LutSpec(n=0, k=1, bits=4)
    weight = case(SPECS[1])
    with pytest.raises(ValueError, match="a low-rank term needs both factors: left and right"):
        LutLinear(weight.parts, SPECS[1], right=nn.Linear(30, 2))
