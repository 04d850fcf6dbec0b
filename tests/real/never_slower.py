"""The figures of falling back in the README: what pays on this machine and what does not. Writes into bench/results/.

    .venv/bin/python tests/real/never_slower.py [NUMBER ...]     on an idle machine; the cases of these numbers alone

Every row is one `optimize run` of a recipe in tests/real/recipes with a benchmark and another objective, and one of the
plan that it wrote, whose files must be the same byte for byte.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from figures import RESULTS, optimize_run

FOUR = "steps=[quantize: {quantizer: lnq, bits: 4}]"
DYNAMIC = "steps=[quantize: {quantizer: lnq, bits: 4, activations: dynamic}]"
INT8 = "steps=[quantize: {quantizer: uniform, bits: 8, activations: int8}]"
CASES = (
    ("resnet20", "latency", FOUR),
    ("resnet20", "size", FOUR),
    ("resnet20", "latency", DYNAMIC),
    ("resnet20", "latency", INT8),
    ("stories", "latency", DYNAMIC),
)
SAME = ("plan.yaml", "model.onnx", "model.safetensors", "model.json")


def main() -> None:
    path, chosen = RESULTS / "never_slower.json", [int(word) for word in sys.argv[1:]] or range(len(CASES))
    found = json.loads(path.read_text()) if path.is_file() else []
    for case, row in zip(chosen, rows([CASES[index] for index in chosen]), strict=True):
        found = sorted([known for known in found if known["case"] != case] + [{"case": case, **row}], key=_case)
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def _case(row: dict[str, Any]) -> int:
    return int(row["case"])


def rows(cases: Sequence[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    """Yield what was decided in each case, with the benchmark of the result."""
    for network, objective, steps in cases:
        with tempfile.TemporaryDirectory() as folder:
            out, again = Path(folder) / "out", Path(folder) / "again"
            settings = (steps, f"objective={objective}", "bench={batch: [1, 32]}")
            report = optimize_run(network, out, *settings)
            optimize_run(network, again, steps, f"objective={objective}", plan=out / "plan.yaml")
            same = all((out / name).read_bytes() == (again / name).read_bytes() for name in SAME)
        yield {
            "network": network,
            "objective": objective,
            "steps": steps.removeprefix("steps="),
            "layers": len(report["layers"]),
            "modes": Counter(str(row["mode"]) for row in report["layers"]),
            "decisions": report["decisions"],
            "bench": [{key: value for key, value in row.items() if key != "details"} for row in report["bench"]],
            "caution": report["environment"].get("bench_caution", ""),
            "final": report["final"],
            "baseline": report["baseline"],
            "replay_is_identical": same,
            "seconds": report["seconds"],
            "environment": report["environment"],
        }


if __name__ == "__main__":
    main()
