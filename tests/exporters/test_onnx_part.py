"""Layers cut out of a file compute what they do inside the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from paredown.exporters import onnx as target
from paredown.exporters import onnx_part
from paredown.optimizer.weight import Dense


@pytest.mark.parametrize("name", ["convolutions", "attention", "products"])
def test_parts_compute_what_they_do_in_the_network(name: str, exported: Callable[[str], Any], tmp_path: Path) -> None:
    model = exported(name).model
    packed = [key for key, weight in model.weights.items() if not isinstance(weight, Dense)]
    cuts = onnx_part.cuts(model, packed, tmp_path)
    assert cuts
    assert {layer for cut in cuts for layer in cut.part.layers} <= set(packed)
    wanted = sorted({value for cut in cuts for value in (*cut.part.inputs, *cut.part.outputs)})
    onnx_part.with_outputs(tmp_path / "floats.onnx", wanted, tmp_path / "seen.onnx")
    inputs = {spec.name: x.numpy() for spec, x in zip(model.inputs, model.examples(3, seed=1), strict=True)}
    seen = target.open(tmp_path / "seen.onnx").run(inputs)
    for cut in cuts:
        feeds = {value: seen[f"{value}.seen"] for value in cut.part.inputs}
        for file in (cut.before, cut.after):
            onnx.save(file, tmp_path / "part.onnx")
            found = target.open(tmp_path / "part.onnx").run(feeds)
            for value in cut.part.outputs:
                reference = seen[f"{value}.seen"]
                bound = 1e-4 * np.abs(reference).max() + 1e-6
                assert np.abs(found[value] - reference).max() <= bound, (cut.part, value)


def test_equal_layers_have_one_signature(exported: Callable[[str], Any], tmp_path: Path) -> None:
    model = exported("convolutions").model
    packed = [key for key, weight in model.weights.items() if not isinstance(weight, Dense)]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, second = (onnx_part.cuts(model, packed, tmp_path / folder) for folder in ("a", "b"))
    assert [cut.signature for cut in first] == [cut.signature for cut in second]
    assert len({cut.signature for cut in first}) == len(first)


def test_a_chain_has_so_many_operators(tmp_path: Path) -> None:
    onnx_part.write_chain(5, tmp_path / "chain.onnx")
    assert onnx_part.nodes(tmp_path / "chain.onnx") == 5
