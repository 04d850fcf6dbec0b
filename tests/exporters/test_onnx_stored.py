"""The weights of a file are those of the model to the bit, in whatever form, and a changed one is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from paredown.exporters import onnx as target
from paredown.exporters import onnx_stored, verify
from paredown.optimizer.errors import ExportError

from ..optimizer.int8_nets import ZOO, int8
from .conftest import NETS, Exported


def changed(exported: Exported, name: str, path: Path, at: float = 0.5) -> int:
    """Write the file with one byte of a tensor turned over, and return how many bytes the tensor has."""
    proto = onnx.load(exported.path)
    (tensor,) = [known for known in proto.graph.initializer if known.name == name]
    content = bytearray(numpy_helper.to_array(tensor).tobytes())
    content[int(at * (len(content) - 1))] ^= 0xFF
    tensor.ClearField("float_data")
    tensor.ClearField("int32_data")
    tensor.raw_data = bytes(content)
    onnx.save(proto, path)
    return len(content)


@pytest.mark.parametrize("name", NETS)
def test_every_packed_tensor_of_a_file_is_compared(name: str, exported: Callable[[str], Exported]) -> None:
    made = exported(name)
    found = onnx_stored.compare(made.path, made.model)
    packed = [
        known.name
        for known in onnx.load(made.path).graph.initializer
        if known.name.endswith((".codes", ".table", ".scale"))
    ]
    assert found.wrong == ""
    assert found.equal >= len(packed)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), at=st.floats(0, 1))
def test_one_changed_byte_is_found(
    data: st.DataObject, at: float, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    made = exported("products")
    names = [
        known.name for known in onnx.load(made.path).graph.initializer if known.name.endswith((".codes", ".scale"))
    ]
    name, path = data.draw(st.sampled_from(names)), tmp_path / "changed.onnx"
    size = changed(made, name, path, at)
    assert onnx_stored.compare(path, made.model).wrong == f'1 of the {size} bytes of "{name}"'


def test_a_wrong_code_within_the_tolerance_is_refused(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    made, path = exported("attention"), tmp_path / "changed.onnx"
    name = next(known.name for known in onnx.load(made.path).graph.initializer if known.name.endswith(".codes"))
    size = changed(made, name, path)
    spec = verify.Spec(rel=10.0)
    rows = verify.compare(made.model, path, target.open, spec)
    assert all(row.rel < 10 for row in rows)
    with pytest.raises(ExportError) as refused:
        verify.verify(made.model, path, target.open, spec)
    what = f'1 of the {size} bytes of "{name}" are not those of the stored model'
    assert str(refused.value) == f"changed.onnx: {what}; the file was changed since: export it again"


def test_another_model_is_no_match(exported: Callable[[str], Exported]) -> None:
    made = exported("pair")
    bias = next(name for name in made.model.tensors if name.endswith("bias"))
    other = replace(made.model, tensors={**made.model.tensors, bias: made.model.tensors[bias] + 1})
    assert f'of "{bias}"' in onnx_stored.compare(made.path, other).wrong


def test_a_changed_weight_is_named_where_outputs_differ(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    made, path = exported("attention"), tmp_path / "changed.onnx"
    name = next(known.name for known in onnx.load(made.path).graph.initializer if known.name.endswith(".scale"))
    size = changed(made, name, path)
    with pytest.raises(ExportError) as refused:
        verify.verify(made.model, path, target.open, verify.Spec(rel=1e-9))
    assert refused.value.what.startswith("outputs differ from torch by ")
    assert refused.value.what.endswith(f'; 1 of the {size} bytes of "{name}" are not those of the stored model')
    assert refused.value.fix == verify.AGAIN


def test_codes_scales_and_zero_points_of_int8_layers_are_compared(tmp_path: Path) -> None:
    model, whole, path = int8("residual"), tmp_path / "whole.onnx", tmp_path / "changed.onnx"
    target.export(model, whole)
    made = Exported(model=model, path=whole)
    assert onnx_stored.compare(whole, model).wrong == ""
    for part in (
        "stem.weight.codes",
        "stem.weight.scale",
        "stem.weight.zero",
        "head.weight.t.zero",
        "stem.bias.codes",
        "head.bias.scale",
    ):
        size = changed(made, part, path)
        assert onnx_stored.compare(path, model).wrong == f'1 of the {size} bytes of "{part}"'


@pytest.mark.parametrize("part", ["val_0", "val_1"])
def test_a_changed_grid_is_named(part: str, tmp_path: Path) -> None:
    model, whole, path = int8("residual"), tmp_path / "whole.onnx", tmp_path / "changed.onnx"
    target.export(model, whole)
    changed(Exported(model=model, path=whole), part, path)
    assert onnx_stored.compare(path, model).wrong.startswith('the scale and zero point of "')


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_int8_network_of_the_zoo_is_as_it_was_exported(name: str, tmp_path: Path) -> None:
    model, path = int8(name), tmp_path / "model.onnx"
    target.export(model, path)
    names = [known.name for known in onnx.load(path).graph.initializer if known.name.endswith((".codes", ".scale"))]
    found = onnx_stored.compare(path, model)
    assert found.wrong == ""
    assert found.equal >= len(names)


def test_a_tensor_in_an_order_of_its_own_is_left_to_the_outputs(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    made, path = exported("dense"), tmp_path / "turned.onnx"
    whole = onnx_stored.compare(made.path, made.model)
    proto = onnx.load(made.path)
    tensor = next(known for known in proto.graph.initializer if known.name in made.model.weights)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values.flatten()[::-1].reshape(values.shape).copy(), tensor.name))
    onnx.save(proto, path)
    found = onnx_stored.compare(path, made.model)
    assert (found.equal, found.wrong) == (whole.equal - 1, "")
