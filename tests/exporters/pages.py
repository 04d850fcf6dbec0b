"""Pages of docs/ that tests write: with PAREDOWN_WRITE_PAGES=1 in the environment; else a stale one fails."""

from __future__ import annotations

import os
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
WRITE = "PAREDOWN_WRITE_PAGES"


def check_page(name: str, text: str) -> None:
    """Hold a page to what it is made of, or write it where that was asked for."""
    path = DOCS / name
    if os.environ.get(WRITE):
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"docs/{name} is missing: run this test with {WRITE}=1"
    assert path.read_text(encoding="utf-8") == text, f"docs/{name} is stale: run this test with {WRITE}=1"
