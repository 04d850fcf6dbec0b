"""Products with packed weights in a file: what one operator computes, what it does not, and how that is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.exporters import onnx as target
from paredown.exporters.runner import RunnerOptions
from paredown.exporters.verify import Spec, compare, verify
from paredown.kernels import native
from paredown.optimizer.errors import ExportError
from paredown.optimizer.model import InputSpec, Model
from paredown.optimizer.weight import Dense, LowRank, Sum, Weight

from .conftest import Attention, build, pack_all, packed

WIDE = InputSpec(name="x", shape=("batch", "time", 40))
FLAT = InputSpec(name="x", shape=("batch", 40))
PORTABLE = RunnerOptions(kernels=False)
SLOW = pytest.mark.slow
BUILT = pytest.mark.skipif(not native.available(), reason="the CPU kernels were not built here")
HOW = pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=BUILT)])
"""By the portable bodies of the file, and by our library."""


class Activations(nn.Module):
    """One layer before each activation, and layers whose values are read by more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.gelu, self.tanh = nn.Linear(40, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 40)
        self.silu, self.twice, self.last = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.relu(x))
        x = F.gelu(self.gelu(x))
        x = F.gelu(self.tanh(x), approximate="tanh")
        x = F.silu(self.silu(x))
        y = self.twice(x)
        return self.last(x + torch.relu(y)), y


class Odd(nn.Module):
    """Products that are no linear layer as torch writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(torch.randn(24, 40)), nn.Parameter(torch.randn(24, 16))
        self.matrix = nn.Parameter(torch.randn(1, 16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x @ self.weight.T)
        return torch.addmm(self.matrix, y, self.turned)


def operators(path: Path) -> dict[str, str]:
    """Return module -> operator, of our operators."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {node.name.rpartition("/")[0]: node.op_type for node in nodes if node.domain == "paredown"}


def summed(model: Model, left: str, rank: int = 3) -> Model:
    """Give each weight four bits and a low rank, whose left factor has a form ("float" for none)."""
    generator, changed = torch.Generator().manual_seed(0), dict[str, Weight]()
    for name, weight in model.weights.items():
        w = weight.dense()
        thin = w[:, :rank].contiguous() * 0.1
        made = Dense(values=thin) if left == "float" else packed(thin, left, generator)
        low = LowRank(left=made, right=packed(w[:rank], "uniform 8", generator))
        changed[name] = Sum(terms=(packed(w, "codebook 4", generator), low))
    return model.with_weights(changed)


def dynamic(model: Model, *names: str) -> Model:
    return replace(model, dynamic=frozenset(names or model.weights))


def test_an_activation_is_computed_with_the_layer_that_it_follows_alone(tmp_path: Path) -> None:
    model, path = pack_all(build(Activations, WIDE), ("codebook 4", "codebook 3")), tmp_path / "net.onnx"
    target.export(model, path)
    assert operators(path) == {
        "relu": "LutLinearRelu",
        "gelu": "LutPlanesLinearGelu",
        "tanh": "LutLinearGeluTanh",
        "silu": "LutPlanesLinearSilu",
        "twice": "LutLinear",
        "last": "LutPlanesLinear",
    }
    assert [n.op_type for n in onnx.load(path).graph.node if n.domain == ""] == ["Relu", "Add"]
    assert max(row.rel for row in verify(model, path, target.open)) < 1e-5


def test_a_gelu_that_the_opset_has_not_stays_apart(tmp_path: Path) -> None:
    model, path = pack_all(build(Activations, WIDE), ("codebook 4",)), tmp_path / "net.onnx"
    target.export(model, path, target.Options(opset=18))
    assert operators(path)["gelu"] == operators(path)["tanh"] == "LutLinear"
    assert operators(path)["silu"] == "LutLinearSilu"
    assert max(row.rel for row in verify(model, path, target.open)) < 1e-5


@pytest.mark.parametrize(
    "left",
    ["codebook 4", *(pytest.param(x, marks=SLOW) for x in ("codebook 3", "float", "uniform 8", "codebook 4 blocks"))],
)
def test_a_low_rank_is_added_by_the_operator_where_it_can(tmp_path: Path, left: str) -> None:
    model, path = summed(build(Activations, FLAT), left), tmp_path / "net.onnx"
    target.export(model, path)
    fused = left not in ("codebook 3", "float")
    names = [node.op_type for node in onnx.load(path).graph.node if node.domain == "paredown"]
    assert names.count("LutLinearLowRankRelu") == fused
    assert sum("LowRank" in name for name in names) == (6 if fused else 0)
    rights = 6
    assert len(names) == rights + 6 + (6 if left == "codebook 3" else 0)
    assert max(row.rel for row in verify(model, path, target.open)) < 1e-5


def test_a_product_of_two_factors_fuses_with_its_last(tmp_path: Path) -> None:
    model, generator = build(Activations, FLAT), torch.Generator().manual_seed(0)
    changed = {
        name: LowRank(left=packed(w.dense()[:, :3], "codebook 4", generator), right=Dense(values=w.dense()[:3]))
        for name, w in model.weights.items()
    }
    target.export(model.with_weights(changed), tmp_path / "net.onnx")
    assert operators(tmp_path / "net.onnx")["silu"] == "LutLinearSilu"
    assert max(row.rel for row in verify(model.with_weights(changed), tmp_path / "net.onnx", target.open)) < 1e-5


def test_products_of_other_forms_are_found(tmp_path: Path) -> None:
    model, path = pack_all(build(Odd, FLAT), ("codebook 4",)), tmp_path / "net.onnx"
    kept = {name: w for name, w in build(Odd, FLAT).weights.items() if name == "matrix"}
    turned = replace(model.layouts["turned"], kind="matrix_t")
    weight = packed(torch.randn(16, 24), "codebook 3", torch.Generator().manual_seed(1))
    model = replace(model.with_weights({**kept, "turned": weight}), layouts={**model.layouts, "turned": turned})
    target.export(model, path)
    nodes = [node for node in onnx.load(path).graph.node if node.domain == "paredown"]
    assert [node.op_type for node in nodes] == ["LutLinear", "LutPlanesLinear"]
    assert nodes[1].input[4] == "no_bias.float32"  # what is added is a matrix
    assert max(row.rel for row in verify(model, path, target.open)) < 1e-5


def test_widths_without_a_kernel_are_decoded(tmp_path: Path) -> None:
    model, path = pack_all(build(Activations, FLAT), ("codebook 5", "codebook 4")), tmp_path / "net.onnx"
    target.export(model, path)
    assert operators(path)["relu"] == "LutDecode"
    assert max(row.rel for row in verify(model, path, target.open)) < 1e-5
    modes = target.modes(path, model)
    assert [modes[f"{name}.weight"].mode for name in ("relu", "gelu")] == ["decoded", "exact"]


FORMS = ("codebook 4 blocks groups", "codebook 3", "uniform 8", "codebook 2", "uniform 4 groups")


@HOW
@pytest.mark.parametrize("module", [Activations, pytest.param(Attention, marks=SLOW)])
def test_rounded_inputs_give_the_values_of_torch(
    tmp_path: Path, module: Callable[[], nn.Module], kernels: bool
) -> None:
    tokens = InputSpec(name="x", shape=("batch", "time"), dtype="int64")
    model = dynamic(pack_all(build(module, WIDE if module is Activations else tokens), FORMS))
    path = tmp_path / "net.onnx"
    target.export(model, path)
    assert all("Int8" in name or name == "LutGather" for name in operators(path).values())
    rows = compare(model, path, target.open, Spec(rel=1.0, kernels=kernels))
    assert max(row.rel for row in rows) < 1e-5
    assert {row.runtime for row in rows} == {f"onnxruntime {'with' if kernels else 'without'} kernels"}
    assert {found.mode for found in target.modes(path, model).values()} == {"int8 dynamic"}
    exact = replace(model, dynamic=frozenset())
    target.export(exact, tmp_path / "exact.onnx")
    assert {found.mode for found in target.modes(tmp_path / "exact.onnx", exact).values()} == {"exact"}


@HOW
@pytest.mark.parametrize("left", ["codebook 4", pytest.param("float", marks=SLOW)])
def test_rounded_inputs_beside_a_low_rank_give_the_values_of_torch(tmp_path: Path, left: str, kernels: bool) -> None:
    model, path = dynamic(summed(build(Activations, FLAT), left)), tmp_path / "net.onnx"
    target.export(model, path)
    names = [node.op_type for node in onnx.load(path).graph.node if node.domain == "paredown"]
    assert names.count("LutLinearInt8LowRankRelu" if left != "float" else "LutLinearInt8") == (
        1 if left != "float" else 6
    )
    rows = compare(model, path, target.open, Spec(rel=1.0, kernels=kernels))
    assert max(row.rel for row in rows) < 1e-5
    wrong = dynamic(model, "relu.weight", "gelu.weight")
    assert max(row.rel for row in compare(wrong, path, target.open, Spec(rel=1.0, kernels=kernels))) > 1e-4


@SLOW
def test_a_tampered_layer_with_rounded_inputs_is_named(tmp_path: Path) -> None:
    model, path = dynamic(summed(build(Activations, FLAT), "codebook 4")), tmp_path / "net.onnx"
    target.export(model, path)
    proto = onnx.load(path)
    (scale,) = [value for value in proto.graph.initializer if value.name == "tanh.weight.0.c16.scale"]
    values = onnx.numpy_helper.to_array(scale) * np.float16(1.5)
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    onnx.save(proto, path)
    with pytest.raises(ExportError, match=r"first in tanh \("):
        verify(model, path, target.open, Spec(kernels=False))


def test_a_use_that_cannot_round_is_an_error(tmp_path: Path) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(40, 40)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner.weight.sum()

    model = dynamic(pack_all(build(Read, FLAT), ("codebook 4",)))
    with pytest.raises(ExportError, match=r"^inner.weight: its inputs are rounded to int8, but ReduceSum reads it"):
        target.export(model, tmp_path / "net.onnx")


def test_the_file_is_as_small_as_its_codes(tmp_path: Path) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1024, 1024)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y

    model = pack_all(build(Large, InputSpec(name="x", shape=("batch", 1024))), ("codebook 3",))
    target.export(model, tmp_path / "net.onnx", target.Options(external_bytes=0))
    data = (tmp_path / "net.onnx.data").stat().st_size
    assert model.size_bytes() <= data + 4096 <= model.size_bytes() + 8192 + math.ceil(data * 0.01)
    x = torch.randn(2, 1024)
    have = target.open(tmp_path / "net.onnx", PORTABLE).run({"x": x.numpy()})["output"]
    np.testing.assert_allclose(have, model.module()(x).detach().numpy(), rtol=1e-4, atol=1e-4)


@HOW
def test_only_files_with_packed_layers_get_the_library(tmp_path: Path, kernels: bool) -> None:
    packs = pack_all(build(Activations, FLAT), ("codebook 4",))
    for name, model in (("packed", packs), ("dense", build(Activations, FLAT))):
        target.export(model, tmp_path / f"{name}.onnx")
    options = RunnerOptions(kernels=kernels)
    assert target.open(tmp_path / "dense.onnx", options).name == "onnxruntime"
    opened = target.open(tmp_path / "packed.onnx", options).name
    assert opened == f"onnxruntime {'with' if kernels else 'without'} kernels"
    assert bool(target.kernels()) == native.available()
