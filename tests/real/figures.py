"""The figures of the README: drops on real checkpoints, and how time grows. Writes into bench/results/.

    .venv/bin/python tests/real/figures.py accuracy    drops of ResNet-20 and -56 at 4, 3 and 2 bits, three draws each
    .venv/bin/python tests/real/figures.py others      depthwise, Llama, GRU and denoiser at 4 bits
    .venv/bin/python tests/real/figures.py scaling     seconds and memory against layers and samples, on an idle machine

`tables.py` writes the tables of the README from bench/results/.

Every row is one `optimize run` of a recipe in tests/real/recipes, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "bench" / "results"
NETWORKS = ("resnet20", "resnet56")
OTHERS = ("mobilenet", "stories", "g2p", "dncnn")
EIGHT_BIT = ("conv1.weight", "linear.weight")


def main() -> None:
    (what,) = sys.argv[1:]
    rows = {"accuracy": accuracy, "others": others, "scaling": scaling}[what]()
    path = RESULTS / f"{what}.json"
    found: list[dict[str, Any]] = []
    for row in rows:  # a generator: rows are written as they come
        found.append(row)
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def accuracy() -> Iterator[dict[str, Any]]:
    """Yield a row per network, bits and draw: the drop on both image sets, through the exported file."""
    for bits in (4, 3, 2):
        for network in NETWORKS:
            for draw in (0, 1, 2):
                yield _accuracy_row(network, bits, draw)


def others() -> Iterator[dict[str, Any]]:
    for network in OTHERS:
        with tempfile.TemporaryDirectory() as folder:
            report = optimize_run(network, Path(folder) / "out")
            keys = ("metric", "drop", "drop_ci95", "size_bytes", "bits_per_weight")
            yield {
                "network": network,
                "baseline": report["baseline"]["metric"],
                "baseline_size_bytes": report["baseline"]["size_bytes"],
                **{key: report["final"][key] for key in keys},
                "verify_rel": max(row["rel"] for row in report["verify"]),
                "environment": report["environment"],
            }


def scaling() -> Iterator[dict[str, Any]]:
    """Yield seconds and peak memory of the quantize step, and of the whole run without metrics."""
    for network, samples in (
        *(("resnet20", n) for n in (128, 512, 2048)),
        *(("resnet56", n) for n in (128, 512, 2048)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            report = optimize_run(network, Path(folder) / "out", f"data.samples={samples}", "metric=null")
            (step,) = report["steps"]
            yield {
                "network": network,
                "samples": samples,
                "quantize_seconds": step["seconds"],
                "run_seconds": report["seconds"],
                "peak_rss_bytes": step["peak_rss_bytes"],
                "environment": report["environment"],
            }


def _accuracy_row(network: str, bits: int, draw: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = optimize_run(network, out, f"steps.0.quantize.bits={bits}", f"data.seed={draw}")
        after, before = lossless(network, out)
    middle = [row for row in report["layers"] if row["name"] not in EIGHT_BIT]
    return {
        "network": network,
        "bits": bits,
        "draw": draw,
        "jpeg_before": report["baseline"]["metric"]["value"],
        "jpeg_after": report["final"]["metric"]["value"],
        "jpeg_drop": report["final"]["drop"],
        "jpeg_drop_ci95": report["final"]["drop_ci95"],
        "lossless_before": before,
        "lossless_after": after,
        "lossless_drop": 100 * (before - after),
        "bits_per_weight": 8
        * sum(row["size_bytes"] for row in middle)
        / sum(int(np.prod(row["shape"])) for row in middle),
        "size_bytes": report["final"]["size_bytes"],
        "baseline_size_bytes": report["baseline"]["size_bytes"],
        "verify_rel": max(row["rel"] for row in report["verify"]),
    }


def lossless(network: str, out: Path) -> tuple[float, float]:
    """Return the accuracy of the exported file and of the original on the 1000 lossless test images."""
    from paredown.exporters import onnx
    from paredown.optimizer import planning, recipe
    from paredown.optimizer.entry import resolve

    source = recipe.read(HERE / "recipes" / f"{network}.yaml")
    original = planning.load_model(source)
    metric = resolve("../resnet_cifar.py:top1_lossless", source.base).function
    runner = onnx.open(out / "model.onnx")

    def artifact(x: Tensor) -> Tensor:
        (logits,) = runner.run({"x": x.numpy()}).values()
        return torch.from_numpy(logits)

    with torch.no_grad():
        return float(np.mean(metric(artifact))), float(np.mean(metric(original.module())))


def optimize_run(network: str, out: Path, *settings: str, plan: Path | None = None) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("optimize")), "run", str(HERE / "recipes" / f"{network}.yaml")]
    command += [] if plan is None else ["--plan", str(plan)]
    command += ["--out", str(out)] + [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


if __name__ == "__main__":
    main()
