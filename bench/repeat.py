"""Prove that intervals are honest: benchmark one pair again and again, and count how often the first interval holds.

    python -m paredown.bench.repeat A.onnx B.onnx --times 10 --out bench/results

Each time is one `optimize bench` in a process of its own; options after `--` are passed to it. The first run's interval
must hold the ratios of at least nine runs in ten, its own included, and its half-width must be at most 3 %. Writes
intervals.json; exit code 1 where it does not hold. `inside_any` is the share of all ordered pairs of runs where the
interval of one holds the ratio of the other; `spread` the standard deviation of the logarithms of the ratios, which
`between_runs` of a machine like this should not be below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]
SHARE, HALF_WIDTH = 0.9, 0.03


def bench(artifacts: Sequence[Path], options: Sequence[str]) -> Json:
    """Return bench.json of one run of the command, with the seconds that it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "paredown.optimizer.cli", "bench", *map(str, artifacts)]
        subprocess.run([*command, "--out", folder, *options], check=True, stdout=subprocess.DEVNULL)
        document: Json = json.loads((Path(folder) / "bench.json").read_text(encoding="utf-8"))
    return document | {"seconds": time.monotonic() - start}


def verdicts(documents: Sequence[Mapping[str, Any]]) -> list[Json]:
    """Return one entry per artifact and condition other than the baseline's: every ratio, and how many hold."""
    first = documents[0]["rows"][0]["artifact"]
    places = [place for place, row in enumerate(documents[0]["rows"]) if row["artifact"] != first]
    return [_verdict([document["rows"][place] for document in documents]) for place in places]


def _verdict(rows: Sequence[Mapping[str, Any]]) -> Json:
    low, high = rows[0]["ratio_ci95"]
    ratios = [row["ratio_to_baseline"] for row in rows]
    inside = sum(low <= ratio <= high for ratio in ratios)
    half = (high - low) / 2 / ratios[0]
    others = [a["ratio_ci95"][0] <= ratio <= a["ratio_ci95"][1] for a, ratio in _ordered_pairs(rows)]
    return {
        **{key: rows[0][key] for key in ("artifact", "runtime", "scenario", "batch", "threads")},
        "ratios": ratios,
        "ratio_ci95": [row["ratio_ci95"] for row in rows],
        "processes": [row.get("details", {}).get("processes") for row in rows],
        "drifted": [row.get("details", {}).get("drifted") for row in rows],
        "waited": [row.get("waited") for row in rows],
        "inside_first": inside,
        "half_width_first": half,
        "inside_any": sum(others) / len(others) if others else None,
        "spread": statistics.stdev(map(math.log, ratios)) if len(ratios) > 1 else None,
        "holds": inside >= SHARE * len(rows) and half <= HALF_WIDTH,
    }


def _ordered_pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Return every row beside the ratio of every other."""
    return [(one, other["ratio_to_baseline"]) for one, other in itertools.permutations(rows, 2)]


def write(documents: Sequence[Mapping[str, Any]], out: Path) -> list[Json]:
    """Write intervals.json into a folder and return its entries."""
    found = verdicts(documents)
    times = {"times": len(documents), "seconds": [document["seconds"] for document in documents]}
    document = {"environment": documents[0]["environment"], **times, "pairs": found}
    out.mkdir(parents=True, exist_ok=True)
    (out / "intervals.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


def arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what the command line says, and what stands after `--`."""
    split = list(words).index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m paredown.bench.repeat", description="How honest intervals are.")
    parser.add_argument("artifacts", nargs=2, type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    parser.epilog = "What stands after -- is passed to optimize bench."
    return parser.parse_args(words[:split]), list(words[split + 1 :])


if __name__ == "__main__":
    asked, options = arguments(sys.argv[1:])
    done = []
    for number in range(asked.times):
        done.append(bench(asked.artifacts, options))
        print(f"{number + 1}/{asked.times}: {done[-1]['verdict']}", flush=True)
    entries = write(done, asked.out)
    for entry in entries:
        print(
            f"batch {entry['batch']}, threads {entry['threads']}: {entry['inside_first']} of {len(done)} in the first "
            f"interval, half-width {100 * entry['half_width_first']:.1f} %: {'holds' if entry['holds'] else 'FAILS'}"
        )
    sys.exit(0 if all(entry["holds"] for entry in entries) else 1)
