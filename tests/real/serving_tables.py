"""The README's tables of load, of stages, of honest intervals and of what falls back, from bench/results/."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results"
NAMES = {"baseline.onnx": "original", "model.onnx": "int8"}


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def server() -> str:
    document = _read("server")
    lines = [
        f"ResNet-56 under MLPerf LoadGen on one thread of {document['environment']['cpu']['model']}, batches of up "
        "to 8 that wait up to 1 ms; Server: 99 % of the answers within 15 ms. `python tests/real/serving.py server`.\n",
        "| scenario | file | samples/s | of the original's (95 %) | p50 ms | p90 ms | p99 ms | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        details = row["details"]
        load = details.get("throughput_ratio_to_baseline")
        ratio, ends = (load, details["throughput_ratio_ci95"]) if load else _inverse(row)
        shown = f"{ratio:.2f}x" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends and ratio != 1 else "")
        verdict = "VALID" if details["valid"] else f"INVALID: {details['invalid_because']}"
        known = row["scenario"] != "offline"  # where all samples are sent at once, latencies say how long the run was
        times = " | ".join(f"{row[f'latency_ms_p{percent}']:.2f}" if known else "" for percent in (50, 90, 99))
        lines.append(
            f"| {row['scenario']} | {NAMES[Path(row['artifact']).name]} | {row['throughput_per_s']:,.0f} "
            f"| {shown} | {times} | {verdict} |"
        )
    return "\n".join(lines) + "\n" + _soak()


def _inverse(row: dict[str, Any]) -> tuple[float, list[float] | None]:
    """Return how many times the original's speed a latency ratio is."""
    ends = row["ratio_ci95"]
    return 1 / row["ratio_to_baseline"], None if ends is None else [1 / ends[1], 1 / ends[0]]


def _soak() -> str:
    lines = [
        "\nAt 80 % of that load for half an hour, `python tests/real/serving.py soak`:\n",
        "| file | requests/s | requests | errors | memory | p99 of the first, of the last third | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in _read("soak")["runs"]:
        first, last = run["p99_ms_first_third"], run["p99_ms_last_third"]
        lines.append(
            f"| {NAMES[run['artifact']]} | {run['rate_per_s']:,.0f} | {run['requests']:,} | {run['errors']} "
            f"| {100 * run['rss_growth']:+.1f} % | {first:.1f} ms, {last:.1f} ms ({100 * run['p99_drift']:+.0f} %) "
            f"| {'yes' if run['passed'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def stages() -> str:
    rows = _read("stages")["rows"]
    names = list(rows[0]["stages"])
    lines = [
        "MobileNetV1-0.25 from JPEG bytes to five classes, one client, one thread: median milliseconds by stage, and "
        "their sum over the time from end to end. `python tests/real/serving.py stages`.\n",
        "| file | " + " | ".join(names) + " | end to end | sum | most |",
        "|---|" + "---|" * (len(names) + 3),
    ]
    for row in rows:
        times = " | ".join(f"{row['stages'][name]:.3f}" for name in names)
        share = row["details"]["stage_sum_to_end_to_end"]
        lines.append(
            f"| {NAMES[Path(row['artifact']).name]} | {times} | {row['latency_ms_p50']:.3f} | {100 * share:.0f} % "
            f"| {row['details']['dominant_stage']} |"
        )
    return "\n".join(lines) + "\n"


def intervals() -> str:
    return "\n".join(_interval(name) for name in ("intervals", "intervals_later"))


def _interval(name: str) -> str:
    document = _read(name)
    (pair,) = document["pairs"]
    low, high = pair["ratio_ci95"][0]
    ratios, drifted = pair["ratios"], sum(map(bool, pair["drifted"]))
    return (
        f"One pair (ResNet-56, original and int8) benchmarked {document['times']} times within minutes: the first run "
        f"gave {ratios[0]:.4f} ({low:.4f} to {high:.4f}, half-width {100 * pair['half_width_first']:.1f} %), and "
        f"{pair['inside_first']} of {document['times']} ratios, {min(ratios):.4f} to {max(ratios):.4f}, lie in it; "
        f"runs marked as drifted: {drifted}. The interval of a run holds the ratio of another in "
        f"{100 * pair['inside_any']:.0f} % of all pairs. `python tests/real/serving.py intervals`.\n"
    )


def never_slower() -> str:
    lines = [
        "What falls back on this machine at batch 1 and 32, and what stays: `python tests/real/never_slower.py`. "
        "Latency: of the result over the original's. Each plan was run again, and gave the same bytes.\n",
        "| network | steps | objective | layers compressed | latency at batch 1, 32 | of the reasons |",
        "|---|---|---|---|---|---|",
    ]
    for row in _read("never_slower"):
        kept = sum(count for mode, count in row["modes"].items() if mode != "dense")
        ratios = [
            f"{one['ratio_to_baseline']:.2f}x ({one['ratio_ci95'][0]:.2f} to {one['ratio_ci95'][1]:.2f})"
            for one in row["bench"]
            if one["artifact"] == "model.onnx"
        ]
        lines.append(
            f"| {row['network']} | `{row['steps'].strip('[]')}` | {row['objective']} | {kept} of {row['layers']} "
            f"| {', '.join(ratios)} | {_reasons(row['decisions'])} |"
        )
    return "\n".join(lines) + "\n"


def _reasons(decisions: list[dict[str, Any]]) -> str:
    """Return the causes that the decisions of a run name, each with how often; of the whole network first."""
    whole = next((row["reason"] for row in decisions if row.get("fallback") == "the original"), "")
    words = ("decoded to floats", "fusion broken", "width not aligned", "launch bound", "not memory bound")
    found = Counter(word for row in decisions for word in words if word in row["reason"] and row["layer"] != "*")
    told = ", ".join(f"{word} {count}" for word, count in found.most_common())
    return "; ".join(part for part in (whole, told) if part) or "none"
