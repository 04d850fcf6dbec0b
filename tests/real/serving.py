"""The figures of load in the README, on real checkpoints and an idle machine. Writes into bench/results/.

    .venv/bin/python tests/real/serving.py server      ResNet-56: all four scenarios of LoadGen, 99 % within 15 ms
    .venv/bin/python tests/real/serving.py soak        ResNet-56 at 80 % of the rate that `server` found, half an hour
    .venv/bin/python tests/real/serving.py stages      MobileNetV1-0.25: from JPEG bytes to the answer, stage by stage
    .venv/bin/python tests/real/serving.py intervals   ResNet-56: one pair benchmarked ten times

Optimized is int8, as `shrink.py int8` measures it. The files are kept in the folder that PAREDOWN_SERVING names, a
temporary one by default, so that a soak that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import data
from figures import RESULTS, optimize_run

INT8 = "steps=[quantize: {quantizer: uniform, bits: 8, activations: int8}]"
SCENARIOS = "singlestream,multistream,server,offline"
CLIENTS = "1,2,4,8,16"
P99_MS, SOAK_SHARE, SOAK_SECONDS = 15.0, 0.8, 1800.0
SAMPLES = "imagenet/imagenet_samples_300.npz"


def main() -> None:
    (what,) = sys.argv[1:]
    folder = Path(os.environ.get("PAREDOWN_SERVING") or tempfile.mkdtemp())
    {"server": server, "soak": soak, "stages": stages, "intervals": intervals}[what](folder)


def artifacts(network: str, folder: Path) -> tuple[Path, Path]:
    """Return the original and the optimized file, made where they are not in the folder yet."""
    out = folder / network
    if not out.exists():
        optimize_run(network, out, INT8, "bench={processes: 1, peak_rss: false}")
    return out / "baseline.onnx", out / "model.onnx"


def server(folder: Path) -> None:
    """One `optimize bench` of all scenarios, at most 15 ms for 99 % of the requests in Server."""
    options = ["--scenario", SCENARIOS, "--p99-ms", str(P99_MS), "--concurrency", CLIENTS]
    bench(*artifacts("resnet56", folder), RESULTS / "server.json", *options)


def soak(folder: Path) -> None:
    """Half an hour of Poisson arrivals for each file."""
    found = {"seconds": SOAK_SECONDS, "share": SOAK_SHARE, "runs": list[Any]()}
    rows = json.loads((RESULTS / "server.json").read_text())["rows"]
    for path in reversed(artifacts("resnet56", folder)):
        (row,) = [row for row in rows if row["scenario"] == "server" and Path(row["artifact"]).name == path.name]
        rate, out = SOAK_SHARE * row["throughput_per_s"], folder / f"soak-{path.stem}.jsonl"
        command = [sys.executable, "-P", "-m", "paredown.bench.soak", str(path), "--rate", f"{rate:.1f}"]
        command += ["--seconds", str(SOAK_SECONDS), "--out", str(out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        found["runs"].append(json.loads(done.stdout))
        write(RESULTS / "soak.json", found)


def stages(folder: Path) -> None:
    """One `optimize bench --scenario stages` with the pipeline below."""
    pair = artifacts("mobilenet", folder)
    bench(*pair, RESULTS / "stages.json", "--scenario", "stages", "--pipeline", f"{Path(__file__)}:answers")


def intervals(folder: Path) -> None:
    """Ten times `optimize bench`, by the package's own proof."""
    command = [sys.executable, "-P", "-m", "paredown.bench.repeat", *map(str, artifacts("resnet56", folder))]
    subprocess.run([*command, "--times", "10", "--out", str(RESULTS)], check=False)


def answers() -> dict[str, Any]:
    """Return the pipeline of MobileNet: 100 JPEG images, decoded, cut to 224 x 224, brought to -1..1; five classes."""
    from paredown.bench import images

    file = data.arrays(SAMPLES)
    raw, cuts = file["bytes"].tobytes(), file["offset"].tolist()
    items = [raw[start:end] for start, end in itertools.pairwise(cuts)][::3]
    half = (0.5, 0.5, 0.5)
    made = images.pipeline(items, images.Spec(resize=256, crop=224, mean=half, std=half))
    return {item.name: getattr(made, item.name) for item in dataclasses.fields(made)}


def bench(baseline: Path, model: Path, out: Path, *options: str) -> None:
    """Write bench.json of one run of the command, without its samples."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("optimize")), "bench", str(baseline), str(model)]
        subprocess.run([*command, *options, "--out", folder], check=True)
        found = json.loads((Path(folder) / "bench.json").read_text())
    for row in found["rows"]:
        del row["samples_ms"]
    write(out, found)


def write(path: Path, found: Any) -> None:
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
