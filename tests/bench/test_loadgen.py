"""LoadGen: its log read, its verdict told, and real runs of all four scenarios (slow)."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paredown.bench import command, loadgen, mlperf, multistream, offline, server, singlestream
from paredown.bench.batching import Batcher, Policy
from paredown.bench.rows import Row
from paredown.exporters.runner import RunnerOptions
from paredown.optimizer.errors import ExportError, InfeasibleError, RecipeError, RuntimeMissingError

from .test_arrivals import POOL, Sleeper

if TYPE_CHECKING:
    from types import ModuleType

SUMMARY = """
Result is : INVALID
  Performance constraints satisfied : NO
Recommendations:
 * Reduce target QPS to improve latency.

================================================
Additional Stats
"""


class Log:
    """A stand-in of the module: a test that ends at once and leaves these files."""

    def __init__(self, **entries: object) -> None:
        latencies = {f"result_{n}.00_percentile_latency_ns": 1e6 * n for n in loadgen.PERCENTILES}
        self.entries = {"loadgen_version": "6.0", "result_validity": "VALID", **latencies} | entries

    def write(self, _lg: object, _test: object, _system: object, folder: Path) -> None:
        lines = [":::MLLOG " + json.dumps({"key": key, "value": value}) for key, value in self.entries.items()]
        (folder / "mlperf_log_detail.txt").write_text("\n".join(["noise", *lines]))
        (folder / "mlperf_log_summary.txt").write_text(SUMMARY)


def _run(monkeypatch: pytest.MonkeyPatch, test: loadgen.Test, log: Log, logs: Path | None = None) -> loadgen.Result:
    monkeypatch.setattr(loadgen, "_start", log.write)
    with Batcher(Sleeper(), Policy()) as batcher:
        return loadgen.run(test, batcher, POOL, logs)


def test_the_log_is_read_in_the_terms_of_each_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Log(result_completed_samples_per_sec=81.5, result_samples_per_second=90.0, result_mean_latency_ns=2e6)
    found = {kind: _run(monkeypatch, loadgen.Test(kind=kind), rate) for kind in ("Server", "Offline", "SingleStream")}
    assert {kind: result.throughput_per_s for kind, result in found.items()} == pytest.approx(
        {"Server": 81.5, "Offline": 90.0, "SingleStream": 500.0}
    )
    assert found["Server"].latency_ms == {50: 50.0, 90: 90.0, 99: 99.0}
    queries = {f"result_{n}.00_percentile_per_query_latency_ns": 3e6 for n in loadgen.PERCENTILES}
    many = Log(result_mean_query_latency_ns=4e6, **queries)
    result = _run(monkeypatch, loadgen.Test(kind="MultiStream", samples_per_query=8), many)
    assert (result.throughput_per_s, result.latency_ms[99]) == pytest.approx((2000.0, 3.0))


def test_an_invalid_run_says_why_in_loadgens_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = Log(result_validity="INVALID", result_samples_per_second=1.0)
    result = _run(monkeypatch, loadgen.Test(kind="Offline"), log, tmp_path / "logs" / "offline")
    assert not result.valid
    told = "Performance constraints satisfied : NO Recommendations: * Reduce target QPS to improve latency."
    assert result.reason == told
    assert sorted(path.name for path in (tmp_path / "logs" / "offline").iterdir()) == [
        "mlperf_log_detail.txt",
        "mlperf_log_summary.txt",
    ]


def test_a_log_without_a_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    del log.entries["result_validity"]
    with pytest.raises(ExportError, match="Server: LoadGen wrote no result; keep its logs with --out"):
        _run(monkeypatch, loadgen.Test(kind="Server"), log)


def test_without_the_package_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    monkeypatch.delitem(sys.modules, "mlperf_loadgen", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
    assert builtins.__import__ is real
    with pytest.raises(RuntimeMissingError, match=r"MLPerf LoadGen is not installed.*; pip install mlcommons-loadgen"):
        loadgen.module()
    assert RuntimeMissingError.exit_code == 7


class _Missing:
    def find_spec(self, name: str, *_: object) -> None:
        if name == "mlperf_loadgen":
            raise ModuleNotFoundError(f"No module named {name!r}")


def test_a_run_is_of_valid_length_from_60_seconds_and_1500_queries() -> None:
    assert loadgen.Test(kind="Server").full_length
    assert not loadgen.Test(kind="Server", min_seconds=59).full_length
    assert not loadgen.Test(kind="Server", min_queries=1499).full_length


def test_bad_options_say_what_to_do() -> None:
    with pytest.raises(RecipeError, match=r"batch=\[4\], but this scenario forms batches itself; use --max-batch"):
        mlperf.Spec(batch=(4,))
    with pytest.raises(RecipeError, match="bench: min_queries=0 is not positive"):
        mlperf.Spec(min_queries=0)
    with pytest.raises(RecipeError, match="bench: p99_ms=-1 is not positive"):
        server.Spec(p99_ms=-1)
    with pytest.raises(RecipeError, match=r"bench: concurrency=\[0\]; list numbers from 1 on"):
        server.Spec(concurrency=(0,))
    with pytest.raises(RecipeError, match='--concurrency: "1,x" is not a list of whole numbers'):
        command._spec(server, command.Request(artifacts=(), settings={"concurrency": "1,x"}))
    with pytest.raises(RecipeError, match="the scenario offline has no --p99-ms"):
        command._check_settings([offline], {"p99_ms": 15.0})


def test_the_interval_of_the_throughput_ratio_holds_the_ratio() -> None:
    rates, baseline = [200.0, 204.0, 198.0, 201.0, 203.0], [100.0, 101.0, 100.0, 99.0, 102.0]
    found = server.ratio_interval(rates, baseline, 2.0)
    assert found is not None
    logs = np.log(np.array(rates) / np.array(baseline))
    half = 2.776 * logs.std(ddof=1) / np.sqrt(5)
    assert np.log(found) == pytest.approx([logs.mean() - half, logs.mean() + half], abs=1e-4)
    assert server.ratio_interval(rates, baseline, 1.5) == pytest.approx([1.5, found[1]])
    assert server.ratio_interval(rates[:4], baseline[:4], 2.0) is None


def test_a_bound_that_no_rate_holds_is_infeasible() -> None:
    spec = server.Spec(p99_ms=0.01, max_batch=1, search_seconds=0.01)
    with Batcher(Sleeper(0.001), Policy()) as batcher:
        system = mlperf.System(
            path=Path("a.onnx"), name="a.onnx", runner=Sleeper(), batcher=batcher, pool=POOL, threads=1
        )
        probe = server.Probe(system=system, spec=spec, number=0, least=100.0)
        assert not probe(400.0)
        with pytest.raises(InfeasibleError, match=r"a.onnx: its 99th percentile is above 0.01 ms even at 180.0 req"):
            probe(90.0)


def test_a_server_that_is_refused_steps_down_until_loadgen_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def run(test: loadgen.Test, *_: object) -> loadgen.Result:
        asked.append(test.rate_per_s)
        return _result(valid=test.rate_per_s < 95)

    monkeypatch.setattr(loadgen, "run", run)
    with Batcher(Sleeper(), Policy()) as batcher:
        system = mlperf.System(path=Path("a.onnx"), name="a", runner=Sleeper(), batcher=batcher, pool=POOL, threads=1)
        trial, tried = server.confirmed(system, server.Spec(), 100.0)
    assert asked == pytest.approx([100, 97, 94.09])
    assert trial.result.valid
    assert [step["valid"] for step in tried] == [False, False, True]


def _result(valid: bool) -> loadgen.Result:
    return loadgen.Result(
        valid=valid,
        reason="" if valid else "too slow",
        version="6",
        latency_ms={50: 1.0, 90: 1.0, 99: 1.0},
        throughput_per_s=90.0,
        log={},
        seconds=(0.001,) * 90,
        finished=tuple(0.01 * n for n in range(90)),
    )


# --- real runs, seconds each


def _rows(module: ModuleType, folder: Path, **changes: object) -> Sequence[Row]:
    paths = [folder / name for name in ("a.onnx", "b.onnx")]
    for path in paths:
        path.write_bytes(b"")
    settings = {"min_seconds": 1.0, "min_queries": 100, "probe_seconds": 0.3, "peak_rss": False} | changes

    def opened(path: Path, _options: RunnerOptions) -> Sleeper:
        return Sleeper(0.002 if path.name == "a.onnx" else 0.001)

    found: Sequence[Row] = module.run(paths, module.Spec(**settings), opened)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", [singlestream, multistream, offline], ids=lambda module: module.__name__[15:])
def test_loadgen_calls_a_calibrated_run_valid(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """800 queries: LoadGen calls no run of MultiStream valid before 662, whatever its latencies."""
    monkeypatch.chdir(tmp_path)
    before, after = _rows(module, tmp_path, min_queries=800)
    for row in (before, after):
        assert row.details["valid"], row.details["invalid_because"]
        assert row.details["valid_length"] is False
        assert "not a run of valid length" in str(row.details["summary"])
        assert str(row.details["loadgen_version"])[0].isdigit()
    assert after.throughput_per_s > before.throughput_per_s
    assert (after.ratio_to_baseline is None) is (module is offline)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]
    json.dumps([before.report(), after.report()])


@pytest.mark.slow
def test_a_server_run_searches_and_confirms(tmp_path: Path) -> None:
    changes = {"p99_ms": 60.0, "searches": 5, "search_seconds": 0.1, "tolerance": 0.3, "sweep_seconds": 0.3}
    before, after = _rows(server, tmp_path, concurrency=(1, 4), min_queries=300, logs=tmp_path / "logs", **changes)
    for row in (before, after):
        sweep = row.details["concurrency"]
        assert isinstance(sweep, list)
        assert [found["clients"] for found in sweep] == [1, 4]
        assert all(found["little_within_5_percent"] for found in sweep)
        assert row.details["confirmations"]
    low, high = after.details["throughput_ratio_ci95"]  # type: ignore[misc]
    assert low <= after.details["throughput_ratio_to_baseline"] <= high  # type: ignore[operator]
    assert after.ratio_to_baseline is None
    assert len(list((tmp_path / "logs").iterdir())) == 2
    json.dumps([before.report(), after.report()])


@pytest.mark.slow
def test_an_artifact_that_fails_under_load_is_an_error() -> None:
    runner = Sleeper()
    with Batcher(runner, Policy()) as batcher:
        runner.fails = True
        with pytest.raises(ExportError, match="SingleStream: the artifact failed under load: broken"):
            loadgen.run(loadgen.Test(kind="SingleStream", min_seconds=0.1, min_queries=5), batcher, POOL)
