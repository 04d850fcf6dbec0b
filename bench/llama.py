"""Decode a 246 M parameter language model, ours beside fp32 and MatMulNBits: `python -m paredown.bench.llama`.

    --quick      two layers and a small vocabulary, to see that everything works
    --threads N  threads of each session (default 1)
    --past N     tokens in the cache while decoding (default 128)
    --out DIR    where llama.json goes (default: nowhere)

The network is seeded, not trained, so this measures speed and memory alone: weights are rounded to normal quantiles
without calibration, scales per 128 inputs. Each session decodes one token at a time with a cache; all alternate in one
process. Memory is that of a process of its own for each file: what opening the file and decoding adds to it.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..exporters import onnx as onnx_target
from ..exporters.onnx_session import session_options
from ..kernels import native
from ..optimizer.codes import Format
from ..optimizer.model import InputSpec, Model, Source, from_module
from ..optimizer.quantizers import nf
from .environment import fingerprint
from .llama_net import Sizes, seeded
from .measure import Call, Sampling, sample

QUICK = Sizes(layers=2, vocabulary=2048)
GROUP = 128
_CHILD = "from paredown.bench.llama import child; child()"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An exported form of the network; `ours` says that it needs our library."""

    name: str
    path: Path
    ours: bool = False

    @property
    def size(self) -> int:
        return sum(part.stat().st_size for part in self.path.parent.iterdir() if part.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options().parse_args(arguments)
    sizes = QUICK if options.quick else Sizes()
    with tempfile.TemporaryDirectory() as folder:
        files = list(written(sizes, Path(folder)))
        rows = measured(files, sizes, options.threads, options.past)
    document = {
        "schema": "paredown.llama/1",
        "environment": fingerprint() | {"kernels": {"isa": native.isa()}},
        "sizes": {name: getattr(sizes, name) for name in sizes.__slots__},
        "past": options.past,
        "threads": options.threads,
        "rows": rows,
    }
    _show(rows)
    if options.out:
        (Path(options.out) / "llama.json").write_text(json.dumps(document, indent=1) + "\n")


def written(sizes: Sizes, folder: Path) -> Iterator[File]:
    """Write the network in each form, one after another, and yield the files."""
    cache: tuple[int | str, ...] = (sizes.layers, 2, "batch", sizes.key_heads, "past", sizes.head)
    inputs = (InputSpec(name="ids", shape=("batch", 1), dtype="int64"), InputSpec(name="cache", shape=cache))
    dense = from_module(seeded(sizes), inputs, Source(entry="paredown.bench.llama_net:seeded"))
    fp32 = File(name="fp32", path=_export(dense, folder / "fp32"))
    yield fp32
    for block in (32, GROUP):
        yield File(name=f"MatMulNBits 4b b{block}", path=_nbits(fp32.path, block, folder / f"nbits{block}"))
    exact = quantized(dense)
    yield File(name="ours 4b exact", path=_export(exact, folder / "exact"), ours=True)
    linear = frozenset(name for name in exact.weights if not name.startswith("embedding"))
    yield File(name="ours 4b int8", path=_export(replace(exact, dynamic=linear), folder / "int8"), ours=True)


def quantized(model: Model) -> Model:
    """Return the model with every matrix on 4-bit normal quantiles."""
    spec = nf.Spec(format=Format(bits=4, group=GROUP))
    return model.with_weights({name: nf.quantize(w.dense(), None, spec) for name, w in model.weights.items()})


def measured(files: Sequence[File], sizes: Sizes, threads: int, past: int) -> list[dict[str, Any]]:
    """Return a row per file: tokens/s, its ratio to fp32, bytes of the file and of the memory it takes."""
    feeds = _feeds(sizes, past)
    sessions = [_session(file, threads) for file in files]
    calls: list[Call] = [lambda session=session: session.run(None, feeds) for session in sessions]  # type: ignore[misc]
    logits = [session.run(None, feeds)[0] for session in sessions]
    limits = Sampling(min_seconds=3.0, min_count=30, max_seconds=60.0, min_rounds=20, max_burst=8)
    samples = sample(calls, limits)
    del sessions, calls
    base = float(np.median(samples.seconds[0]))
    rows = []
    for file, times, have in zip(files, samples.seconds, logits, strict=True):
        middle = float(np.median(times))
        rows.append(
            {
                "form": file.name,
                "tokens_per_s": 1 / middle,
                "best_tokens_per_s": 1 / float(times.min()),
                "times_fp32": base / middle,
                "file_bytes": file.size,
                "memory": memory(file, sizes, past),
                "against_fp32": float(np.linalg.norm(have - logits[0]) / np.linalg.norm(logits[0])),
                "waited": samples.waited,
            }
        )
    exact = next(have for file, have in zip(files, logits, strict=True) if file.name == "ours 4b exact")
    for row, file, have in zip(rows, files, logits, strict=True):
        if file.ours:
            row["against_exact"] = float(np.linalg.norm(have - exact) / np.linalg.norm(exact))
    return rows


def memory(file: File, sizes: Sizes, past: int) -> dict[str, int]:
    """Return what a process grows by when it opens a file and decodes three tokens, in bytes: anonymous, and mapped."""
    job = {
        "path": str(file.path),
        "ours": file.ours,
        "past": past,
        "sizes": {name: getattr(sizes, name) for name in sizes.__slots__},
    }
    done = subprocess.run([sys.executable, "-P", "-c", _CHILD], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{file.name} did not run: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def child() -> None:
    """Do the job on stdin and print how much memory it took."""
    job = json.load(sys.stdin)
    feeds = _feeds(Sizes(**job["sizes"]), job["past"])
    before = _resident()
    session = _session(File(name="", path=Path(job["path"]), ours=job["ours"]), 1)
    for _ in range(3):
        session.run(None, feeds)
    after = _resident()
    sys.stdout.write(json.dumps({key: after[key] - before[key] for key in after}) + "\n")


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    return {"anonymous_bytes": int(fields["RssAnon"][0]) * 1024, "mapped_bytes": int(fields["RssFile"][0]) * 1024}


def _feeds(sizes: Sizes, past: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((sizes.layers, 2, 1, sizes.key_heads, past, sizes.head), dtype=np.float32)
    return {"ids": np.array([[7]], dtype=np.int64), "cache": cache}


def _export(model: Model, folder: Path) -> Path:
    folder.mkdir()
    onnx_target.export(model, folder / "model.onnx")
    return folder / "model.onnx"


def _nbits(dense: Path, block: int, folder: Path) -> Path:
    """Write what onnxruntime's own tool makes of the dense file: its products and its embedding at 4 bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    # It warns that it raises the opset; that the file computes the network all the same is in the row: against_fp32.
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.ERROR)
    folder.mkdir()
    tool = MatMulNBitsQuantizer(
        str(dense), block_size=block, is_symmetric=True, accuracy_level=4, op_types_to_quantize=("MatMul", "Gather")
    )
    tool.process()
    tool.model.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=True)
    return folder / "model.onnx"


def _session(file: File, threads: int) -> onnxruntime.InferenceSession:
    settings = session_options(threads=threads, library=native.ort_library() if file.ours else None)
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(file.path), settings, providers=["CPUExecutionProvider"])


def _show(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("form")
    for name in ("tokens/s", "x fp32", "file MB", "anonymous MB", "mapped MB", "against exact"):
        table.add_column(name, justify="right")
    for row in rows:
        held = row["memory"]
        table.add_row(
            row["form"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['times_fp32']:.2f}",
            *(f"{size / 1e6:.0f}" for size in (row["file_bytes"], held["anonymous_bytes"], held["mapped_bytes"])),
            f"{row['against_exact']:.1e}" if "against_exact" in row else "-",
        )
    Console(width=110).print(table)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and a small vocabulary")
    parser.add_argument("--threads", type=int, default=1, help="threads of each session")
    parser.add_argument("--past", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--out", default="", help="folder that llama.json is written to")
    return parser


if __name__ == "__main__":
    main()
