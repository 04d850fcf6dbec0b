"""The soak: windows added up, its verdict, and a run that goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from paredown.bench import mlperf, soak
from paredown.optimizer.errors import InputError

from .test_arrivals import Sleeper


def _line(latencies: np.ndarray, **changes: object) -> dict[str, object]:
    places, counts = np.unique(np.searchsorted(soak.BINS, latencies), return_counts=True)
    base = {"seconds": 15.0, "requests": len(latencies), "errors": 0, "stopped": False, "rss_bytes": 100_000_000}
    return {**base, "counts": [[int(a), int(b)] for a, b in zip(places, counts, strict=True)], **changes}


def _lines(count: int = 30) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    return [_line(rng.exponential(0.004, 2000)) for _ in range(count)]


def test_percentiles_of_windows_are_those_of_all_their_requests() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.exponential(0.001 * (n + 1), 500) for n in range(6)]
    for percent in (50, 90, 99):
        expected = np.percentile(np.concatenate(parts), percent)
        assert soak.percentile([_line(part) for part in parts], percent) == pytest.approx(expected, rel=0.03)


def test_a_steady_run_passes() -> None:
    verdict = soak.judged(_lines())
    assert verdict["passed"]
    assert (verdict["windows"], verdict["requests"], verdict["errors"]) == (30, 60_000, 0)
    assert verdict["rss_growth"] == 0
    assert verdict["p99_ms_first_third"] == pytest.approx(18.4, rel=0.1)


def test_memory_of_the_first_minute_does_not_count() -> None:
    lines = _lines()
    for line in lines[: soak.WARM_WINDOWS]:
        line["rss_bytes"] = 1
    assert soak.judged(lines)["passed"]


@pytest.mark.parametrize("change", [{"errors": 1}, {"stopped": True}, {"rss_bytes": 103_000_000}])
def test_what_changes_for_the_worse_fails(change: dict[str, object]) -> None:
    lines = _lines()
    for line in lines[-3:]:
        line.update(change)
    assert not soak.judged(lines)["passed"]


def test_a_slower_last_third_fails() -> None:
    lines = _lines(20) + [_line(np.random.default_rng(2).exponential(0.005, 2000)) for _ in range(10)]
    verdict = soak.judged(lines)
    assert verdict["p99_drift"] == pytest.approx(0.25, abs=0.08)
    assert not verdict["passed"]


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "WINDOW_SECONDS", 0.02)
    out, spec = tmp_path / "soak.jsonl", mlperf.Spec(max_batch=1, probe_seconds=0.01)

    def run(windows: int, rate: float = 500.0) -> dict[str, object]:
        return soak.soak(Path("a.onnx"), spec, lambda _path, _options: Sleeper(), (rate, 0.02 * windows, out))

    with pytest.raises(InputError, match=r"soak: 3 windows of 0\.02 s are too few; run 12 or more"):
        run(3)
    before = out.read_text().splitlines()
    with out.open("a") as file:
        file.write('{"started": 1')  # killed in the middle of a line
    verdict = run(12)
    after = out.read_text().splitlines()
    assert after[:4] == before
    assert len([json.loads(line) for line in after]) == 13
    assert (verdict["windows"], verdict["requests"], verdict["errors"]) == (12, 120, 0)
    with pytest.raises(InputError, match=r"soak.jsonl: it holds a run with other settings; name another --out"):
        run(12, rate=100.0)
