"""Write docs/tensorrt_engines.md from bench/results/tensorrt_*.json: `.venv/bin/python tests/real/engine_pages.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tensorrt_engines.md"
FORMS = ("int8 Q/DQ", "int4 uniform", "codebook 4", "codebook 3", "codebook 2", "codebook 4 + rank 4")
TITLES = {"layers": "Single products", "real": "Real checkpoints", "zoo": "Networks of tests/zoo"}
NAMED = 3
"""More modules are counted."""
Row: TypeAlias = Mapping[str, Any]

HEAD = """# Bytes of engines

Built by TensorRT-RTX 1.7.1 without a GPU, for SM86, any batch of 1 to 32, with
`python tests/real/tensorrt_table.py layers|real|zoo`. Bytes only: no speed was measured. An entry is the engine in kB
and its share of the dense float32 one; "stored" holds weights packed wherever TensorRT can, "chosen" is what
`optimize export` builds. In brackets: layers kept as the model stores them, and layers that fall back to int8 or to
floats, `float32` included. `model.engine.json` gives the reason for each; `optimize export` prints them.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page as the results are now."""
    equal = ROOT / "bench" / "results" / "tensorrt_equal.json"
    return "\n".join([HEAD, *(_section(what) for what in TITLES), *([_equal()] if equal.is_file() else [])])


def _equal() -> str:
    """Return the table of what the graphs compute."""
    rows: Sequence[Row] = json.loads((ROOT / "bench" / "results" / "tensorrt_equal.json").read_text())
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = [EQUAL, f"| | {' | '.join(forms)} |", "|---|" + "---|" * len(forms)]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = {row["form"]: row for row in rows if row["network"] == network}
        lines.append(f"| {network} | {' | '.join(_equal_cell(mine[form]) for form in forms)} |")
    return "\n".join([*lines, ""])


def _equal_cell(row: Row) -> str:
    if "fp16_error" not in row:
        return _short(row["difference"])
    kept = row["float32_by_measure"]
    shown = f"{_short(row['difference'])}, {_short(row['fp16_error_before'])}"
    names = ", ".join(kept) if len(kept) <= NAMED else f"{len(kept)} modules"
    return f"{shown} ({row['fp16_error']:.0e} with {names} in float32)" if kept else shown


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


EQUAL = """## What the graphs compute

Real checkpoints in onnxruntime, `python tests/real/tensorrt_table.py equal`: largest difference of an output, over its
largest value, between the float32 graph with stored forms and the portable file on two real samples; of dense graphs
also, behind it, what rounding to float16 does on three seeded ones, and in brackets, where that is more than an engine
may be off by, what stays float32 for it and what is left.
"""


def _section(what: str) -> str:
    rows: Sequence[Row] = json.loads((ROOT / "bench" / "results" / f"tensorrt_{what}.json").read_text())
    columns = [f"{form}, {choice}" for form in FORMS for choice in ("stored", "chosen")]
    lines = [f"## {TITLES[what]}\n", f"| | dense fp32 | dense fp16 | {' | '.join(columns)} |"]
    lines.append("|" + "---|" * (3 + len(columns)))
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = {(row["form"], row.get("choice")): row for row in rows if row["network"] == network}
        dense = [_cell(mine[f"dense {precision}", None], mine) for precision in ("fp32", "fp16")]
        cells = [_cell(mine[form, choice], mine) for form in FORMS for choice in ("stored", "smallest")]
        lines.append(f"| {network} | {' | '.join([*dense, *cells])} |")
    return "\n".join([*lines, ""])


def _cell(row: Row, network: Mapping[tuple[str, str | None], Row]) -> str:
    size, whole = row["engine_bytes"], network["dense fp32", None]["engine_bytes"]
    held = f" [{row['kept']}, {row['fallback']}]" if row["kept"] or row["fallback"] else ""
    return f"{size / 1000:,.0f} ({size / whole:.2f}x){held}"


if __name__ == "__main__":
    main()
