"""What a report says of a weight that several operators read is what its file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paredown.exporters import onnx as target
from paredown.exporters.verify import verify
from paredown.optimizer import summary
from paredown.optimizer.model import InputSpec
from paredown.optimizer.report_summary import computing

from .conftest import build, pack_all, packed

INPUT = InputSpec(name="tokens", shape=("batch", 6), dtype="int64")


class Shared(nn.Module):
    """An embedding that is tied to the output, a layer whose rows are also summed, projections that share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.summed = nn.Linear(16, 24, bias=False)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cells = nn.GRU(16, 4, batch_first=True)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(tokens)
        y = torch.flip(x, [1])
        crossed, _ = self.cross(x, y, y, need_weights=False)
        return self.head(x), self.summed(x) + self.summed.weight.sum(1), crossed, self.cells(x)[0]


def told(path: Path, form: str, embedding: str) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Export the network and return its report, and mode and reason of each weight in it."""
    model = pack_all(build(Shared, INPUT), (form,))
    table = packed(model.weights["embedding.weight"].dense(), embedding, torch.Generator().manual_seed(0))
    model = model.with_weights({"embedding.weight": table})
    target.export(model, path)
    assert max(row.rel for row in verify(model, path, target.open)) < 1e-5
    modes = target.modes(path, model)
    kept = {"layer": "summed.weight", "kept": form, "reason": "as the recipe says"}
    layers = [{"name": name} for name in modes]
    parts: dict[str, Any] = {"environment": {}, "layers": layers, "decisions": [kept]}
    summary.tell_modes(parts, model, modes, "portable")
    reasons = {row["layer"]: row["reason"] for row in parts["decisions"]}
    return parts, {name: found.mode for name, found in modes.items()}, reasons


def test_a_weight_with_another_reader_is_packed_and_decoded(tmp_path: Path) -> None:
    parts, modes, reasons = told(tmp_path / "net.onnx", "codebook 4", "codebook 4")
    assert modes == {
        "embedding.weight": "exact",
        "summed.weight": "exact + decoded",
        "cross.in_proj_weight": "decoded",
        "cross.out_proj.weight": "exact",
        "cells.weight_ih_l0": "decoded",
        "cells.weight_hh_l0": "decoded",
    }
    also = "as the recipe says; also decoded to floats at load: ReduceSum reads it, which has no kernel"
    assert reasons == {
        "summed.weight": also,
        "cross.in_proj_weight": "decoded to floats at load: MatMul reads a part of it",
        "cells.weight_ih_l0": "decoded to floats at load: recurrent layers have no kernel",
        "cells.weight_hh_l0": "decoded to floats at load: recurrent layers have no kernel",
    }
    said = "Layers: 3 decoded to floats at load, 2 packed (exact), 1 packed (exact) and decoded; kernels: portable."
    assert computing(parts) == said
    slow = "layers that are decoded to floats when the file is loaded run at the speed of floats"
    assert summary.why_slower({**parts, "layers": [{"mode": "exact + decoded"}, {"mode": None}]}) == slow


@pytest.mark.slow
def test_a_tied_embedding_of_5_bits_is_looked_up_packed_and_multiplied_decoded(tmp_path: Path) -> None:
    _, modes, reasons = told(tmp_path / "net.onnx", "codebook 4", "codebook 5")
    assert modes["embedding.weight"] == "exact + decoded"
    assert reasons["embedding.weight"] == "also decoded to floats at load: 5 bits have no operator"
