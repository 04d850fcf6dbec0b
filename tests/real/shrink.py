"""The figures of pruning and of int8 in the README, on real checkpoints. Writes into bench/results/.

    .venv/bin/python tests/real/shrink.py pruning    30 % of the MACs of ResNet-20 and -56: obs beside magnitude
    .venv/bin/python tests/real/shrink.py int8       every convolutional checkpoint with int8 activations
    .venv/bin/python tests/real/shrink.py speed      ResNet-56: latency and bytes, on an idle machine
    .venv/bin/python tests/real/shrink.py kinds      prune, quantize, export and verify one network of each kind
    .venv/bin/python tests/real/shrink.py modes      4-bit linear layers: accuracy through the kernels, in both modes

All rows but those of `pruning` are `optimize run` of a recipe in tests/real/recipes with other steps, in a process of
its own; those of `pruning` call the prune step and measure in torch. `figures.py readme` writes the tables.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import HERE, RESULTS, lossless, optimize_run
from torch import nn

PART = 0.3
PLAIN = {"compensate": False, "correct": False}
INNER = {"skip": ("conv1",)}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "obs": {"criterion": "obs"},
    "obs, inner widths": {"criterion": "obs", **INNER},
    "magnitude, inner widths, all alike": {"criterion": "magnitude", "scope": "layer", **INNER, **PLAIN},
    "magnitude, inner widths, global": {"criterion": "magnitude", **INNER, **PLAIN},
}
"""What is compared at the same MACs: the settings of the prune step. Inner widths: conv1 of each block alone.

Methods that compensate nothing are measured twice: raw, and after re-estimating batch normalizations.
"""

PRUNE = {
    "mobilenet": "{remove_macs: 0.1}",
    "espnet": "{remove_macs: 0.2}",
    "ultraface": "{remove_macs: 0.2}",
    "dncnn": "{remove_macs: 0.3}",
    "stories": "{ratio: 0.1}",
    "g2p": "{ratio: 0.1, skip: ['*_emb']}",
    "dtln": "{ratio: 0.1}",
}
IN_INTEGERS = ("mobilenet", "ultraface", "dncnn")
"""Those of them that go on in int8; a pruned ESPNet differs at single pixels by more than `verify` allows."""

INT8 = "{quantizer: uniform, bits: 8, activations: int8}"
FOUR = "{quantizer: lnq, bits: 4}"
DYNAMIC = "{quantizer: lnq, bits: 4, activations: dynamic}"
LINEAR = ("stories", "g2p", "dtln", "resnet20")
"""Checkpoints with linear layers."""
CONVOLUTIONAL = ("resnet20", "resnet56", "mobilenet", "dncnn", "espnet", "ultraface")
SPEED = {
    "pruned 30 %, widths of 16": f"[prune: {{remove_macs: {PART}, round_to: 16}}]",
    "int8": f"[quantize: {INT8}]",
    "pruned 30 %, widths of 16, int8": f"[prune: {{remove_macs: {PART}, round_to: 16}}, quantize: {INT8}]",
}


def main() -> None:
    (what,) = sys.argv[1:]
    rows = {"pruning": pruning, "int8": int8, "speed": speed, "kinds": kinds, "modes": modes}[what]()
    path, found = RESULTS / f"{what}.json", list[dict[str, Any]]()
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def pruning() -> Iterator[dict[str, Any]]:
    """Yield a row per network and method: the drop on both image sets at 70 % of the MACs."""
    for network in ("resnet56", "resnet20"):
        before: dict[str, float] = {}
        for method in METHODS:
            for draw in (0, 1, 2) if method == "obs" else (0,):
                yield _pruned(network, method, draw, before)


def int8() -> Iterator[dict[str, Any]]:
    """Yield a row per network: the drop, the parity with torch, and which operators the runtime runs in integers."""
    for network in CONVOLUTIONAL:
        yield _summed(network, f"[quantize: {INT8}]")


def kinds() -> Iterator[dict[str, Any]]:
    for network, settings in PRUNE.items():
        second = INT8 if network in IN_INTEGERS else FOUR
        yield _summed(network, f"[prune: {settings}, quantize: {second}]")


def speed() -> Iterator[dict[str, Any]]:
    """Yield a row per way of shrinking ResNet-56: latency beside the original in the same process, bytes, drop."""
    for name, steps in SPEED.items():
        yield {"name": name, **_summed("resnet56", steps, "bench={batch: [1, 32], threads: [1]}")}


def modes() -> Iterator[dict[str, Any]]:
    """Yield a row per network and mode of its linear layers, measured through onnxruntime with the kernels."""
    for network in LINEAR:
        yield _summed(network, f"[quantize: {FOUR}]")
        yield _summed(network, f"[quantize: {DYNAMIC}]")


def _summed(network: str, steps: str, *settings: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = optimize_run(network, out, f"steps={steps}", *settings)
        files = {path.name: path.stat().st_size for path in out.glob("*.onnx*")}
        accuracy = lossless(network, out) if network.startswith("resnet") else None
    final, baseline = report["final"], report["baseline"]
    return {
        "network": network,
        "steps": steps,
        "samples": report["steps"][0]["spec"].get("samples"),
        "baseline": {key: baseline[key] for key in ("metric", "size_bytes", "parameters", "macs")},
        "final": {key: final[key] for key in ("metric", "drop", "drop_ci95", "drop_unit", "size_bytes", "macs")},
        "lossless": accuracy,
        "files": files,
        "verify": report["verify"],
        "bench": report["bench"],
        "modes": Counter(str(row["mode"]) for row in report["layers"]),
        "seconds": report["seconds"],
        "environment": report["environment"],
    }


def _pruned(network: str, method: str, draw: int, before: dict[str, float]) -> dict[str, Any]:
    """Return a row; `before` holds the original's accuracies once they are known."""
    from paredown.optimizer import cost, planning, prune, recipe
    from paredown.optimizer.steps import Hooks
    from paredown.optimizer.walk import trace

    job = planning.load(recipe.read(HERE / "recipes" / f"{network}.yaml", [f"data.seed={draw}"]))
    if not before:
        before.update(_accuracies(job.model.module()))
    spec = prune.Spec(remove_macs=PART, **METHODS[method])
    result = prune.apply(job.model, spec, prune.plan(job.model, spec, (), job.ground), job.calibration, Hooks())
    graph = trace(result.model.module(), job.calibration.batches[:1]).graph
    module = result.model.module()
    row: dict[str, Any] = {"network": network, "method": method, "draw": draw, "notes": list(result.notes)}
    row["macs"] = cost.macs(graph) / cost.macs(job.graph)
    row["before"], row["after"] = dict(before), _accuracies(module)
    if not spec.compensate:
        _reestimate(module, job.calibration.batches)
        row["after_bn"] = _accuracies(module)
    for key in ("after", "after_bn"):
        if key in row:
            row[key.replace("after", "drop")] = {name: 100 * (before[name] - row[key][name]) for name in before}
    return row


def _accuracies(module: nn.Module) -> dict[str, float]:
    from paredown.optimizer.entry import resolve

    metrics = {name: resolve(f"../resnet_cifar.py:top1_{name}", HERE / "recipes") for name in ("jpeg", "lossless")}
    with torch.no_grad():
        return {name: float(np.mean(metric.function(module))) for name, metric in metrics.items()}


def _reestimate(module: nn.Module, batches: Any) -> None:
    """Give every batch normalization the statistics of the calibration data, averaged over its batches."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.reset_running_stats()
            part.momentum = None
            part.train()
    with torch.no_grad():
        for batch in batches:
            module(*batch)
    module.eval()


if __name__ == "__main__":
    main()
