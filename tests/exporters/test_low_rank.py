"""Low ranks in the file: two operators for a layer, their multiplications, and sums on every kind of layer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper, shape_inference
from torch import Tensor, nn

from paredown.exporters import onnx as target
from paredown.exporters.verify import verify
from paredown.optimizer import cost, entry, lowrank, store
from paredown.optimizer.graph import capture
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.weight import Dense, Layout, LowRank, Sum, Weight

from .conftest import packed

IMAGE = (InputSpec(name="image", shape=("batch", 6, 9, 9)),)
FACTORS = ("float", "codebook 4", "uniform 8")


class Layers(nn.Module):
    """A strided, a dilated and a transposed convolution, one used twice, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(6, 12, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(12, 12, (3, 1), dilation=2, padding="same", bias=False)
        self.up = nn.ConvTranspose2d(12, 10, 3, stride=2, padding=1, output_padding=1)
        self.grouped = nn.Conv2d(10, 10, 3, groups=5)
        self.line = nn.Conv1d(10, 8, 5)
        self.head = nn.Linear(8, 6)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.strided(image))
        x = self.dilated(torch.relu(self.dilated(x)))
        x = self.grouped(torch.relu(self.up(x)))
        y: Tensor = self.head(self.line(x.flatten(2)).mean(2))
        return y


class Words(nn.Module):
    """An embedding, tied with the head, and an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.own = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.middle(self.tied(tokens) + self.own(tokens))))
        return y


def build(module: type[nn.Module], inputs: tuple[InputSpec, ...]) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return from_module(module(), inputs, Source(entry="nets.py:net"))


def formed(values: Tensor, form: str, generator: torch.Generator) -> Weight:
    return Dense(values=values) if form == "float" else packed(values, form, generator)


def low_rank(matrix: Tensor, rank: int, form: str, generator: torch.Generator) -> LowRank:
    left, right = (factor.float().contiguous() for factor in lowrank.spectrum(matrix).factors(rank))
    return LowRank(left=formed(left, form, generator), right=formed(right, form, generator))


def factorized(model: Model, rank: int, form: str) -> Model:
    generator = torch.Generator().manual_seed(0)
    return model.with_weights({k: low_rank(w.dense(), rank, form, generator) for k, w in model.weights.items()})


def summed(model: Model) -> Model:
    generator = torch.Generator().manual_seed(1)
    changed: dict[str, Weight] = {}
    for name, weight in model.weights.items():
        base = packed(weight.dense(), "codebook 3", generator)
        changed[name] = Sum(terms=(base, low_rank(weight.dense() - base.dense(), 3, "uniform 8", generator)))
    return model.with_weights(changed)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every value at batch 1, initializers included."""
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph = shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    known = {v.name: tuple(dim.dim_value for dim in v.type.tensor_type.shape.dim) for v in values}
    return known | {v.name: tuple(v.dims) for v in graph.initializer}


def multiplications(path: Path) -> int:
    """Count the multiply-accumulates of a file's operators at batch 1, from its shapes alone."""
    known, total = shapes(path), 0
    for node in onnx.load(path).graph.node:
        size = known[node.output[0]]
        if node.op_type == "Conv":
            total += math.prod(size) * math.prod(known[node.input[1]][1:])
        elif node.op_type == "ConvTranspose":
            total += math.prod(known[node.input[0]]) * math.prod(known[node.input[1]][1:])
        elif node.op_type in ("MatMul", "Gemm") and node.input[0] not in known:
            raise AssertionError(node.input[0])
        elif node.op_type == "MatMul":
            total += math.prod(size) * known[node.input[0]][-1]
    return total


@pytest.mark.parametrize("form", [pytest.param(x, marks=[pytest.mark.slow] * (x != "codebook 4")) for x in FACTORS])
def test_every_layer_exports_as_two_and_verifies(tmp_path: Path, form: str) -> None:
    model, path = factorized(build(Layers, IMAGE), 3, form), tmp_path / "net.onnx"
    target.export(model, path)
    rows = verify(model, path, target.open)
    assert [row.batch for row in rows] == [1, 3]
    assert max(row.rel for row in rows) < 1e-5
    nodes = onnx.load(path).graph.node
    kinds = [node.op_type for node in nodes]
    # strided, dilated twice and line become two Conv each, up one more; grouped stays one
    assert (kinds.count("Conv"), kinds.count("ConvTranspose")) == (2 + 4 + 1 + 1 + 2, 1)
    assert sum(kind.startswith("Lut") and "Linear" in kind for kind in kinds) == (0 if form == "float" else 2)


def test_a_convolution_is_its_thin_self_and_a_pointwise_one(tmp_path: Path) -> None:
    model, path = factorized(build(Layers, IMAGE), 3, "float"), tmp_path / "net.onnx"
    target.export(model, path)
    graph, known = onnx.load(path).graph, shapes(path)
    nodes = {node.name: node for node in graph.node}
    made = {out: node for node in graph.node for out in node.output}
    wanted = {"strided": (3, 6, 3, 3), "dilated": (3, 12, 3, 1), "up": (12, 3, 3, 3), "line": (3, 10, 5)}
    for layer, shape in wanted.items():
        (last, *_) = [
            n for name, n in nodes.items() if name.startswith(f"{layer}/") and n.input[1:2] == [f"{layer}.weight.left"]
        ]
        first = made[last.input[0]]
        assert known[first.input[1]] == shape
        assert len(first.input) == 2
        assert first.op_type == ("ConvTranspose" if layer == "up" else "Conv")
        rows, spatial = model.weights[f"{layer}.weight"].shape[0], len(shape) - 2
        assert known[last.input[1]] == (rows, 3, *(1,) * spatial)
        assert list(last.input[2:]) == ([] if layer == "dilated" else [f"{layer}.bias"])
        assert not {a.name for a in last.attribute} & {"strides", "pads", "dilations", "group"}
    given = {a.name: list(a.ints) for a in made[made["convolution_1"].input[0]].attribute if a.ints}
    assert given["dilations"] == [2, 2]
    held = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    weight = model.weights["strided.weight"]
    assert isinstance(weight, LowRank)
    assert (held["strided.weight.left"][:, :, 0, 0] == weight.left.dense().numpy()).all()
    assert (held["strided.weight.right"].reshape(3, -1) == weight.right.dense().numpy()).all()
    assert not {"strided.weight", "up.weight", "line.weight"} & set(held)


@pytest.mark.parametrize("rank", [3, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (1, 5))])
def test_the_multiplications_of_the_file_are_those_that_are_reported(tmp_path: Path, rank: int) -> None:
    dense = build(Layers, (replace(IMAGE[0], shape=(1, 6, 9, 9)),))
    layers = ("strided.weight", "dilated.weight", "up.weight", "line.weight", "head.weight")
    low = factorized(dense, rank, "float")
    model = dense.with_weights({name: low.weights[name] for name in layers})
    target.export(model, tmp_path / "net.onnx")
    graph = capture(model.module(), model.examples(1))
    found = cost.macs(graph, model.weights)
    assert found == multiplications(tmp_path / "net.onnx")
    assert found < cost.macs(graph)
    assert cost.macs(graph, dense.weights) == cost.macs(graph)
    by_hand = 25 * rank * (54 + 12) + 2 * 25 * rank * (36 + 12) + rank * (25 * 108 + 100 * 10)
    by_hand += 64 * 10 * 2 * 9 + 60 * rank * (50 + 8) + rank * (8 + 6)
    assert found == by_hand


def test_a_sum_counts_its_terms_where_a_file_adds_products() -> None:
    model = summed(build(Layers, IMAGE))
    graph = capture(model.module(), model.examples(1))
    assert cost.macs(graph, model.weights) == cost.macs(graph) + 3 * (8 + 6)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [(Layers, IMAGE), (Words, (InputSpec(name="tokens", shape=("batch", "time"), dtype="int64"),))],
)
def test_a_sum_is_stored_exported_and_verified_on_every_kind_of_layer(
    module: type[nn.Module], inputs: tuple[InputSpec, ...], tmp_path: Path
) -> None:
    model, path = summed(build(module, inputs)), tmp_path / "net.onnx"
    target.export(model, path)
    assert max(row.rel for row in verify(model, path, target.open)) < 1e-5
    held = {value.name for value in onnx.load(path).graph.initializer}
    for name, weight in model.weights.items():
        assert name not in held
        for part in ("0", "1.left", "1.right"):
            assert {f"{name}.{part}.codes", f"{name}.{part}.c16.codes"} & held
        assert isinstance(weight, Sum)
        assert weight.bits() == 8 * sum(t.numel() * t.element_size() for t in weight.tensors().values())


@pytest.mark.parametrize(
    "make", [summed, lambda m: factorized(m, 2, "float"), lambda m: factorized(m, 2, "codebook 4")]
)
def test_low_ranks_come_back_from_a_folder(make: Any, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(4, 3)\n")
    resolved = entry.resolve("nets.py:net", tmp_path)
    source = Source(entry="nets.py:net", files=resolved.files)
    module = entry.build_module(resolved, {})
    model = make(from_module(module, (InputSpec(name="x", shape=("batch", 4)),), source))
    (tmp_path / "out").mkdir()
    store.save(model, tmp_path / "out")
    loaded = store.load(tmp_path / "out")
    assert store.describe(loaded) == store.describe(model)
    assert torch.equal(loaded.weights["weight"].dense(), model.weights["weight"].dense())
    parts, kept = (m.weights["weight"].tensors() for m in (loaded, model))
    assert parts.keys() == kept.keys()
    assert all(torch.equal(parts[key], kept[key]) for key in kept)
    assert loaded.size_bytes() == model.size_bytes()


def test_half_precision_convolutions_verify(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 1)).half()
    inputs = (InputSpec(name="image", shape=("batch", 6, 9, 9), dtype="float16"),)
    dense = from_module(module, inputs, Source(entry="nets.py:net"))
    generator, changed = torch.Generator().manual_seed(0), dict[str, Weight]()
    for name, weight in dense.weights.items():
        low = low_rank(weight.dense(), 4, "float", generator)
        left, right = (Dense(values=part.dense().half()) for part in (low.left, low.right))
        changed[name] = LowRank(left=left, right=right)
    model = dense.with_weights(changed)
    target.export(model, tmp_path / "net.onnx")
    assert max(row.rel for row in verify(model, tmp_path / "net.onnx", target.open)) < 1e-2


def test_layouts_of_the_factors_multiply_to_the_parameter() -> None:
    """A transposed convolution by R as (in, r, *kernel), then 1x1 by L, is the one by L R: checked on torch's own."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(10, 3, generator=generator), torch.randn(3, 12 * 9, generator=generator)
    x = torch.randn(2, 12, 5, 5, generator=generator)
    whole = Layout(kind="conv_transpose", shape=(12, 10, 3, 3)).to_param(left @ right)
    thin = Layout(kind="conv_transpose", shape=(12, 3, 3, 3)).to_param(right)
    want = nn.functional.conv_transpose2d(x, whole, stride=2, padding=1)
    have = nn.functional.conv2d(nn.functional.conv_transpose2d(x, thin, stride=2, padding=1), left[:, :, None, None])
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
