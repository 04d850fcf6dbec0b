"""int8 activations in a file: integer kernels in the graph that ONNX Runtime runs, and the values of torch."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from paredown.exporters import onnx as target
from paredown.exporters import onnx_integer
from paredown.exporters.verify import Spec, compare, judge, tolerance
from paredown.optimizer import activations
from paredown.optimizer.errors import ExportError
from paredown.optimizer.model import Model

from ..optimizer.int8_nets import int8
from ..zoo.nets import ZOO

FLOATS: dict[str, tuple[str, ...]] = {
    "residual": (),
    "separable": (),
    "swiglu": ("LayerNormalization", "LayerNormalization", "Mul", "Mul"),
    "llama": ("Mul", "Mul"),
}
"""What computes in float between int8 layers. Mul: by an activation (SiLU) that has no integer kernel.

`test_pipeline` holds every convolutional network to the same, after pruning.
"""
NETS = ["residual", *(pytest.param(name, marks=pytest.mark.slow) for name in ("separable", "swiglu", "llama"))]


@functools.cache
def exported(name: str, folder: Path) -> tuple[Model, Path]:
    model, path = int8(name), folder / f"{name}.onnx"
    target.export(model, path)
    return model, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.mark.parametrize("name", NETS)
def test_int8_layers_run_in_integers(name: str, folder: Path) -> None:
    model, path = exported(name, folder)
    found = onnx_integer.kernels(path)
    assert found.layers == activations.layers(model)
    assert tuple(sorted(entry.split()[0] for entry in found.floats)) == FLOATS[name]


@pytest.mark.parametrize("name", NETS)
def test_the_file_gives_the_codes_of_torch(name: str, folder: Path) -> None:
    """Outputs of some hundred codes: no rounding falls elsewhere, so errors are those of floats."""
    model, path = exported(name, folder)
    spec = Spec(batches=(1, 3), inputs=ZOO[name].batch(3, 7))
    rows = compare(model, path, target.open, spec)
    judge(rows, path)
    assert max(row.rel for row in rows) < 1e-5
    assert tolerance(model, spec) == 2e-2


def test_a_residual_network_stays_on_codes_from_end_to_end(folder: Path) -> None:
    _, path = exported("residual", folder)
    nodes = [node.op_type for node in onnx_integer.optimized(path).graph.node]
    assert nodes.count("QLinearConv") == 5
    assert nodes.count("QLinearAdd") == 2
    assert nodes.count("QLinearGlobalAveragePool") == 1
    assert nodes.count("QGemm") == 1
    assert nodes.count("QuantizeLinear") == 1  # the input
    assert nodes.count("DequantizeLinear") == 0


def test_the_file_holds_codes_and_nothing_that_names_the_machine(folder: Path) -> None:
    model, path = exported("residual", folder)
    proto = onnx.load(path)
    held = {value.name: numpy_helper.to_array(value) for value in proto.graph.initializer}
    for name in activations.layers(model):
        codes = held.get(f"{name}.codes", held.get(f"{name}.t.codes"))
        assert codes is not None
        assert codes.dtype == np.int8
        assert name not in held
    biases = [value for name, value in held.items() if name.endswith(".bias.codes")]
    assert len(biases) == 6
    assert {value.dtype for value in biases} == {np.dtype(np.int32)}
    zeros = [held[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert {value.dtype for value in zeros} == {np.dtype(np.uint8)}
    assert not proto.doc_string
    assert not proto.metadata_props
    assert not [node for node in proto.graph.node if node.doc_string or node.metadata_props]


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model, path = exported("separable", folder)
    target.export(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("opset", [18, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (21, 23))])
def test_other_opsets_run_in_integers_too(opset: int, tmp_path: Path) -> None:
    """Each of them has a QuantizeLinear of its own."""
    model, path = int8("detector"), tmp_path / "net.onnx"
    target.export(model, path, target.Options(opset=opset))
    assert onnx_integer.check(path, activations.layers(model)).floats == ()


def test_rectifiers_are_left_to_saturation(folder: Path) -> None:
    _, path = exported("separable", folder)
    assert not {"Relu", "Clip"} & {node.op_type for node in onnx.load(path).graph.node}


def test_layers_that_compute_in_float_are_named(folder: Path) -> None:
    _, path = exported("residual", folder)
    text = r'^residual.onnx in onnxruntime: "other.weight" \(1 of 2 layers\) does not compute in integers; skip it'
    with pytest.raises(ExportError, match=text):
        onnx_integer.check(path, ["head.weight", "other.weight"])


def test_the_first_bad_layer_of_an_int8_file_is_named(folder: Path, tmp_path: Path) -> None:
    model, path = exported("residual", folder)
    proto = onnx.load(path)
    (value,) = [value for value in proto.graph.initializer if value.name == "blocks.0.conv2.weight.codes"]
    value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) // 2, value.name))
    onnx.save(proto, tmp_path / "residual.onnx")
    rows = compare(model, tmp_path / "residual.onnx", target.open, Spec(rel=1e-3))
    assert rows[0].rel > 1e-3
    assert rows[0].first_bad_layer == "blocks.0.conv2 (conv2d_2)"


def test_argmax_is_judged_where_rows_are_many_enough(folder: Path) -> None:
    model, path = exported("residual", folder)
    few, many = (compare(model, path, target.open, Spec(batches=(n,)))[0] for n in (3, 250))
    assert few.agreement_limit is None
    assert few.argmax_agreement == 1.0
    assert many.agreement_limit == 0.995
    assert many.argmax_agreement is not None
    assert many.argmax_agreement >= 0.995
