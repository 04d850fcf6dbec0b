"""Real files in real processes: a ratio with its interval, streams of real models, and what a child cannot do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from paredown.bench import child, edge, sessions
from paredown.bench.board import sampling
from paredown.exporters import onnx as exporter
from paredown.exporters.runner import RunnerOptions
from paredown.optimizer.errors import ExportError

REAL = Path(os.environ.get("PAREDOWN_DATA", "../shared/data")) / "speech"
QUICK = {"min_seconds": 0.05, "warmup_seconds": 0.1, "processes": 3, "extra_seconds": 0.0, "meter": "none"}


def _spec(**changes: object) -> edge.Spec:
    return edge.Spec(**({"peak_rss": False} | QUICK | changes))  # type: ignore[arg-type]


def _net(path: Path, width: int) -> Path:
    """Write x -> x W, [batch, width]."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [width, width], np.ones(width * width, np.float32))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "net", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_files_are_timed_in_fresh_processes(tmp_path: Path) -> None:
    paths = [_net(tmp_path / "wide.onnx", 256), _net(tmp_path / "narrow.onnx", 32)]
    rows = edge.run(paths, _spec(batch=(1, 4)), exporter.open)
    assert [(row.artifact, row.batch) for row in rows] == [(path.name, batch) for batch in (1, 4) for path in paths]
    for row in rows:
        assert row.details["interval"] == "over fresh processes"
        assert row.details["processes"] == 3
        assert row.ci95 is not None
        assert row.ci95[0] <= row.latency_ms_p50 <= row.ci95[1]
    assert rows[1].ratio_to_baseline < 1  # type: ignore[operator]


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    """The file goes between the first look at it and the measurement."""
    path = _net(tmp_path / "net.onnx", 4)
    cell = sessions.Cell(feeds=({"x": np.ones((1, 4), np.float32)},), sampling=_spec().sampling(1, 1))
    work = sessions.Work(paths=(path,), options=RunnerOptions(), open_=exporter.open, cells=(cell,))
    path.write_bytes(b"nonsense")
    with pytest.raises(ExportError, match=r"^net.onnx: the process that measures stopped: .*net.onnx"):
        sessions.gather(work, _spec().limits(1), "process", lambda: None)


def test_a_child_answers_and_fails_plainly() -> None:
    assert child.ask(sorted, [3, 1, 2], timeout=60) == [1, 2, 3]
    with pytest.raises(child.ChildError, match=r"^ValueError: math domain error|ValueError: expected"):
        child.ask(__import__("math").sqrt, -1.0, timeout=60)
    with pytest.raises(child.ChildError, match="timed out"):
        child.ask(__import__("time").sleep, 30, timeout=0.2)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dtln_base_stage1.onnx", {"state": {"tf_op_layer_stack_2": "input_3"}, "frame_ms": 8.0}),
        (
            "silero_vad_16k_op15.onnx",
            {"state": {"stateN": "state"}, "inputs": {"sr": 16000}, "dims": {"sequence": 576}, "frame_ms": 32.0},
        ),
    ],
)
def test_streams_of_real_models_have_a_real_time_factor(name: str, options: dict[str, object]) -> None:
    if not (REAL / name).is_file():
        pytest.skip("no real data")
    (row,) = edge.run([REAL / name], _spec(**options), exporter.open)
    factors = [row.details[f"real_time_factor_p{share}"] for share in (50, 99)]
    assert 0 < factors[0] <= factors[1]  # type: ignore[operator]
    assert factors[0] == pytest.approx(row.latency_ms_p50 / options["frame_ms"])  # type: ignore[operator]
    assert 0 <= row.details["missed_deadline_share"] <= 1  # type: ignore[operator]


@pytest.mark.real
def test_the_state_of_a_real_model_is_its_own(tmp_path: Path) -> None:
    """What comes back is what the model gave, by a loop written here."""
    path = REAL / "silero_vad_16k_op15.onnx"
    if not path.is_file():
        pytest.skip("no real data")
    runner = exporter.open(path, RunnerOptions(threads=1))
    spec = _spec(state={"stateN": "state"}, inputs={"sr": 16000}, dims={"sequence": 576})
    feeds = edge.feeds_of(runner, spec, 1)
    call = sampling.frame(runner, feeds, spec.state)
    state = np.zeros((2, 1, 128), np.float32)
    for _ in range(5):
        call()
        state = runner.run({"input": feeds["input"], "sr": np.array(16000), "state": state})["stateN"]
    kept = next(
        cell.cell_contents
        for cell in call.__closure__
        if isinstance(cell.cell_contents, dict) and "sr" in cell.cell_contents
    )  # type: ignore[union-attr]
    np.testing.assert_array_equal(kept["state"], state)
    assert np.abs(state).max() > 0
