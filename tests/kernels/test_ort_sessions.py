"""Our operators in sessions: what they fuse with, threads, memory, bodies, and other versions of onnxruntime."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from paredown.exporters.onnx_session import session_options
from paredown.kernels.lut_spec import LutSpec

from .ort_models import (
    DOMAIN,
    SPEC,
    Case,
    assert_close,
    every_form,
    feeds_of,
    layer,
    linear_model,
    linear_node,
    model,
    open_session,
)

OTHERS = "PAREDOWN_ORT_PYTHONS"
"""Names interpreters with other versions of onnxruntime, separated as in PATH."""

RUN = """
import sys
import numpy as np
import onnxruntime

folder, library = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
results = session.run(None, dict(np.load(folder + "/feeds.npz")))
np.savez(folder + "/results.npz", **dict(zip([value.name for value in session.get_outputs()], results)))
"""

CLOSED = """
import sys
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
del options
with open("/proc/self/maps") as lines:
    print(any(line.rstrip().endswith(sys.argv[1]) for line in lines))
"""

MEMORY = """
import sys
import numpy as np
import onnxruntime

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

path, library = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.register_custom_ops_library(library)
before = anonymous()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
session.run(None, {"x": np.ones((1, 4096), np.float32), "t": np.zeros((1, 1), np.float32)})
print(anonymous() - before)
"""


STARVED = """
import resource
import sys
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feeds = {"x": np.ones((2000, 4096), np.float32), "t": np.zeros((2000, 1), np.float32)}
with open("/proc/self/statm") as sizes:
    held = int(sizes.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**29, held + 2**29))
try:
    session.run(None, feeds)
except Exception as error:
    print(error)
"""


def block(product: onnx.NodeProto, tensors: list[onnx.TensorProto], n: int, k: int) -> onnx.ModelProto:
    """Return x -> product -> + residual -> layer norm as exporters write it, in sizes (batch, length, ..)."""
    f = TensorProto.FLOAT
    constants = {"two": np.float32(2), "epsilon": np.float32(1e-5), "gain": np.ones(n, "f"), "shift": np.zeros(n, "f")}
    nodes = [
        helper.make_node("Identity", ["x"], ["x_same"]),
        product,
        helper.make_node("Add", ["product", "residual"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["mean"], axes=[-1]),
        helper.make_node("Sub", ["sum", "mean"], ["centred"]),
        helper.make_node("Pow", ["centred", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["variance"], axes=[-1]),
        helper.make_node("Add", ["variance", "epsilon"], ["above_zero"]),
        helper.make_node("Sqrt", ["above_zero"], ["deviation"]),
        helper.make_node("Div", ["centred", "deviation"], ["normal"]),
        helper.make_node("Mul", ["normal", "gain"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, f, ["batch", "length", size]) for name, size in (("x", k), ("residual", n))
    ]
    made = model(nodes, inputs, [helper.make_tensor_value_info("y", f, None)], tensors)
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    made.opset_import[0].version = 17
    return made


def optimized(made: onnx.ModelProto, library: Path, path: Path) -> Counter[str]:
    """Return how many nodes of each type onnxruntime makes of a model."""
    options = session_options(threads=1, library=library)
    options.log_severity_level, options.optimized_model_filepath = 4, str(path)
    onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_what_follows_a_node_fuses_as_after_a_product(library: Path, tmp_path: Path) -> None:
    one = layer(Case(spec=SPEC, biased=False))
    node, tensors = linear_node(one, "x_same", "t", "product", "w_")
    matrix = onnx.numpy_helper.from_array(one.weight.values.T.astype(np.float32), "W")
    plain = helper.make_node("MatMul", ["x_same", "W"], ["product"])
    ours = optimized(block(node, tensors, SPEC.n, SPEC.k), library, tmp_path / "ours.onnx")
    theirs = optimized(block(plain, [matrix], SPEC.n, SPEC.k), library, tmp_path / "theirs.onnx")
    assert ours == {"LutLinear": 1, "SkipLayerNormalization": 1}
    assert theirs == {"MatMul": 1, "SkipLayerNormalization": 1}


def test_sizes_of_outputs_are_inferred(library: Path, tmp_path: Path) -> None:
    one = layer(Case(spec=SPEC))
    for sizes, want in {
        ("batch", 3): ["batch", 3, 37],
        (4,): [4, 37],
        (): [37],
        ("batch", None): ["batch", "paredown", 37],
    }.items():
        made = linear_model([one], sizes)
        options = session_options(threads=1, library=library)
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = [size.partition("_")[0] if isinstance(size, str) else size for size in session.get_outputs()[0].shape]
        assert found == want


def test_the_kernel_comes_before_the_body(library: Path) -> None:
    one, feeds = layer(Case(spec=SPEC)), feeds_of(Case(spec=SPEC))
    made = linear_model([one])
    body = [helper.make_node("Constant", [], ["zero"], value_float=0.0), helper.make_node("Mul", ["x", "zero"], ["y"])]
    opsets = [helper.make_opsetid("", 20)]
    inputs = ["x", "codes", "table", "scale", "bias"]
    made.functions.append(helper.make_function(DOMAIN, "LutLinear", inputs, ["y"], body, opsets))
    assert_close(open_session(made, library).run(None, feeds)[0], one, feeds)
    assert not open_session(made, None).run(None, feeds)[0].any()


def test_results_do_not_depend_on_threads(library: Path) -> None:
    spec = LutSpec(n=512, k=1024, bits=4, group=128, zero=128.0, unit=1 / 127)
    layers = [layer(Case(spec=spec, int8=int8, rank=8)) for int8 in (False, True)]
    made = linear_model(layers)
    for tokens in (1, 7, 33):
        feeds = feeds_of(layers[0].case, (tokens,))
        found = [open_session(made, library, threads).run(None, feeds) for threads in (1, 2, 3)]
        for y, one in zip(found[0], layers, strict=True):
            assert_close(y, one, feeds)
        for other in found[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_sessions_and_threads_at_once(library: Path) -> None:
    spec = LutSpec(n=256, k=512, bits=3, group=64, zero=128.0, unit=1 / 127)
    layers = [layer(Case(spec=spec, int8=int8, rank=4)) for int8 in (False, True)]
    made, wrong = linear_model(layers), []
    sessions = [open_session(made, library, threads) for threads in (1, 2)]
    feeds = [feeds_of(layers[0].case, (tokens,), tokens) for tokens in (1, 3, 20)]
    want = [sessions[0].run(None, one) for one in feeds]

    def work(start: int) -> None:
        for i in range(start, start + 40):
            session, which = sessions[i % 2], i % 3
            if i % 13 == 0:
                session = open_session(made, library)
            found = session.run(None, feeds[which])
            if not all(np.array_equal(a, b) for a, b in zip(found, want[which], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_stay_in_the_file(library: Path, tmp_path: Path) -> None:
    """Four layers of 4096 x 4096 at 4 bits: 34 MB that are mapped, not copied."""
    n = k = 4096
    rng, nodes = np.random.default_rng(0), []
    tensors = [onnx.numpy_helper.from_array(np.zeros(1, np.float32), "bias")]
    attributes = {
        "n": n,
        "k": k,
        "bits": 4,
        "group": 0,
        "table_rows": 0,
        "zero": 128.0,
        "unit": 1 / 127,
        "layout": "c16",
    }
    for i in range(4):
        parts = {
            f"codes{i}": rng.integers(0, 256, n * k // 2, dtype=np.uint8),
            f"table{i}": rng.integers(0, 256, 16, dtype=np.uint8),
            f"scale{i}": np.full(n, 0.01, np.float16),
        }
        tensors += [onnx.numpy_helper.from_array(values, name) for name, values in parts.items()]
        inputs = [f"v{i}" if i else "x", *parts, "bias"]
        nodes.append(
            helper.make_node("LutLinearInt8", inputs, [f"v{i + 1}"], domain=DOMAIN, name=f"n{i}", **attributes)
        )
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", k), ("t", 1))]
    made = model(nodes, inputs, [helper.make_tensor_value_info("v4", TensorProto.FLOAT, None)], tensors)
    path = tmp_path / "model.onnx"
    onnx.save(made, path, save_as_external_data=True, location="model.bin", size_threshold=1024)
    assert (size := (tmp_path / "model.bin").stat().st_size) > 33e6
    command = [sys.executable, "-c", MEMORY, str(path), str(library)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < size / 4, f"{grown} bytes of memory for {size} bytes of weights"


def test_a_lack_of_memory_is_an_error_of_the_node(library: Path, tmp_path: Path) -> None:
    """onnxruntime's allocator throws, which must not end the process. A group of 1 input takes a step of 32."""
    one = layer(Case(spec=LutSpec(n=1, k=4096, bits=4, group=1, zero=128.0)))
    onnx.save(linear_model([one]), tmp_path / "model.onnx")
    command = [sys.executable, "-c", STARVED, str(tmp_path / "model.onnx"), str(library)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f'paredown::LutLinear "l0_node": no memory for {2000 * 4096 * 32 * 4} bytes of scratch' in said


def test_the_library_stays_when_its_last_session_goes(library: Path) -> None:
    """Else its operators would be made, and lost, once a session."""
    command = [sys.executable, "-c", CLOSED, str(library)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def others() -> list[str]:
    return [path for path in os.environ.get(OTHERS, "").split(os.pathsep) if path]


@pytest.mark.parametrize("python", others() or [""])
def test_other_versions_of_onnxruntime(library: Path, tmp_path: Path, python: str) -> None:
    if not python:
        pytest.skip(f"other versions of onnxruntime: {OTHERS} names no interpreter that has one")
    layers, feeds = every_form(), feeds_of(Case(spec=SPEC, rank=5))
    onnx.save(linear_model(layers), tmp_path / "model.onnx")
    np.savez(tmp_path / "feeds.npz", **feeds)
    command = [python, "-c", RUN, str(tmp_path), str(library)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with np.load(tmp_path / "results.npz") as found:
        for i, one in enumerate(layers):
            assert_close(found[f"y{i}"], one, feeds)
