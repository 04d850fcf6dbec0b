"""A model repository for Triton: its configuration says what the file takes, and nothing of others is replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from paredown.exporters import onnx as target
from paredown.exporters import onnx_runner, tensorrt_engine, triton, triton_config
from paredown.optimizer import store, targets
from paredown.optimizer.errors import ExportError, InputError, RecipeError
from paredown.optimizer.model import InputSpec, Model, Source, from_module

from .triton_schema import parse


@pytest.fixture
def folder(perceptron: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder whose stored model has packed linear layers."""
    result = tmp_path / "small net"
    result.mkdir()
    monkeypatch.setattr(store, "load", lambda _: perceptron)
    return result


def config(repository: Path) -> Any:
    (path,) = repository.glob("*/config.pbtxt")
    return parse(path.read_text())


def test_the_repository_serves_the_model(folder: Path, perceptron: Model) -> None:
    settings = {"max_batch": 16, "max_delay_ms": 2.5, "instances": 2}
    made = targets.export(folder, "triton", None, force=False, settings=settings)
    assert made == folder / "model_repository"
    assert {path.name for path in made.iterdir()} == {"README.md", "small_net"}
    found = config(made)
    assert (found.name, found.backend, found.default_model_filename) == ("small_net", "onnxruntime", "model.onnx")
    assert found.max_batch_size == 16
    (given,), (answer,) = found.input, found.output
    assert (given.name, given.data_type, list(given.dims)) == ("x", 11, [20])
    assert (answer.data_type, list(answer.dims)) == (11, [4])
    assert [(group.count, group.kind) for group in found.instance_group] == [(2, 2)]
    assert list(found.dynamic_batching.preferred_batch_size) == [16]
    assert found.dynamic_batching.max_queue_delay_microseconds == 2500
    assert [warm.batch_size for warm in found.model_warmup] == [1, 16]

    (x,) = perceptron.examples(16, seed=3)
    with torch.no_grad():
        want = perceptron.module()(x).numpy()
    (have,) = triton.open(made).run({"x": x.numpy()}).values()
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_our_library_is_in_the_repository_where_the_file_needs_it(folder: Path) -> None:
    library = onnx_runner.kernel_library()
    assert library is not None
    made = targets.export(folder, "triton", None, force=False, settings={"mount": "/srv/models/"})
    assert list(config(made).model_operations.op_library_filename) == [f"/srv/models/small_net/{library.name}"]
    assert (made / "small_net" / library.name).read_bytes() == library.read_bytes()
    assert any(line.startswith("Packed layers run in ") for line in targets.explain(made, "triton"))
    plain = targets.export(folder, "triton", folder / "plain", force=False, settings={"portable": True})
    assert not config(plain).HasField("model_operations")
    assert not list(plain.rglob("*.so"))
    assert targets.explain(plain, "triton") == [
        "The portable bodies of packed layers run: the library of kernels was left out as asked."
    ]


def test_the_page_says_how_to_serve_ask_and_measure(folder: Path) -> None:
    made = targets.export(folder, "triton", None, force=False)
    page = (made / "README.md").read_text()
    for part in ("tritonserver --model-repository=/models", 'client.infer("small_net"', "perf_analyzer -m small_net"):
        assert part in page
    assert "$" not in page.replace("$TRITON_IMAGE", "").replace("$PWD", "")


def test_a_folder_that_is_absent_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'absent" is not an output folder'):
        targets.export(tmp_path / "absent", "triton", None, force=False)


def test_nothing_of_others_is_replaced(folder: Path) -> None:
    made = targets.export(folder, "triton", None, force=False)
    with pytest.raises(RecipeError, match='"model_repository" exists already; use --force'):
        targets.export(folder, "triton", None, force=False)
    (made / "small_net" / "config.pbtxt").write_text("")
    targets.export(folder, "triton", None, force=True)
    assert config(made).name == "small_net"
    (made / "another").mkdir()
    (made / "another" / "config.pbtxt").write_text("")
    with pytest.raises(RecipeError, match='"model_repository" is no model repository, and is not replaced'):
        targets.export(folder, "triton", None, force=True)
    with pytest.raises(RecipeError, match=r'the folder ".*absent" does not exist'):
        targets.export(folder, "triton", folder / "absent" / "x", force=False)
    assert not [path for path in folder.iterdir() if path.name.startswith(".paredown")]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"max_batch": 0}, "max_batch=0 is out of range; use 1 or more"),
        ({"max_delay_ms": float("nan")}, "max_delay_ms=nan is out of range"),
        ({"mount": "models"}, 'mount="models" is no absolute path'),
        ({"platform": "torch"}, 'there is no platform "torch"; use onnxruntime or tensorrt'),
    ],
)
def test_bad_options_are_one_sentence(folder: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        targets.export(folder, "triton", None, force=False, settings=settings)


def test_options_of_other_targets_are_errors() -> None:
    with pytest.raises(RecipeError, match="--max-batch is of --target triton; leave it out"):
        targets.lowering_settings("tensorrt", {"max_batch": 4})
    with pytest.raises(RecipeError, match="--profile is of --target tensorrt; leave it out"):
        targets.lowering_settings("triton", {"profile": "batch=1:2:3"})
    assert targets.lowering_settings("triton", {"max_delay_ms": 0.0, "portable": False}) == {"max_delay_ms": 0.0}


class Odd(nn.Module):
    """A scalar per request, a dimension of its own that varies, and an output without a batch."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x * weight[:, None], x.mean(0)


def test_requests_run_alone_where_an_output_has_no_batch(tmp_path: Path) -> None:
    inputs = (InputSpec(name="x", shape=("batch", "length")), InputSpec(name="weight", shape=("batch",)))
    model = from_module(Odd(), inputs, Source(entry="net.py:net"))
    path = tmp_path / "odd"
    triton.export(model, path)
    found = parse((path / "config.pbtxt").read_text())
    assert found.max_batch_size == 0
    assert not found.HasField("dynamic_batching")
    assert [list(item.dims) for item in found.input] == [[-1, -1], [-1]]
    assert (
        "# max_batch_size is 0, each request runs alone: the first dimension of" in (path / "config.pbtxt").read_text()
    )


def test_a_scalar_of_each_request_is_reshaped() -> None:
    given = triton_config.Tensor(name="weight", dtype="INT64", shape=("batch",))
    tensors = triton_config.Tensors(inputs=(given,), outputs=(given,), batch="batch", reason="")
    found = parse(triton_config.text("m", tensors, triton.Options(), (), ""))
    assert (list(found.input[0].dims), list(found.input[0].reshape.shape)) == ([1], [])
    assert found.input[0].HasField("reshape")
    assert found.model_warmup[0].inputs[0].value.zero_data


def test_types_that_triton_does_not_know_are_refused(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.INT4, ["batch", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), tmp_path / "int4.onnx")
    with pytest.raises(ExportError, match='"x": Triton has no type for int4; cast it in the network'):
        triton_config.read_tensors(tmp_path / "int4.onnx")


def _engine(folder: Path, model: Model, patch: pytest.MonkeyPatch, least: int) -> None:
    """Put an engine into an output folder: bytes, the graph beside it, and metadata with a profile."""
    (folder / "model.engine").write_bytes(b"engine")
    target.export(model, folder / "model.engine.onnx")
    profile = {"batch": [least, 8, 32]}
    patch.setattr(tensorrt_engine, "read_metadata", lambda path: SimpleNamespace(profile=profile))


def test_an_engine_is_served(folder: Path, perceptron: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"platform": "tensorrt"}
    with pytest.raises(InputError, match=r"model\.engine: is missing; run optimize export .* --target tensorrt"):
        targets.export(folder, "triton", None, force=False, settings=settings)
    _engine(folder, perceptron, monkeypatch, least=1)
    made = targets.export(folder, "triton", None, force=False, settings=settings)
    found = config(made)
    assert (found.platform, found.backend, found.max_batch_size) == ("tensorrt_plan", "", 32)
    assert found.instance_group[0].kind == 1
    assert (made / "small_net" / "1" / "model.plan").read_bytes() == b"engine"
    with pytest.raises(InputError, match="has no ONNX model to run here"):
        triton.open(made)


def test_an_engine_must_take_the_batches(folder: Path, perceptron: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _engine(folder, perceptron, monkeypatch, least=1)
    options = triton.Options(platform="tensorrt", max_batch=64)
    with pytest.raises(RecipeError, match="max_batch=64 is above 32, the largest batch of the engine; use 32"):
        triton.repository(folder, None, options)
    _engine(folder, perceptron, monkeypatch, least=4)
    with pytest.raises(RecipeError, match="the engine takes no batch below 4, and a request may come alone"):
        triton.repository(folder, None, replace(options, max_batch=32))
