"""The page of engines is what the results say, and the results are whole: every network in every form, built."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ..zoo.nets import ZOO
from .engine_pages import FORMS, PAGE, ROOT, page

RESULTS = ROOT / "bench" / "results"
LEAST = 1024
"""Sides of a product from which a codebook of 4 bits takes at most a fifth of the dense float32 engine."""


def rows(what: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / f"tensorrt_{what}.json").read_text())
    return found


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run tests/real/engine_pages.py"


@pytest.mark.parametrize("what", ["real", "zoo", "layers"])
def test_every_network_is_built_in_every_form(what: str) -> None:
    found = rows(what)
    networks = {row["network"] for row in found}
    wanted = {"real": {path.stem for path in (ROOT / "tests/real/recipes").glob("*.yaml")}, "zoo": set(ZOO)}
    assert networks == wanted.get(what, networks)
    forms = {*((form, choice) for form in FORMS for choice in ("stored", "smallest"))}
    forms |= {("dense fp32", None), ("dense fp16", None)}
    for network in networks:
        mine = [row for row in found if row["network"] == network]
        assert {(row["form"], row.get("choice")) for row in mine} == forms, network
        assert all(row["engine_bytes"] > 0 for row in mine), network


def test_large_products_take_a_fifth() -> None:
    large = [row for row in rows("layers") if int(row["network"].split()[0]) >= LEAST and row["form"] == "codebook 4"]
    assert len(large) == 4
    assert all(row["engine_bytes"] <= 0.2 * row["dense_fp32_bytes"] for row in large)
