"""MLPerf LoadGen: one test run against a queue, and what its log says.

LoadGen calls us from its own threads, and an exception that crosses them ends the process: a runner's error is kept,
the query is answered, and the error is raised when the test is over.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..optimizer.errors import ExportError, RuntimeMissingError
from .batching import Answer, Batcher, Request
from .feeds import Feeds

Kind: TypeAlias = Literal["SingleStream", "MultiStream", "Server", "Offline"]
PERCENTILES = (50, 90, 99)
FULL_SECONDS, FULL_QUERIES = 60.0, 1500
"""What a run of valid length lasts at least. 1,500 queries: LoadGen's early stopping needs about 1,300 for a p99."""
INSTALL = "pip install mlcommons-loadgen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One test. `expected_ms` must lie below the true latency of a query and `expected_per_s` above the true rate of
    samples, or LoadGen ends early; `rate_per_s` and `p99_ms` are the schedule and the bound of Server."""

    kind: Kind
    min_seconds: float = FULL_SECONDS
    min_queries: int = FULL_QUERIES
    samples_per_query: int = 1
    expected_ms: float = 1.0
    expected_per_s: float = 1.0
    rate_per_s: float = 1.0
    p99_ms: float = 15.0
    seed: int = 0

    @property
    def full_length(self) -> bool:
        return self.min_seconds >= FULL_SECONDS and self.min_queries >= FULL_QUERIES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What LoadGen says, and what the queue saw of every sample, in the order of completion.

    seconds: how long each was inside; finished: when it left, on the queue's clock.
    """

    valid: bool
    reason: str
    version: str
    latency_ms: Mapping[int, float]
    throughput_per_s: float
    log: Mapping[str, object] = field(repr=False)
    seconds: tuple[float, ...] = field(repr=False)
    finished: tuple[float, ...] = field(repr=False)


def module() -> Any:
    """Return the LoadGen module; RuntimeMissingError with the command that installs it."""
    try:
        return importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        what = f"MLPerf LoadGen is not installed: {error}"
        raise RuntimeMissingError(what, where="--scenario", fix=INSTALL) from error


def run(test: Test, batcher: Batcher, pool: Sequence[Feeds], logs: Path | None = None) -> Result:
    """Run one test; its log files are moved into the folder `logs`, or deleted.

    The test runs in a thread of its own, so that Ctrl-C is answered at once.
    """
    lg, system = module(), _System(batcher, pool)
    with _folder(logs) as folder:
        thread = threading.Thread(target=_start, args=(lg, test, system, folder), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
        if system.errors:
            raise ExportError(f"the artifact failed under load: {system.errors[0]}", where=test.kind)
        detail = _detail((folder / "mlperf_log_detail.txt").read_text(encoding="utf-8"))
        summary = (folder / "mlperf_log_summary.txt").read_text(encoding="utf-8")
    return _result(test, detail, summary, system)


class _System:
    """The system under test as LoadGen calls it: every sample of a query is queued at once."""

    def __init__(self, batcher: Batcher, pool: Sequence[Feeds]) -> None:
        self._lg, self._batcher, self._pool = module(), batcher, pool
        self.errors, self.seconds, self.finished = list[Exception](), list[float](), list[float]()

    def issue(self, samples: Sequence[Any]) -> None:
        try:
            self._batcher.submit(Request(feeds=self._pool[item.index], done=self._done(item.id)) for item in samples)
        except Exception as error:  # the queue is closing, because Ctrl-C was pressed
            self.errors.append(error)
            self._lg.QuerySamplesComplete([self._lg.QuerySampleResponse(item.id, 0, 0) for item in samples])

    def _done(self, identity: int) -> Any:
        def note(answer: Answer) -> None:
            if answer.error is not None:
                self.errors.append(answer.error)
            self.seconds.append(answer.finished - answer.submitted)
            self.finished.append(answer.finished)
            self._lg.QuerySamplesComplete([self._lg.QuerySampleResponse(identity, 0, 0)])

        return note


def _start(lg: Any, test: Test, system: _System, folder: Path) -> None:
    sut = lg.ConstructSUT(system.issue, lambda: None)
    size = len(system._pool)
    library = lg.ConstructQSL(size, size, lambda _: None, lambda _: None)
    output, log = lg.LogOutputSettings(), lg.LogSettings()
    output.outdir, output.copy_summary_to_stdout = str(folder), False
    log.log_output, log.enable_trace = output, False
    lg.StartTestWithLogSettings(sut, library, _settings(lg, test), log, "")
    lg.DestroySUT(sut)
    lg.DestroyQSL(library)


def _settings(lg: Any, test: Test) -> Any:
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, test.kind)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.min_query_count = int(1e3 * test.min_seconds), test.min_queries
    nanoseconds = max(1, int(1e6 * test.expected_ms))
    settings.single_stream_expected_latency_ns = settings.multi_stream_expected_latency_ns = nanoseconds
    settings.multi_stream_samples_per_query = test.samples_per_query
    settings.offline_expected_qps = test.expected_per_s
    settings.server_target_qps = test.rate_per_s
    settings.server_target_latency_ns = int(1e6 * test.p99_ms)
    settings.server_target_latency_percentile = 0.99
    seeds = {"qsl": 1, "sample_index": 2, "schedule": 3}
    for name, offset in seeds.items():
        setattr(settings, f"{name}_rng_seed", 10 * test.seed + offset)
    return settings


def _detail(text: str) -> dict[str, object]:
    """Return the keys of LoadGen's detailed log; the last value of each."""
    found: dict[str, object] = {}
    for line in text.splitlines():
        if line.startswith(":::MLLOG "):
            entry = json.loads(line.removeprefix(":::MLLOG "))
            found[entry["key"]] = entry["value"]
    return found


def _result(test: Test, log: Mapping[str, Any], summary: str, system: _System) -> Result:
    if "result_validity" not in log:
        raise ExportError("LoadGen wrote no result", where=test.kind, fix="keep its logs with --out and read them")
    middle = "_per_query" if test.kind == "MultiStream" else ""
    latency = {n: log[f"result_{n}.00_percentile{middle}_latency_ns"] * 1e-6 for n in PERCENTILES}
    valid = log["result_validity"] == "VALID"
    reason = "" if valid else _reason(summary)
    throughput = _throughput(test, log)
    details = {key: value for key, value in log.items() if key.startswith(("result_", "effective_"))}
    return Result(
        valid=valid,
        reason=reason,
        version=str(log["loadgen_version"]),
        latency_ms=latency,
        throughput_per_s=throughput,
        log=details,
        seconds=tuple(system.seconds),
        finished=tuple(system.finished),
    )


def _throughput(test: Test, log: Mapping[str, Any]) -> float:
    """Return samples per second."""
    if test.kind == "Server":
        return float(log["result_completed_samples_per_sec"])
    if test.kind == "Offline":
        return float(log["result_samples_per_second"])
    mean = "result_mean_query_latency_ns" if test.kind == "MultiStream" else "result_mean_latency_ns"
    return 1e9 * test.samples_per_query / float(log[mean])


def _reason(summary: str) -> str:
    """Return LoadGen's own words on why a run is not valid."""
    lines = [line.strip() for line in summary.partition("Result is")[2].partition("Additional Stats")[0].splitlines()]
    kept = [line for line in lines[1:] if line and not set(line) <= {"=", "-"}]
    return " ".join(kept)


@contextlib.contextmanager
def _folder(logs: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="paredown-loadgen-"))
    try:
        yield folder
        if logs is not None:
            logs.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, logs, dirs_exist_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
