"""Our operators in onnxruntime: every name and type, any shape and kind of input, and what errors say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from paredown.exporters.onnx_session import session_options
from paredown.kernels.lut_spec import LutSpec
from paredown.kernels.onnx_ops import LINEAR_OPS
from paredown.optimizer.errors import RuntimeMissingError

from .ort_models import (
    DOMAIN,
    SPEC,
    Case,
    assert_close,
    every_form,
    feeds_of,
    initializer,
    layer,
    linear_model,
    linear_node,
    model,
    open_session,
    stored,
)

GATHERS = {"LutGather": "float32", "LutGatherFloat16": "float16", "LutGatherBfloat16": "bfloat16"}


def gather_model(
    op: str, spec: LutSpec, index: int, sizes: list[int | str] | None = None
) -> tuple[onnx.ModelProto, np.ndarray]:
    """Return a model W[indices] for indices of this ONNX type, and W."""
    weight = stored(spec, np.random.default_rng(3), torch.float16, torch.uint8)
    attributes = weight.attributes() | {"n": spec.n, "k": spec.k, "layout": "c16"}
    parts = dict(zip(("codes", "table", "scale"), weight.parts, strict=True))
    node = helper.make_node(op, ["indices", *parts], ["rows"], domain=DOMAIN, name="embedding", **attributes)
    cast = helper.make_node("Cast", ["rows"], ["y"], to=TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info("indices", index, ["batch", "length"] if sizes is None else sizes)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return model([node, cast], inputs, outputs, [initializer(*pair) for pair in parts.items()]), weight.values


def changed(made: onnx.ModelProto, **attributes: object) -> onnx.ModelProto:
    """Return the model with other attributes on its node of ours; None takes one away."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    node = next(node for node in copy.graph.node if node.domain == DOMAIN)
    kept = [item for item in node.attribute if item.name not in attributes]
    added = [helper.make_attribute(name, value) for name, value in attributes.items() if value is not None]
    del node.attribute[:]
    node.attribute.extend([*kept, *added])
    return copy


@pytest.mark.parametrize("threads", [1, 2])
def test_every_name_and_type_is_right(library: Path, threads: int) -> None:
    layers, feeds = every_form(), feeds_of(Case(spec=SPEC, rank=5))
    assert {one.case.op for one in layers} == LINEAR_OPS.keys()
    found = open_session(linear_model(layers), library, threads).run(None, feeds)
    for y, one in zip(found, layers, strict=True):
        assert_close(y, one, feeds)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_sizes_of_any_kind(library: Path, data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 150))
    bits, int8 = data.draw(st.sampled_from([1, 2, 3, 4, 8])), data.draw(st.booleans())
    group, table_rows = data.draw(st.integers(0, k)), data.draw(st.sampled_from([0, 16, 48]))
    spec = LutSpec(n=n, k=k, bits=bits, group=group, table_rows=table_rows, zero=128.0, unit=1 / 127)
    sizes = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    one = layer(Case(spec=spec, int8=int8, rank=data.draw(st.sampled_from([0, 1, 9]))), n + k)
    feeds = feeds_of(one.case, sizes)
    dynamic = [data.draw(st.sampled_from([size, None, f"size{i}"])) for i, size in enumerate(sizes)]
    assert_close(open_session(linear_model([one], dynamic), library).run(None, feeds)[0], one, feeds)


def test_a_dynamic_batch_may_be_empty(library: Path) -> None:
    layers = [layer(Case(spec=SPEC, int8=int8, rank=5)) for int8 in (False, True)]
    session = open_session(linear_model(layers, ["batch", None]), library)
    for sizes in ((0, 3), (2, 0), (1, 1), (300, 1)):
        feeds = feeds_of(layers[0].case, sizes)
        for y, one in zip(session.run(None, feeds), layers, strict=True):
            assert_close(y, one, feeds)


def test_every_part_may_be_an_input(library: Path) -> None:
    one = layer(Case(spec=SPEC, rank=5, int8=True))
    made, feeds = linear_model([one]), feeds_of(Case(spec=SPEC, rank=5))
    constant = open_session(made, library).run(None, feeds)[0]
    tensors = list(made.graph.initializer)
    for tensor in tensors:
        made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        feeds[tensor.name] = onnx.numpy_helper.to_array(tensor)
    del made.graph.initializer[:]
    assert np.array_equal(open_session(made, library).run(None, feeds)[0], constant)


def test_weights_of_the_outer_graph_serve_in_a_branch(library: Path) -> None:
    one, feeds = layer(Case(spec=SPEC)), feeds_of(Case(spec=SPEC))
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    node, tensors = linear_node(one, "x", "t", "y", "w_")
    branches = {
        "then_branch": helper.make_graph([node], "then", [], output),
        "else_branch": helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "else", [], output),
    }
    chosen = helper.make_node("If", ["flag"], ["chosen"], **branches)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SPEC.k])]
    inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    outputs = [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)]
    session = open_session(model([chosen], inputs, outputs, tensors), library)
    assert_close(session.run(None, {"x": feeds["x"], "flag": np.array(True)})[0], one, feeds)


@pytest.mark.parametrize("index", [TensorProto.INT32, TensorProto.INT64])
@pytest.mark.parametrize("op", GATHERS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_gather_is_exact(library: Path, op: str, bits: int, index: int) -> None:
    spec = LutSpec(n=83, k=45, bits=bits, group=20, table_rows=16 * (bits % 2), zero=128.0, unit=1 / 128)
    made, values = gather_model(op, spec, index)
    indices = np.random.default_rng(bits).integers(-spec.n, spec.n, (9, 14))
    kind = helper.tensor_dtype_to_np_dtype(index)
    session = open_session(made, library, threads=2)
    found = session.run(None, {"indices": indices.astype(kind)})[0]
    # Products of a byte, a power of two and a scale of 11 bits fit float32, so W is rounded once, to the output.
    want = torch.from_numpy(values[indices]).to(getattr(torch, GATHERS[op])).float().numpy()
    assert np.array_equal(found, want)
    assert session.run(None, {"indices": np.zeros((0, 3), kind)})[0].shape == (0, 3, spec.k)


def test_gather_takes_one_index(library: Path) -> None:
    made, values = gather_model("LutGather", SPEC, TensorProto.INT64, [])
    found = open_session(made, library).run(None, {"indices": np.array(-1)})[0]
    assert found.shape == (SPEC.k,)
    np.testing.assert_allclose(found, values[-1], rtol=2**-22)


@pytest.mark.parametrize("index", [SPEC.n, -SPEC.n - 1])
def test_gather_refuses_an_index_out_of_range(library: Path, index: int) -> None:
    made, _ = gather_model("LutGather", SPEC, TensorProto.INT64)
    session = open_session(made, library)
    with pytest.raises(
        Exception, match=rf'paredown::LutGather "embedding": index {index} is out of range; W has 37 rows'
    ):
        session.run(None, {"indices": np.array([[0, index]])})


REFUSED = {
    "the attribute bits (int) is missing": {"bits": None},
    "the attribute left_unit (float) is missing": {"left_unit": None},
    'layout "rows" has no kernel, "c16" has': {"layout": "rows"},
    'the attribute layout is not "c16"': {"layout": None},
    "bits=9 is out of 1 to 8": {"bits": 9},
    "bits=3; this operator is for 1, 2, 4 and 8 bits": {"bits": 3},
    "table_rows=8 is no weight of layout c16": {"table_rows": 8},
    ": codes has 2304 elements, a weight (37, 100) of 4 bits has 3072": {"k": 100},
    "left_codes has 768 elements, a weight (37, 5) of 4 bits has 2304": {"left_group": 2},
    "int8 inputs need a uint8 table and a whole zero in 0..255 (zero=127.5)": {"zero": 127.5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_node_that_contradicts_its_weight_is_refused_at_load(library: Path, message: str) -> None:
    made = changed(linear_model([layer(Case(spec=SPEC, rank=5, int8=True))]), **REFUSED[message])
    with pytest.raises(Exception, match='paredown::LutLinearInt8LowRank "l0_node": ') as caught:
        open_session(made, library)
    assert message in str(caught.value)


def test_tables_and_scales_of_other_types_are_refused(library: Path) -> None:
    made = linear_model([layer(Case(spec=SPEC, table=torch.float16))])
    for name, message in {"l0_table": "table is neither uint8", "l0_scale": "scale is not float16"}.items():
        copy = onnx.ModelProto()
        copy.CopyFrom(made)
        tensor = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.int32), name))
        with pytest.raises(Exception, match=message):
            open_session(copy, library)


def test_inputs_that_do_not_fit_are_refused_at_run(library: Path) -> None:
    one = layer(Case(spec=SPEC, rank=5))
    made, feeds = linear_model([one]), feeds_of(one.case)
    for value in made.graph.input:
        value.type.tensor_type.ClearField("shape")
    session = open_session(made, library)
    with pytest.raises(Exception, match="the last size of x is 69, W takes 70 inputs"):
        session.run(None, feeds | {"x": feeds["x"][:, 1:]})
    with pytest.raises(Exception, match="x is a scalar; W takes 70 inputs"):
        session.run(None, feeds | {"x": np.array(1, np.float32)})
    with pytest.raises(Exception, match="t has 20 elements; 5 rows of rank 5 are needed"):
        session.run(None, feeds | {"t": feeds["t"][1:]})
    assert_close(session.run(None, feeds)[0], one, feeds)


def test_one_value_for_all_outputs_is_no_bias(library: Path) -> None:
    made = linear_model([layer(Case(spec=SPEC, biased=False))])
    tensor = next(tensor for tensor in made.graph.initializer if tensor.name == "l0_bias")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), tensor.name))
    with pytest.raises(Exception, match="a bias of one value is 0 where W has 37 rows"):
        open_session(made, library)
    single = layer(Case(spec=dataclasses.replace(SPEC, n=1)))
    assert_close(
        open_session(linear_model([single]), library).run(None, feeds_of(single.case))[0], single, feeds_of(single.case)
    )


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "libparedown.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(RuntimeMissingError) as caught:
        session_options(library=broken)
    assert str(caught.value).startswith(f"libparedown.so: onnxruntime {onnxruntime.__version__} does not load it: ")
    assert str(caught.value).endswith("; build it again for this machine, or run without kernels")
