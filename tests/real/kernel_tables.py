"""The README's tables of kernels and engines, from bench/results/; `tables.py` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent.parent / "bench" / "results"
FORMS = {
    "fp32": "fp32 MatMul",
    "MatMulNBits 4b b32": "MatMulNBits, 4 bits, block 32",
    "MatMulNBits 4b b128": "MatMulNBits, 4 bits, block 128",
    "MatMulNBits 2b b128": "MatMulNBits, 2 bits, block 128",
    "ours 4b int8": "ours, 4 bits, int8",
    "ours 3b int8": "ours, 3 bits, int8",
    "ours 2b int8": "ours, 2 bits, int8",
    "ours 4b exact": "ours, 4 bits, exact",
    "ours 3b exact": "ours, 3 bits, exact",
    "ours 2b exact": "ours, 2 bits, exact",
}
ENGINES = ("int8 Q/DQ", "int4 uniform", "codebook 4", "codebook 3", "codebook 2", "codebook 4 + rank 4")
TOKENS = (1, 8, 64, 512)


def kernels() -> str:
    """One layer in onnxruntime, by rows of activations; GB/s and its share of what the machine reads."""
    document = json.loads((RESULTS / "kernels.json").read_text())
    machine, isa = document["environment"]["cpu"], document["environment"]["kernels"]["isa"]
    lines = [
        f"One linear layer, 4096 x 4096, codebooks with a scale per 128 inputs, in onnxruntime on one thread of "
        f"{machine['model']} ({isa}): best time in microseconds by rows of activations (m), all alternating in one "
        "process; warm: the weights' GB/s at m = 1 and its share of what the machine reads from a buffer of that size "
        "in the same rounds; cold: the same over layers of 320 MB. Error: relative, against float64. "
        "`python -m paredown.bench.kernels`.\n",
        "| | " + " | ".join(f"m = {m}" for m in TOKENS) + " | warm | cold | error |",
        "|---|" + "---|" * (len(TOKENS) + 3),
    ]
    errors = {row["form"]: f"{row['relative_error']:.1e}" for row in document["errors"]}
    for form, label in FORMS.items():
        rows = [row for row in document["rows"] if _square(row) and row["form"] == form]
        warm = {row["m"]: row for row in rows if row["layers"] == 1}
        cold = next((row for row in rows if row["layers"] > 1), None)
        times = [f"{warm[m]['min_us']:,.0f}" if m in warm else "" for m in TOKENS]
        shown = [*times, _speed(warm.get(1)), _speed(cold), errors.get(form, "")]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def bars() -> str:
    """The bars of speed: the first six ratios and every other that is not met, and what limits leave of each."""
    document = json.loads((RESULTS / "kernels.json").read_text())
    lines = [
        "Ratios of best times, and weight bytes per second over what the machine reads, with the bar that was set for "
        "each; ratios to fp32 are shown where they miss theirs. Limit: what the instructions of our kernel, timed in "
        "the first cache, the reading of the weights and a call of onnxruntime leave at best on this processor; "
        "without instructions: reading, products of bytes and the call alone, which no kernel passes. Cold: the share "
        "is of what is read from a buffer in large pages, the limit what is read from the file as it is mapped.\n",
        "| | threads | measured | bar | met | limit | without instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    missed = 0
    for row in document["bars"]:
        fp32 = "/ fp32" in row["what"]
        missed += fp32 and row["met"]
        if fp32 and row["met"]:
            continue
        limits = " | ".join(f"{row[key]:.2f}" for key in ("limit", "law"))
        lines.append(
            f"| {row['what']} | {row['threads']} | **{row['value']:.2f}** | {row['bar']} "
            f"| {'yes' if row['met'] else 'no'} | {limits} |"
        )
    return (
        "\n".join([*lines, f"\n{missed} ratios to fp32, of 2 to 4 bits in both modes at m = 1 to 512, meet theirs."])
        + "\n"
    )


def convolutions() -> str:
    document = json.loads((RESULTS / "kernels.json").read_text())
    rows = [row for row in document["convolutions"] if row["threads"] == 1]
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = [
        "One convolution in onnxruntime, one image, one thread: best time in microseconds. Ours takes packed codes and "
        "rounds its inputs at run time; QLinearConv has fixed scales.\n",
        f"| | {' | '.join(forms)} |",
        "|---|" + "---|" * len(forms),
    ]
    for what in dict.fromkeys(row["what"] for row in rows):
        times = {row["form"]: row["min_us"] for row in rows if row["what"] == what}
        lines.append(f"| {what} | {' | '.join(f'{times[form]:,.0f}' for form in forms)} |")
    return "\n".join(lines) + "\n"


def llama() -> str:
    document = json.loads((RESULTS / "llama.json").read_text())
    lines = [
        "A seeded Llama of 246 M parameters decoding one token after another, "
        f"{document['past']} tokens in the cache, {document['threads']} thread: `python -m paredown.bench.llama`. "
        "Memory: what opening the file and decoding adds to a process, anonymous and mapped from files.\n",
        "| | tokens/s | of fp32 | file | anonymous | mapped |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        held = row["memory"]
        sizes = (row["file_bytes"], held["anonymous_bytes"], held["mapped_bytes"])
        lines.append(
            f"| {FORMS.get(row['form'], row['form'])} | {row['tokens_per_s']:.1f} | {row['times_fp32']:.2f}x | "
            + " | ".join(f"{size / 1e6:.0f} MB" for size in sizes)
            + " |"
        )
    return "\n".join(lines) + "\n"


def modes() -> str:
    lines = [
        "Linear layers at 4 bits by `lnq` through the kernels in both modes, accuracy measured through the file: "
        "`python tests/real/shrink.py modes`, taken when convolutions had no operator yet.\n",
        "| network | inputs | layers | metric | before | after |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads((RESULTS / "modes.json").read_text()):
        before, after = row["baseline"]["metric"], row["final"]["metric"]
        inputs = "int8" if "dynamic" in row["steps"] else "float"
        counts = ", ".join(f"{count} {mode}" for mode, count in row["modes"].items())
        lines.append(
            f"| {row['network']} | {inputs} | {counts} | {before['name']} | {before['value']:.4f} "
            f"| {after['value']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _square(row: dict[str, Any]) -> bool:
    return (row["n"], row["k"], row["threads"]) == (4096, 4096, 1)


def _speed(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['gb_per_s']:.0f} ({100 * row['share']:.0f} %)"


def engines() -> str:
    """Bytes of TensorRT-RTX's engines by form, of single products and of the real checkpoints."""
    forms = " | ".join(("dense fp32", "dense fp16", *ENGINES))
    lines = [
        "Kilobytes of engines that TensorRT-RTX 1.7.1 builds for compute capability 8.6, floats in fp16 but for the "
        "first column, any batch of 1 to 32; every packed form that the export has is kept (its default keeps one only "
        "where the engine becomes smaller). An engine holds code of its kernels too, which is most of a small one. "
        "No speed was measured: there was no GPU. `python tests/real/tensorrt_table.py layers`, `real`.\n",
        f"| | {forms} |",
        "|---|" + "---|" * (2 + len(ENGINES)),
    ]
    for name in ("layers", "real"):
        rows = json.loads((RESULTS / f"tensorrt_{name}.json").read_text())
        for network in dict.fromkeys(row["network"] for row in rows):
            found = {
                row["form"]: row["engine_bytes"]
                for row in rows
                if row["network"] == network and row.get("choice") != "smallest"
            }
            cells = (found.get(form) for form in ("dense fp32", "dense fp16", *ENGINES))
            sizes = " | ".join("" if size is None else f"{size / 1e3:,.0f}" for size in cells)
            lines.append(f"| {network} | {sizes} |")
    return "\n".join(lines) + "\n"
