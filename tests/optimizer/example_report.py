"""Example reports: a full one, a slower one, one with every chart, and one in which hardly anything was measured."""

from __future__ import annotations

from typing import TypeAlias

Json: TypeAlias = dict[str, object]

_CONVS = [("conv1", 3, 16)]
_CONVS += [(f"layer1.{block}.conv{index}", 16, 16) for block in range(3) for index in (1, 2)]
_CONVS += [
    (f"layer2.{block}.conv{index}", 16 if (block, index) == (0, 1) else 32, 32)
    for block in range(3)
    for index in (1, 2)
]
_CONVS += [
    (f"layer3.{block}.conv{index}", 32 if (block, index) == (0, 1) else 64, 64)
    for block in range(3)
    for index in (1, 2)
]


def full_report(ratio: float = 0.56) -> Json:
    """Return a realistic report of ResNet-20 at 4 bits; `ratio` scales the optimized model's latency."""
    return {
        "schema": "paredown.report/1",
        "environment": {
            "os": "Debian GNU/Linux 12 (bookworm)",
            "kernel": "6.1.0-28-amd64",
            "cpu": {"model": "Intel(R) Xeon(R) Processor", "cores": 2, "flags": ["avx2", "avx512_vnni", "amx_int8"]},
            "memory_bytes": 25275990016,
            "python": "3.11.2",
            "packages": {"torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.31.1"},
            "git_commit": "5a0c1d7e9f0b6d1b8f3a1c2d4e5f60718293a4b5",
            "threads_env": {},
        },
        "seed": 0,
        "command": "optimize run recipes/resnet20.yaml --out runs/resnet20 --seed 0 --set steps.0.quantize.bits=4",
        "baseline": {
            "metric": {"name": "top1", "value": 0.8103, "n": 10000},
            "metric_ci95": [0.8025, 0.8179],
            "size_bytes": 1089576,
            "parameters": 272474,
            "macs": 40810000,
        },
        "steps": [_step("prune", {"criterion": "obs", "ratio": 0.1, "round_to": 16}, 12.4), *_last_steps()],
        "layers": [*(_conv(index, *conv) for index, conv in enumerate(_CONVS)), _linear()],
        "final": {
            "metric": {"name": "top1", "value": 0.8072, "n": 10000},
            "metric_ci95": [0.7994, 0.8148],
            "drop": 0.31,
            "drop_ci95": [0.05, 0.57],
            "size_bytes": 149120,
            "parameters": 272474,
            "macs": 40810000,
            "bits_per_weight": 4.21,
        },
        "verify": [
            _verified("onnxruntime", 1, None),
            _verified("onnxruntime", 32, None),
            _verified("torch reference", 32, None),
        ],
        "bench": [*_bench(1, 1, 1.912, 1.0, ratio), *_bench(32, 1, 44.18, 1.0, ratio * 1.21)],
        "decisions": [
            {
                "layer": "*",
                "kept": "compressed",
                "reason": "a folded codebook runs at fp32 speed until low-bit kernels exist",
            },
            {"layer": "conv1", "fallback": "int8", "reason": "3 input channels: 4 bits cost 1.9 points for 216 bytes"},
            {
                "layer": "layer3.2.conv2",
                "fallback": "dense",
                "reason": "the factorized layer measured 1.12 times slower",
            },
            {"layer": "layer1.0.conv1", "kept": True, "reason": "measured 1.41 times as fast at rank 9"},
        ],
    }


def served_report() -> Json:
    """Return a benchmark of the server and of the edge scenario in which every chart has data, some of it doubtful."""
    edge = _bench(1, 1, 1.912, 1.0, 0.56)
    for row, watts in zip(edge, (21.4, 19.8), strict=True):
        row["energy_j"] = 0.0171 * _number(row, "ratio_to_baseline")
        row["details"] = {"drifted": False, "meter": "rapl", "idle_w": 12.5, "mean_w": watts}
    edge[1]["details"] |= {"drifted": True, "drift_reason": "the CPU clock moved by 14 % (2.1 to 2.4 GHz)"}  # type: ignore[operator]
    return {
        "schema": "paredown.bench/1",
        "environment": full_report()["environment"],
        "bench": [*_served(1.0), *edge],
    }


def history_lines() -> list[Json]:
    """Return the lines of five runs on two machines, one of them with clocks that drifted."""
    runs = [
        (0.61, 149120, "m1"),
        (0.60, 149120, "m1"),
        (0.44, 149120, "m2"),
        (0.55, 131072, "m1"),
        (0.41, 131072, "m2"),
    ]
    return [_line(day, *run) for day, run in enumerate(runs, 1)]


def _line(day: int, ratio: float, size: int, machine: str) -> Json:
    bench = _bench(1, 1, 1.9, 1.0, ratio)
    keys = ("artifact", "scenario", "batch", "threads", "latency_ms_p50", "ratio_to_baseline", "throughput_per_s")
    kept = [{key: row[key] for key in keys} for row in bench]
    if day == 2:
        kept[1]["doubt"] = "clocks drifted"
    return {
        "time": f"2026-11-{day:02}T10:20:30+00:00",
        "kind": "run",
        "recipe": "0f1e2d3c4b5a" if day < 4 else "a1b2c3d4e5f6",
        "fingerprint": machine,
        "machine": {"m1": "Intel(R) Xeon(R) Processor", "m2": "AMD EPYC"}[machine],
        "git_commit": None,
        "metric": 0.80 + 0.002 * day,
        "metric_name": "top1",
        "size_bytes": size,
        "failure": None,
        "bench": kept,
    }


def slower_report() -> Json:
    """Return a report of a model that became slower and failed verification."""
    report = full_report(ratio=1.32)
    report["verify"] = [_verified("onnxruntime", 1, "layer2.0.conv1")]
    report["environment"] = {
        "os": "Linux",
        "bench_caution": "The machine was busy: 31 % of the time a core was missing.",
    }
    return report


def hostile_report() -> Json:
    """Return a report whose names try to become markup, in HTML and in rich."""
    bad = "<script>alert(1)</script>[red]x[/red]"
    report = full_report()
    report["command"] = report["seed"] = bad
    report["environment"] = {bad: {bad: bad}, "bench_caution": bad}
    report["baseline"] = report["final"] = {"metric": {"name": bad, "value": 1.0, "n": 1}}
    report["layers"] = [{"name": bad, "format": bad, "mode": bad, "shape": [1, 2], "bits": 4, "rank": bad}]
    report["steps"] = [{"step": bad, "spec": {bad: bad}}]
    report["decisions"] = [{"layer": bad, "fallback": bad, "reason": bad}]
    report["verify"] = [{"runtime": bad, "batch": bad, "first_bad_layer": bad}]
    stages = {"stages": {bad: 1.0}, "quantiles_ms": [float(share) for share in range(101)]}
    details = {"valid": False, "invalid_because": bad, "meter": bad, "energy": bad}
    load = {"sweep": [{"concurrency": 1, "throughput_per_s": 1.0, "latency_ms_p99": 1.0}]}
    report["bench"] = [
        {"artifact": bad, "runtime": bad, "scenario": bad, "details": details},
        {"artifact": bad + "2", "batch": bad, "scenario": bad, "energy_j": 1.0, **stages, "details": details | load},
    ]
    return report


def null_report() -> Json:
    """Return a report in which nothing was measured."""
    return {
        "schema": "paredown.report/1",
        "environment": None,
        "seed": None,
        "command": None,
        "baseline": {"metric": None, "size_bytes": None},
        "steps": [{"step": "quantize", "spec": None, "seconds": None, "metric": None}],
        "layers": [{"name": "fc", "shape": None, "bits": None, "error_rel": None}],
        "final": None,
        "verify": None,
        "bench": [{"artifact": "model.onnx", "ci95": [None, None]}],
        "decisions": [],
    }


_STAGES = ("decode", "resize", "normalise", "host_to_device", "queue", "compute", "device_to_host", "post")


def _served(base: float) -> list[Json]:
    """Return two rows of the server scenario; the original missed its count of queries."""
    found = []
    for name, speed in (("original.onnx", base), ("model.onnx", 1.62 * base)):
        times = (3.1, 0.62, 0.21, 0.02, 0.9 / speed, 6.9 / speed, 0.02, 0.05)
        row = _bench(8, 2, 1.02 * sum(times), 1.0)[0]
        row |= {"artifact": name, "scenario": "server", "stages": dict(zip(_STAGES, times, strict=True))}
        row |= {"ratio_to_baseline": None, "ratio_ci95": None}
        row["details"] = {
            "valid": speed != base,
            "invalid_because": None if speed != base else "1,204 queries, of which 1,500 are needed",
            "target_p99_ms": 15.0,
            "scheduled_per_s": 402.0 * speed,
            "throughput_ratio_to_baseline": speed / base,
            "throughput_ratio_ci95": [speed / base * 0.98, speed / base * 1.02],
            "sweep": [_swept(clients, speed) for clients in (1, 2, 4, 8, 16)],
            "probes": [_probed(rate * speed) for rate in (200, 300, 380, 402, 420, 460)],
            "energy": "unavailable: no meter covers the CPU",
        }
        found.append(row)
    return found


def _swept(clients: int, speed: float) -> Json:
    rate = 460 * speed * clients / (clients + 1.4)
    figures = {
        "throughput_per_s": rate,
        "latency_ms_p50": 1000 * clients / rate,
        "latency_ms_p99": 1280 * clients / rate,
    }
    return {"concurrency": clients, **figures, "littles_law_error": 0.008 * clients / 4}


def _probed(rate: float) -> Json:
    load = min(rate % 1000 / 1000, 0.99)
    latency = 6.0 + 0.02 * rate * (1 + 2 * load)
    return {"scheduled_per_s": rate, "latency_ms_p99": latency, "held": latency <= 15.0}


def _number(row: Json, key: str) -> float:
    value = row[key]
    assert isinstance(value, float)
    return value


def _quantiles(median: float) -> list[float]:
    """Return 101 quantiles with a tail, as of latencies."""
    shares = [share / 100 for share in range(101)]
    return [median * (0.93 + 0.14 * share + 0.24 * share**30 + 0.9 * share**400) for share in shares]


def _step(name: str, spec: Json, seconds: float) -> Json:
    metric = {"name": "top1", "value": 0.8088, "n": 10000}
    return {
        "step": name,
        "spec": spec,
        "seconds": seconds,
        "peak_rss_bytes": 612e6,
        "metric": metric,
        "error_rel": 0.018,
    }


def _last_steps() -> list[Json]:
    spec: Json = {"quantizer": "lnq", "bits": 4, "group": "row", "override": {"conv1": {"bits": 8}}}
    return [_step("quantize", spec, 48.7), _step("export", {"target": "onnx"}, 0.82)]


def _conv(index: int, name: str, inputs: int, outputs: int) -> Json:
    first = name == "conv1"
    bits = 8.4 if first else 4.2
    return {
        "name": name,
        "shape": [outputs, inputs, 3, 3],
        "channels_kept": None,
        "rank": None,
        "format": "uniform" if first else "codebook",
        "bits": bits,
        "size_bytes": round(outputs * inputs * 9 * bits / 8),
        "error_rel": 0.004 if first else 0.021 + 0.004 * ((index * 7) % 5),
        "mode": "folded",
    }


def _linear() -> Json:
    return {**_conv(0, "conv1", 64, 10), "name": "fc", "shape": [10, 64], "size_bytes": 672, "error_rel": 0.003}


def _verified(runtime: str, batch: int, bad: str | None) -> Json:
    rel = 0.31 if bad else 3.1e-7
    values = {"max_abs": 10 * rel, "rel": rel, "argmax_agreement": 0.9125 if bad else 1.0}
    return {"runtime": runtime, "batch": batch, **values, "first_bad_layer": bad, "size_bytes": 197_345}


def _bench(batch: int, threads: int, base: float, *ratios: float) -> list[Json]:
    return [
        {
            "artifact": name,
            "runtime": "onnxruntime",
            "scenario": "edge",
            "batch": batch,
            "threads": threads,
            "latency_ms_p50": base * ratio,
            "latency_ms_p90": base * ratio * 1.06,
            "latency_ms_p99": base * ratio * 1.31,
            "ci95": [base * ratio * 0.985, base * ratio * 1.02],
            "throughput_per_s": 1000 * batch / (base * ratio * 1.02),
            "peak_rss_bytes": 71.4e6 + 1e6 * ratio,
            "energy_j": None,
            "stages": None,
            "ratio_to_baseline": ratio,
            "ratio_ci95": [1.0, 1.0] if name == "original.onnx" else [ratio * 0.97, ratio * 1.03],
            "quantiles_ms": _quantiles(base * ratio),
        }
        for name, ratio in zip(("original.onnx", "model.onnx"), ratios, strict=False)
    ]
