"""Archives of torch.export: their weights are read as bytes, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paredown.optimizer import checkpoint
from paredown.optimizer.errors import InputError

AGAIN = "save it again: torch.export.save(program, path)"


class Evil:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))  # type: ignore[no-any-return]


def export(module: nn.Module, example: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (example,)), path)


def test_an_exported_program_gives_its_weights(tmp_path: Path) -> None:
    module = Tied().eval()
    export(module, torch.tensor([1, 2]), tmp_path / "a.pt2")
    found = checkpoint.read(tmp_path / "a.pt2")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in module.state_dict().items()
    }


def test_views_of_one_storage_in_an_exported_program(tmp_path: Path) -> None:
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(torch.arange(18.0).reshape(6, 3)[1:4].t())
    export(module.eval(), torch.ones(1, 3), tmp_path / "a.pt2")
    assert torch.equal(checkpoint.read(tmp_path / "a.pt2")["weight"], module.weight)


def test_nothing_of_an_exported_program_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.export.load` executes the pickle of sample inputs; we do not open it."""
    monkeypatch.chdir(tmp_path)
    export(nn.Linear(2, 2).eval(), torch.ones(1, 2), tmp_path / "a.pt2")
    with zipfile.ZipFile("a.pt2") as old, zipfile.ZipFile("evil.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(Evil()) if "sample_inputs" in name else old.read(name))
    assert set(checkpoint.read(tmp_path / "evil.pt2")) == {"weight", "bias"}
    assert not Path("pwned").exists()


@pytest.mark.parametrize("change", [{"use_pickle": True}, {"path_name": "../../x"}, {"sizes": [{"as_int": 99}] * 2}])
def test_tampered_exported_program(tmp_path: Path, change: dict[str, Any]) -> None:
    export(nn.Linear(2, 2).eval(), torch.ones(1, 2), tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2") as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("_weights_config.json"):
                config = json.loads(data)
                entry = config["config"]["weight"]
                (entry["tensor_meta"] if "sizes" in change else entry).update(change)
                data = json.dumps(config).encode()
            new.writestr(name, data)
    with pytest.raises(InputError) as caught:
        checkpoint.read(tmp_path / "evil.pt2")
    assert str(caught.value) == f"{tmp_path}/evil.pt2: " + (
        "refused: would run code (a pickled weight); export a model of plain tensors"
        if "use_pickle" in change
        else "this is not a readable torch.export archive "
        f"({'KeyError' if 'path_name' in change else 'ValueError'}); {AGAIN}"
    )


BAD_ARCHIVES = {
    b"123": f"this is not a readable torch.export archive (BadZipFile); {AGAIN}",
    b"zip": "the archive holds the weights of 0 models in the format of torch 2.8 or newer; "
    "save one program: torch.export.save(program, path)",
}


@pytest.mark.parametrize("data", BAD_ARCHIVES)
def test_not_an_archive(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.pt2"
    path.write_bytes(data)
    if data == b"zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("serialized_state_dict.pt", "as older versions wrote it")
    with pytest.raises(InputError) as caught:
        checkpoint.read(path)
    assert str(caught.value) == f"{path}: {BAD_ARCHIVES[data]}"
