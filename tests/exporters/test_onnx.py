"""Export to ONNX: the file equals torch, stays packed, keeps its promises about names, sizes and bytes."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.exporters import onnx as target
from paredown.exporters.runner import RunnerOptions
from paredown.kernels.layout import codes_bytes
from paredown.optimizer.errors import ExportError, InputError, RecipeError
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.packed import lut_spec
from paredown.optimizer.weight import Codebook, Uniform

BATCHES = (1, 3)


def outputs(model: Model, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model.module()(*inputs)) if isinstance(leaf, Tensor)]


def feeds(model: Model, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    return {spec.name: value.numpy() for spec, value in zip(model.inputs, inputs, strict=True)}


@pytest.mark.parametrize("batch", BATCHES)
def test_onnxruntime_equals_torch(net: Any, batch: int) -> None:
    inputs = net.model.examples(batch, seed=batch)
    have = target.open(net.path).run(feeds(net.model, inputs))
    want = outputs(net.model, inputs)
    assert len(have) == len(want)
    step = 1e-5 if net.model.inputs[0].dtype != "float16" else 5e-3
    for a, b in zip(want, have.values(), strict=True):
        assert a.shape == b.shape
        assert np.abs(a.numpy().astype("f8") - b.astype("f8")).max() <= step * a.abs().max().item()


def test_the_reference_evaluator_equals_torch(exported: Callable[[str], Any]) -> None:
    for name in ("attention", "products"):  # onnx 1.23 cannot evaluate a grouped ConvTranspose
        model, path = exported(name).model, exported(name).path
        inputs = model.examples(2)
        have = ReferenceEvaluator(str(path)).run(None, feeds(model, inputs))
        for a, b in zip(outputs(model, inputs), have, strict=True):
            np.testing.assert_allclose(b, a.numpy(), rtol=1e-3, atol=1e-4)


def test_decoded_weights_equal_dense_bit_for_bit(net: Any, tmp_path: Path) -> None:
    proto = onnx.load(net.path)
    made = {out: node for node in proto.graph.node for out in node.output if ".dense." in out}
    last = {name.partition(".dense.")[0]: name for name in made}
    for name in last.values():
        dtype = TensorProto.FLOAT16 if net.model.inputs[0].dtype == "float16" else TensorProto.FLOAT
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    onnx.save(proto, tmp_path / "probe.onnx")
    have = target.open(tmp_path / "probe.onnx").run(feeds(net.model, net.model.examples(1)))
    for param, name in last.items():
        weight, layout = net.model.weights[param], net.model.layouts[param]
        want = layout.to_param(weight.dense()).numpy()
        if isinstance(weight, Codebook | Uniform):
            assert np.array_equal(have[name], want), param
        else:
            np.testing.assert_allclose(have[name], want, rtol=1e-5, atol=1e-6)


def test_weights_stay_packed(net: Any) -> None:
    held = {value.name: value for value in onnx.load(net.path).graph.initializer}
    for name, weight in net.model.weights.items():
        if not isinstance(weight, Codebook | Uniform):
            continue
        assert name not in held
        tiled = f"{name}.c16.codes" in held
        assert tiled != (f"{name}.codes" in held)
        codes, scale = (held[f"{name}.c16.{key}" if tiled else f"{name}.{key}"] for key in ("codes", "scale"))
        wanted = codes_bytes(lut_spec(weight)) if tiled else weight.tensors()["codes"].numel()
        assert codes.data_type == TensorProto.UINT8
        assert numpy_helper.to_array(codes).nbytes == wanted
        assert held[f"{name}.table"].data_type in (TensorProto.UINT8, TensorProto.FLOAT16)
        assert scale.data_type == TensorProto.FLOAT16
    dense = [v for v in held.values() if v.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16) and ".dense" in v.name]
    assert not dense


def test_linear_layers_are_one_operator_with_bias_and_activation(exported: Callable[[str], Any]) -> None:
    proto = onnx.load(exported("attention").path)
    ours = {node.name: node for node in proto.graph.node if node.domain == "paredown"}
    assert {name.rpartition("/")[0]: node.op_type for name, node in ours.items() if node.op_type != "LutGather"} == {
        "attention": "LutLinear",  # the packed projection and its output
        "inner": "LutLinearRelu",
        "back": "LutLinear",
        "head": "LutPlanesLinear",
        "pool": "LutLinear",
        "pool_plain": "LutPlanesLinear",
    }
    assert not [node for node in proto.graph.node if node.op_type in ("Gemm", "LutDecode", "Relu")]
    shared = [node for node in ours.values() if "embedding.weight.c16.codes" in node.input]
    assert sorted(node.op_type for node in shared) == ["LutGather", "LutPlanesLinear"]
    biases = {name: node.input[4] for name, node in ours.items() if node.op_type != "LutGather"}
    assert biases["inner/relu"] == "inner.bias"
    assert biases["back/linear_3"] == "no_bias.float32"
    used = sorted({node.op_type for node in ours.values()})
    assert [f.name for f in proto.functions] == used == ["LutGather", "LutLinear", "LutLinearRelu", "LutPlanesLinear"]


def test_a_dense_model_has_neither_operator(exported: Callable[[str], Any]) -> None:
    proto = onnx.load(exported("dense").path)
    assert not proto.functions
    assert [opset.domain for opset in proto.opset_import] == [""]
    assert "inner.weight.t" in {value.name for value in proto.graph.initializer}


def test_inputs_dimensions_and_outputs_are_named(net: Any) -> None:
    graph = onnx.load(net.path).graph
    assert tuple(target.open(net.path).inputs) == net.model.inputs
    names = [value.name for value in graph.output]
    assert names == (["output"] if len(names) == 1 else [f"output_{i}" for i in range(len(names))])
    allowed = {size for spec in net.model.inputs for size in spec.shape if isinstance(size, str)}
    for value in [*graph.input, *graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            assert not dim.dim_param or any(name in dim.dim_param for name in allowed)


def test_nodes_are_unique_and_named_by_module(net: Any) -> None:
    graph = onnx.load(net.path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    modules = dict(net.model.skeleton.named_modules())
    assert all(name.rpartition("/")[0] in modules for name in names)
    assert all(not node.metadata_props and not node.doc_string for node in graph.node)


def test_the_file_holds_no_local_path(net: Any) -> None:
    content = net.path.read_bytes()
    for stray in (b"/tmp", b"/home", b"/root", b"/work", b".py", b"site-packages", b"torch", os.getcwd().encode()):
        assert stray not in content


@pytest.mark.parametrize("opset", [25, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (18, 21, 23))])
def test_every_opset_is_written_as_asked(perceptron: Model, tmp_path: Path, opset: int) -> None:
    path = tmp_path / "net.onnx"
    target.export(perceptron, path, target.Options(opset=opset))
    proto = onnx.load(path)
    assert {known.domain: known.version for known in proto.opset_import} == {"": opset, "paredown": 1}
    assert proto.ir_version <= 13
    assert target.open(path, RunnerOptions(threads=1)).run({"x": np.zeros((2, 20), np.float32)})["output"].shape == (
        2,
        4,
    )


def test_large_weights_lie_beside_the_file(tmp_path: Path) -> None:
    beside = tmp_path / "net.onnx.data"
    wide = from_module(nn.Linear(512, 64), [InputSpec(name="x", shape=("m", 512))], Source(entry="n:n"))
    target.export(wide, tmp_path / "net.onnx", target.Options(external_bytes=100_000))
    assert beside.stat().st_size == 64 * 512 * 4
    assert (tmp_path / "net.onnx").stat().st_size < 10_000
    x = torch.randn(2, 512)
    have = target.open(tmp_path / "net.onnx").run({"x": x.numpy()})["output"]
    np.testing.assert_allclose(have, wide.module()(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    target.export(wide, tmp_path / "net.onnx")
    assert not beside.exists()


CHILD = """
import sys, pathlib, torch
from torch import nn
from paredown.exporters.onnx import Options, export
from paredown.optimizer.model import InputSpec, Source, from_module
from paredown.optimizer.weight import Codebook
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
model = from_module(net, [InputSpec(name="x", shape=("batch", "time", 8))], Source(entry="n:n"))
book = Codebook(codes=torch.randint(0, 8, (6, 8), dtype=torch.uint8), table=torch.arange(8).to(torch.int8)[None],
                scale=torch.rand(6, 1), code_bits=3)
export(model.with_weights({"0.weight": book}), pathlib.Path(sys.argv[1]), Options(external_bytes=0))
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    running = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-P", "-c", CHILD, str(tmp_path / seed / "net.onnx")]
        running.append(subprocess.Popen(command, cwd=tmp_path / seed, env={**os.environ, "PYTHONHASHSEED": seed}))
    assert [process.wait() for process in running] == [0, 0]
    for name in ("net.onnx", "net.onnx.data"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_opening_a_file_imports_neither_torch_nor_onnx(exported: Callable[[str], Any]) -> None:
    code = (
        "import sys; from pathlib import Path; from paredown.exporters.onnx import open; "
        f"open(Path({str(exported('pair').path)!r})); "
        "print(sorted({'torch', 'onnx', 'onnxscript'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_second_export_keeps_a_named_sequence_length(exported: Callable[[str], Any], tmp_path: Path) -> None:
    model = exported("recurrent").model  # torch 2.13 loses it on the second export of a process
    target.export(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported("recurrent").path.read_bytes()


def test_export_prints_nothing(perceptron: Model, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target.export(perceptron, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")


def test_bfloat16_is_written_but_not_run_by_onnxruntime(perceptron: Model, tmp_path: Path) -> None:
    module = perceptron.module().to(torch.bfloat16)
    model = from_module(module, [InputSpec(name="x", shape=("batch", 20), dtype="bfloat16")], Source(entry="n:n"))
    packed = {
        n: replace(w, dtype=torch.bfloat16) for n, w in perceptron.weights.items() if isinstance(w, Codebook | Uniform)
    }
    target.export(model.with_weights(packed), tmp_path / "net.onnx")
    dtypes = {value.type.tensor_type.elem_type for value in onnx.load(tmp_path / "net.onnx").graph.output}
    assert dtypes == {TensorProto.BFLOAT16}
    with pytest.raises(ExportError, match=r"net.onnx: onnxruntime does not load it: .*; bfloat16 and opsets"):
        target.open(tmp_path / "net.onnx")


def test_weights_that_are_not_beside_the_file_are_named(tmp_path: Path) -> None:
    inputs = [InputSpec(name="x", shape=("batch", 32))]
    model = from_module(nn.Linear(32, 32), inputs, Source(entry="n:n"))
    target.export(model, tmp_path / "net.onnx", target.Options(external_bytes=0))
    beside = tmp_path / "net.onnx.data"
    beside.write_bytes(beside.read_bytes()[:-1])
    said = "net.onnx: its weights are in net.onnx.data, which is {}; keep both in one folder, or export it again"
    for wrong in ("incomplete", "missing"):
        with pytest.raises(ExportError) as caught:
            target.open(tmp_path / "net.onnx")
        assert str(caught.value) == said.format(wrong)
        beside.unlink(missing_ok=True)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1] // 1 if x.shape[1] == 8 else 3)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Eigen()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + 1
        return y


class Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x @ x.mT)


def model_of(module: nn.Module, *shape: int | str) -> Model:
    return from_module(module, [InputSpec(name="x", shape=shape)], Source(entry="n:n"))


def test_an_operator_without_onnx_form_is_named_with_its_module(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^inner: operator aten._linalg_eigh has no ONNX form; replace it"):
        target.export(model_of(Broken(), "batch", 4, 4), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_dimension_that_the_network_fixes_is_named(tmp_path: Path) -> None:
    class Rnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rnn(x)[0]
            return y

    with pytest.raises(
        ExportError, match=r'^input "x": dimension 1 is 8 in the file, "time" was asked for; the network'
    ):
        target.export(model_of(Rnn(), "batch", "time", 4), tmp_path / "net.onnx")


def test_a_network_that_cannot_be_traced_is_one_sentence(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(
        ExportError, match=r"^the network cannot be exported: .*; torch.export must accept it"
    ) as caught:
        target.export(model_of(Branch(), "batch", 4), tmp_path / "net.onnx")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_bad_options_are_named() -> None:
    with pytest.raises(RecipeError, match="opset=26 is out of range; use 18 to 25; 20 is safe"):
        target.Options(opset=26)
    with pytest.raises(RecipeError, match="external_bytes=-1 is negative"):
        target.Options(external_bytes=-1)


def test_bad_feeds_are_named(exported: Callable[[str], Any]) -> None:
    runner = target.open(exported("pair").path)
    a, b = np.zeros((2, 6), np.float32), np.zeros((2, 4), np.float32)
    for fed, text in (
        ({"a": a}, "feeds a: the file takes the inputs a, b"),
        ({"a": a.astype(np.float64), "b": b}, 'input "a": dtype float64 was fed, the file takes float32'),
        ({"a": a, "b": b[:, :3]}, r'input "b": shape \[2, 3\] was fed, the file takes \[batch, 4\]'),
    ):
        with pytest.raises(InputError, match=text):
            runner.run(fed)
    with pytest.raises(ExportError, match="onnxruntime stopped"):
        runner.run({"a": a, "b": b.repeat(2, axis=0)[:3]})


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"net.onnx: onnxruntime does not load it"):
        target.open(tmp_path / "net.onnx")
