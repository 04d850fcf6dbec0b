"""Write the tables of the README from bench/results/: `.venv/bin/python tests/real/tables.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from kernel_tables import bars, convolutions, engines, kernels, llama, modes
from serving_tables import intervals, never_slower, server, stages

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "bench" / "results"
NETWORKS = ("resnet20", "resnet56")


def main() -> None:
    """Write the tables between the markers of README.md."""
    path = HERE.parent.parent / "README.md"
    text = path.read_text()
    begin, end = "<!-- results:begin -->\n", "<!-- results:end -->"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(head + begin + "\n".join(make() for make in TABLES) + end + tail)


def accuracy() -> str:
    rows = json.loads((RESULTS / "accuracy.json").read_text())
    lines = [
        "CIFAR-10, codebooks by `lnq` with error feedback, first convolution and classifier at 8 bits: loss of "
        "accuracy in points, mean of three draws of 512 unlabelled images (least to most), no training. 10,000 test "
        "images as JPEG, paired, and 1,000 lossless ones (ten images a point). Measured through the exported file by "
        "`python tests/real/figures.py accuracy`.\n",
        "| network | bits | bits a weight | weights, of the original's | loss, 10,000 JPEG | loss, 1,000 lossless |",
        "|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        for bits in (4, 3, 2):
            part = [row for row in rows if (row["network"], row["bits"]) == (network, bits)]
            share = np.mean([row["size_bytes"] / row["baseline_size_bytes"] for row in part])
            weight = np.mean([row["bits_per_weight"] for row in part])
            before = f"{100 * part[0]['jpeg_before']:.2f} %"
            lines.append(
                f"| {network} ({before}) | {bits} | {weight:.2f} | {100 * share:.1f} % "
                f"| {_spread(part, 'jpeg_drop')} | {_spread(part, 'lossless_drop')} |"
            )
    return "\n".join(lines) + "\n"


def _spread(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"**{np.mean(values):.2f}** ({min(values):.2f} to {max(values):.2f})"


def others() -> str:
    lines = [
        "Other architectures, 4 bits by `lnq`: `optimize run tests/real/recipes/<network>.yaml`, or all by "
        "`python tests/real/figures.py others`. `verify`: largest relative difference between torch and onnxruntime.\n",
        "| network | metric | original | 4 bits | loss (95 % interval) | size | bits a weight | verify |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads((RESULTS / "others.json").read_text()):
        low, high = row["drop_ci95"]
        ratio = row["baseline_size_bytes"] / row["size_bytes"]
        lines.append(
            f"| {row['network']} | {row['metric']['name']} "
            f"| {row['baseline']['value']:.4g} | {row['metric']['value']:.4g} "
            f"| {row['drop']:.3g} ({low:.3g} to {high:.3g}) | {ratio:.1f}x smaller | {row['bits_per_weight']:.2f} "
            f"| {row['verify_rel']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def scaling() -> str:
    rows = json.loads((RESULTS / "scaling.json").read_text())
    machine = rows[0]["environment"]["cpu"]
    lines = [
        "Time and memory of the quantize step (4 bits, `lnq` with feedback) against layers and calibration images, by "
        f"`python tests/real/figures.py scaling` on {machine['model']}, {machine['cores']} cores.\n",
        "| network | images | quantize | whole run, no metric | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['samples']} | {row['quantize_seconds']:.0f} s | {row['run_seconds']:.0f} s "
            f"| {row['peak_rss_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def pruning() -> str:
    """Ours beside Torch-Pruning on the same images; a row of ours is the mean of its draws."""
    lines = [
        "ResNet on CIFAR-10 with 30 % of its multiplications (MACs) removed, no training, 512 calibration images: "
        "loss of accuracy in points on the 10,000 JPEG and the 1,000 lossless test images. Inner widths: only conv1 "
        "of each block. BN: statistics re-estimated afterwards, which alone costs the unpruned ResNet-20 4.3 points "
        "on the JPEG images and ResNet-56 3.6. Torch-Pruning 1.6.1 with the group L2 magnitude and its defaults, "
        "ratio bisected to the same MACs. `python tests/real/shrink.py pruning`.\n",
        "| network | method | MACs left | loss, JPEG / lossless | after BN, JPEG / lossless |",
        "|---|---|---|---|---|",
    ]
    rows = json.loads((RESULTS / "pruning.json").read_text())
    for network in ("resnet56", "resnet20"):
        for method in dict.fromkeys(row["method"] for row in rows):
            part = [row for row in rows if (row["network"], row["method"]) == (network, method)]
            if part:
                after = _pair([row["drop_bn"] for row in part]) if "drop_bn" in part[0] else ""
                share = 100 * np.mean([row["macs"] for row in part])
                lines.append(
                    f"| {network} | {method} | {share:.1f} % | {_pair([row['drop'] for row in part])} | {after} |"
                )
        lines += [_peer(row) for row in _peer_rows(network)]
    return "\n".join(lines) + "\n"


def _pair(drops: list[dict[str, float]]) -> str:
    return " / ".join(f"{np.mean([drop[name] for drop in drops]):.1f}" for name in ("jpeg", "lossless"))


def _peer_rows(network: str) -> list[dict[str, Any]]:
    rows = json.loads((RESULTS / "torch_pruning.json").read_text())["rows"]
    return [row for row in rows if (row["net"], row["method"]) == (network, "group magnitude L2")]


def _peer(row: dict[str, Any]) -> str:
    drops = [{"jpeg": row["drop"]["jpeg10000"], "lossless": row["drop"]["lossless1000"]}]
    after = {name: [bn[key] for bn in row["drop_bn"].values() if key in bn] for name, key in _KEYS.items()}
    shown = " / ".join(f"{np.mean(after[name]):.1f}" for name in _KEYS)
    kind = "global" if row["global"] else "all alike"
    share = 100 * row["macs_kept"]
    return f"| {row['net']} | Torch-Pruning, inner widths, {kind} | {share:.1f} % | {_pair(drops)} | {shown} |"


_KEYS = {"jpeg": "jpeg10000", "lossless": "lossless1000"}


def speed() -> str:
    rows = json.loads((RESULTS / "speed.json").read_text())
    machine = rows[0]["environment"]["cpu"]
    lines = [
        f"ResNet-56 in onnxruntime, one thread of {machine['model']}: p50 latency over that of the float original, "
        "both alternating in one process (95 % interval), size of the .onnx file, loss of accuracy on the 10,000 JPEG "
        "images. `python tests/real/shrink.py speed`.\n",
        "| | batch 1 | batch 32 | MACs | file | loss (95 % interval) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = {b["batch"]: b for b in row["bench"] if b["artifact"].startswith("model")}
        spans = {n: " to ".join(f"{end:.2f}" for end in ratios[n]["ratio_ci95"]) for n in (1, 32)}
        shown = [f"**{ratios[n]['ratio_to_baseline']:.2f}x** ({spans[n]})" for n in (1, 32)]
        lines.append(
            f"| {row['name']} | {shown[0]} | {shown[1]} | {row['final']['macs'] / row['baseline']['macs']:.2f}x "
            f"| {_file_ratio(row):.2f}x | {_loss(row)} |"
        )
    return "\n".join(lines) + "\n"


def int8() -> str:
    return _steps_table(
        "int8",
        "int8 activations and weights on every convolutional checkpoint, by `python tests/real/shrink.py int8`. "
        "`verify`: largest relative difference between torch and onnxruntime, and the share of equal argmax.\n",
    )


def kinds() -> str:
    return _steps_table(
        "kinds",
        "Pruned and quantized, one network of each kind, no training: `python tests/real/shrink.py kinds`. "
        "Convolutional ones in int8, the others to 4 bits by `lnq`.\n",
    )


def _steps_table(name: str, text: str) -> str:
    lines = [
        text,
        "| network | steps | metric | before | after | loss (95 % interval) | MACs | weights | verify |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads((RESULTS / f"{name}.json").read_text()):
        before, after = row["baseline"]["metric"], row["final"]["metric"]
        agreement = [check["argmax_agreement"] for check in row["verify"] if check["argmax_agreement"] is not None]
        same = f", {100 * min(agreement):.1f} %" if agreement else ""
        lines.append(
            f"| {row['network']} | `{row['steps'].strip('[]')}` | {before['name']} | {before['value']:.4g} "
            f"| {after['value']:.4g} | {_loss(row)} | {row['final']['macs'] / row['baseline']['macs']:.2f}x "
            f"| {row['final']['size_bytes'] / row['baseline']['size_bytes']:.2f}x "
            f"| {max(check['rel'] for check in row['verify']):.0e}{same} |"
        )
    return "\n".join(lines) + "\n"


def _loss(row: dict[str, Any]) -> str:
    final = row["final"]
    interval = final["drop_ci95"]
    return f"{final['drop']:.2g}" + (f" ({interval[0]:.2g} to {interval[1]:.2g})" if interval else "")


def _file_ratio(row: dict[str, Any]) -> float:
    model, baseline = (
        sum(size for file, size in row["files"].items() if file.startswith(side)) for side in ("model", "baseline")
    )
    return float(model / baseline)


LOAD = (server, stages, intervals, never_slower)
TABLES = (
    kernels,
    bars,
    convolutions,
    llama,
    modes,
    engines,
    pruning,
    speed,
    int8,
    kinds,
    *LOAD,
    accuracy,
    others,
    scaling,
)

if __name__ == "__main__":
    main()
