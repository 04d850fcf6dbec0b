"""Pages of docs/ that tests write: with PAREDOWN_WRITE_PAGES=1 in the environment; else a stale one fails."""

from __future__ import annotations

import os
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
WRITE = "PAREDOWN_WRITE_PAGES"


def is_current(name: str, text: str) -> bool:
    """Whether a page is what it is made of; it is written first where that was asked for."""
    path = DOCS / name
    if os.environ.get(WRITE):
        path.write_text(text, encoding="utf-8")
    return path.is_file() and path.read_text(encoding="utf-8") == text
