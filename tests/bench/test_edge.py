"""Scenario edge on fake runners of known latency."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paredown.bench import edge, peak
from paredown.exporters.runner import RunnerOptions
from paredown.optimizer.errors import ExportError, InputError, RecipeError
from paredown.optimizer.model import InputSpec

if TYPE_CHECKING:
    from .conftest import World

KEYS = (
    "artifact runtime scenario batch threads latency_ms_p50 latency_ms_p90 latency_ms_p99 ci95 throughput_per_s "
    "peak_rss_bytes energy_j stages ratio_to_baseline ratio_ci95"
)


def _spec(**changes: object) -> edge.Spec:
    return edge.Spec(**({"peak_rss": False, "min_seconds": 0.5} | changes))  # type: ignore[arg-type]


def test_ratio_lies_in_its_interval(world: World) -> None:
    paths = [world.add("dense.onnx", lambda _: 0.010), world.add("small.onnx", lambda _: 0.004)]
    dense, small = edge.run(paths, _spec(), world.open)
    assert dense.ratio_to_baseline == 1.0
    assert dense.ratio_ci95 == (1.0, 1.0)
    assert small.ratio_ci95 is not None
    assert small.ratio_ci95[0] <= 0.4 <= small.ratio_ci95[1]
    assert small.ratio_ci95[0] <= small.ratio_to_baseline <= small.ratio_ci95[1]
    assert small.ci95 is not None
    assert small.ci95[0] <= small.latency_ms_p50 <= small.ci95[1]
    assert small.throughput_per_s == pytest.approx(250, rel=0.02)


def test_percentiles_agree_with_numpy(world: World) -> None:
    (row,) = edge.run([world.add("dense.onnx", lambda _: 0.010)], _spec(), world.open)
    flat = np.sort(row.samples.ravel()) * 1e3
    for share, value in ((0.5, row.latency_ms_p50), (0.9, row.latency_ms_p90), (0.99, row.latency_ms_p99)):
        place = share * (len(flat) - 1)
        below, above = flat[int(np.floor(place))], flat[int(np.ceil(place))]
        assert value == pytest.approx(below + (place % 1) * (above - below))


def test_one_row_per_cell_with_the_keys_of_the_report(world: World) -> None:
    paths = [world.add("a.onnx", lambda batch: 0.002 * batch), world.add("b.onnx", lambda batch: 0.001 * batch)]
    rows = edge.run(paths, _spec(batch=(1, 8), threads=(1, 2)), world.open)
    assert [(row.threads, row.batch, row.artifact) for row in rows] == [
        (threads, batch, name) for threads in (1, 2) for batch in (1, 8) for name in ("a.onnx", "b.onnx")
    ]
    assert list(rows[0].report()) == [*KEYS.split(), "quantiles_ms"]
    assert rows[0].report()["energy_j"] is None
    assert isinstance(rows[0].report()["ci95"], list)
    assert [options.threads for _, options in world.opened] == [1, 1, 2, 2]
    assert all(options.kernels for _, options in world.opened)


def test_all_artifacts_see_the_same_seeded_feeds(world: World) -> None:
    tokens = InputSpec(name="ids", dtype="int64", shape=("batch", "time"))
    paths = [world.add(name, lambda _: 0.01, [tokens]) for name in ("a.onnx", "b.onnx")]
    edge.run(paths, _spec(batch=(4,), dims={"time": 7}), world.open)
    first = {name: feeds["ids"] for name, feeds in reversed(world.feeds)}
    np.testing.assert_array_equal(first["a.onnx"], first["b.onnx"])
    assert first["a.onnx"].shape == (4, 7)
    assert set(np.unique(first["a.onnx"])) == {0, 1}


def test_given_feeds_are_used(world: World) -> None:
    images = np.ones((64, 3, 8, 8), np.float32)
    spec = _spec(batch=(2,), feeds=lambda batch: {"x": images[:batch], "unused": images})
    edge.run([world.add("a.onnx", lambda _: 0.01)], spec, world.open)
    assert set(world.feeds[0][1]) == {"x"}
    np.testing.assert_array_equal(world.feeds[0][1]["x"], images[:2])


def test_progress_goes_from_0_to_1(world: World) -> None:
    seen: list[tuple[float, str]] = []
    edge.run([world.add("a.onnx", lambda _: 0.01)], _spec(batch=(1, 2)), world.open, lambda *event: seen.append(event))
    assert seen == [(0.0, "batch 1, 1 thread"), (0.5, "batch 2, 1 thread"), (1.0, "done")]


def test_bad_input_says_what_and_where(world: World) -> None:
    fixed = world.add("fixed.onnx", lambda _: 0.01, [InputSpec(name="x", dtype="float32", shape=(1, 3))])
    with pytest.raises(InputError, match=r'fixed.onnx: batch 8 was asked for, but input "x" has the fixed first dim'):
        edge.run([fixed], _spec(batch=(8,)), world.open)
    with pytest.raises(InputError, match=r"gone.onnx: there is no such artifact; export first"):
        edge.run([Path("gone.onnx")], _spec(), world.open)
    with pytest.raises(InputError, match="bench: there is nothing to measure"):
        edge.run([], _spec(), world.open)
    with pytest.raises(InputError, match="two artifacts have the same folder and file name"):
        edge.run([fixed, fixed], _spec(), world.open)
    with pytest.raises(InputError, match=r'the bench data has no input "x" \(it has image\)'):
        edge.run([fixed], _spec(feeds=lambda _: {"image": np.ones(3)}), world.open)
    with pytest.raises(RecipeError, match=r"bench: batch=\[0\]; list numbers of at least 1"):
        edge.Spec(batch=(0,))
    with pytest.raises(RecipeError, match="min_count=0 is not positive"):
        edge.Spec(min_count=0)
    with pytest.raises(RecipeError, match="threads=-1 is negative"):
        RunnerOptions(threads=-1)


def test_an_artifact_that_fails_is_named(world: World) -> None:
    def fail(batch: int) -> float:
        raise ValueError(f"no kernel for batch {batch}")

    with pytest.raises(ExportError, match=r"a.onnx: the artifact does not run with x \[2, 3, 8, 8\]: no kernel for ba"):
        edge.run([world.add("a.onnx", fail)], _spec(batch=(2,)), world.open)


def test_equal_names_show_their_folder(world: World, tmp_path: Path) -> None:
    world.add("model.onnx", lambda _: 0.01)
    other = tmp_path / "other" / "model.onnx"
    other.parent.mkdir()
    other.write_bytes(b"")
    first, second = edge.run([world.folder / "model.onnx", other], _spec(), world.open)
    assert second.artifact == "other/model.onnx"
    assert first.artifact == f"{world.folder.name}/model.onnx"


CHILD = """
import numpy as np
class Runner:
    def __init__(self, megabytes): self.megabytes = megabytes
    def run(self, feeds): return {"y": np.ones(self.megabytes * 131072)}
def open(path, options): return Runner(int(path.stem))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux")
def test_peak_memory_is_of_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_exporter.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import fake_exporter  # type: ignore[import-not-found]

    jobs = [
        peak.Job(path=Path(f"{size}"), options=RunnerOptions(), open_=fake_exporter.open, feeds={"x": np.ones(2)})
        for size in (1, 201)
    ]
    small, large = (peak.peak_rss_bytes(job) for job in jobs)
    assert small is not None
    assert large is not None
    assert large - small == pytest.approx(200 * 2**20, rel=0.1)


def test_peak_memory_is_null_where_the_child_cannot_open() -> None:
    job = peak.Job(path=Path("x"), options=RunnerOptions(), open_=lambda _path, _options: None, feeds={})  # type: ignore[arg-type, return-value]
    assert peak.peak_rss_bytes(job) is None
