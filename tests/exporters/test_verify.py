"""verify: equal files pass at every batch size, and a wrong layer is named."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import Tensor, nn

from paredown.exporters import onnx as target
from paredown.exporters.difference import argmax_agreement, difference
from paredown.exporters.verify import Spec, compare, tolerance, verify
from paredown.optimizer.errors import ExportError, InputError, RecipeError
from paredown.optimizer.model import InputSpec, Source, from_module


def tamper(source: Path, name: str, folder: Path) -> Path:
    """Copy a file with one initializer a third larger."""
    proto = onnx.load(source)
    (value,) = [value for value in proto.graph.initializer if value.name == name]
    array = numpy_helper.to_array(value)
    value.CopyFrom(numpy_helper.from_array((array * 1.33).astype(array.dtype), name))
    onnx.save(proto, folder / "tampered.onnx")
    return folder / "tampered.onnx"


def test_every_net_passes_at_two_batch_sizes(net: Any) -> None:
    rows = verify(net.model, net.path, target.open)
    assert [row.batch for row in rows] == [1, 3]
    for row in rows:
        assert row.runtime.split()[0] == "onnxruntime"
        assert row.rel <= tolerance(net.model, Spec())
        assert row.size_bytes == net.path.stat().st_size
        assert row.first_bad_layer is None
        assert row.argmax_agreement is not None
        assert row.argmax_agreement >= 0.9


@pytest.mark.parametrize(
    ("name", "tensor", "layer"),
    [
        ("attention", "attention.in_proj_weight.c16.scale", "attention (linear)"),
        pytest.param("attention", "embedding.weight.c16.scale", "embedding (embedding)", marks=pytest.mark.slow),
        ("convolutions", "up.weight.scale", "up (convolution)"),
        pytest.param("recurrent", "gru.weight_hh_l0_reverse.scale", "gru (getitem_3)", marks=pytest.mark.slow),
        ("products", "second.weight.1.right.c16.scale", "second (linear_1)"),
        ("pair", "b_right", "right (linear_1)"),
    ],
)
def test_the_first_bad_layer_is_named(
    exported: Callable[[str], Any], tmp_path: Path, name: str, tensor: str, layer: str
) -> None:
    net = exported(name)
    path = tamper(net.path, "right.weight.c16.scale" if tensor == "b_right" else tensor, tmp_path)
    with pytest.raises(
        ExportError, match=r"^tampered.onnx in onnxruntime[a-z ]*: outputs differ from torch by"
    ) as caught:
        verify(net.model, path, target.open)
    assert f"first in {layer};" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["tampered.onnx"]


def test_a_branch_on_the_batch_size_is_found(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y * 2 if x.shape[0] > 2 else y

    model = from_module(Branch(), [InputSpec(name="x", shape=("batch", 4))], Source(entry="n:n"))
    target.export(model, tmp_path / "net.onnx")
    rows = compare(model, tmp_path / "net.onnx", target.open, Spec(batches=(1, 3)))
    assert rows[0].rel < 1e-6
    assert rows[1].rel > 0.1
    with pytest.raises(
        ExportError, match=r"net.onnx in onnxruntime[a-z ]*: outputs differ from torch by .* at batch 3"
    ):
        verify(model, tmp_path / "net.onnx", target.open)


def test_real_inputs_are_cut_to_the_batch(exported: Callable[[str], Any]) -> None:
    net = exported("pair")
    inputs = net.model.examples(4, seed=7)
    rows = verify(net.model, net.path, target.open, Spec(inputs=inputs, batches=(1, 4)))
    assert [row.batch for row in rows] == [1, 4]
    with pytest.raises(InputError, match=r'verify, input "a": 4 rows were given, 5 are needed'):
        verify(net.model, net.path, target.open, Spec(inputs=inputs, batches=(5,)))


def test_a_fixed_batch_is_compared_once(tmp_path: Path) -> None:
    model = from_module(nn.Linear(4, 3), [InputSpec(name="x", shape=(2, 4))], Source(entry="n:n"))
    target.export(model, tmp_path / "net.onnx")
    assert [row.batch for row in verify(model, tmp_path / "net.onnx", target.open)] == [2]


def test_the_tolerance_follows_the_dtype(exported: Callable[[str], Any]) -> None:
    assert tolerance(exported("pair").model, Spec()) == 1e-4
    assert tolerance(exported("half").model, Spec()) == 1e-2
    assert tolerance(exported("half").model, Spec(rel=1e-9)) == 1e-9


def test_bad_specs_are_named() -> None:
    with pytest.raises(RecipeError, match=r"verify: batches=\[0\] must be positive"):
        Spec(batches=(0,))
    with pytest.raises(RecipeError, match=r"verify: rel=0 must be positive"):
        Spec(rel=0)


def test_difference_is_relative_to_the_largest_entry() -> None:
    a, b = np.array([[1.0, -4.0]]), np.array([[1.5, -4.0]])
    assert difference(a, b) == (0.5, 0.125)
    assert difference(a, a[:, :1]) == (math.inf, math.inf)
    nan, inf = np.array([np.nan, 1.0]), np.array([np.inf, 1.0])
    assert difference(nan, nan) == (0.0, 0.0)
    assert difference(inf, inf) == (0.0, 0.0)
    assert difference(nan, inf)[1] == math.inf
    assert difference(np.ones(2), np.array([1.0, np.nan]))[1] == math.inf
    assert difference(np.zeros(0), np.zeros(0)) == (0.0, 0.0)


def test_argmax_agreement_is_that_of_the_worst_output() -> None:
    a = np.eye(4, dtype=np.float32)
    b = a.copy()
    b[0] = b[0, ::-1]
    assert argmax_agreement([a, a], [a, b]) == 0.75
    assert argmax_agreement([np.zeros(3)], [np.zeros(3)]) is None
    assert argmax_agreement([np.zeros((2, 2), np.int64)], [np.zeros((2, 2), np.int64)]) is None
