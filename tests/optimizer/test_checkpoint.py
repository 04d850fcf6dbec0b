"""Checkpoints: what is read, what is refused and with which words, and the match with an architecture."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paredown.optimizer import checkpoint, huggingface
from paredown.optimizer.errors import InputError, RuntimeMissingError


class Evil:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))  # type: ignore[no-any-return]


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied().eval()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_wrapped(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model_state_dict": state, "epoch": 3, "best": None}, path)


def save_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_sharded(state: dict[str, Tensor], path: Path) -> None:
    names = list(state)
    shards = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, keys in shards.items():
        save_file({key: state[key] for key in keys}, path.parent / file)
    path.write_text(json.dumps({"weight_map": {key: file for file, keys in shards.items() for key in keys}}))


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "a.safetensors": save_file,
    "a.pt": torch.save,
    "a.pth": save_wrapped,
    "a.th": save_legacy,
    "a.bin": torch.save,
    "model.safetensors.index.json": save_sharded,
}


@pytest.mark.parametrize("name", SAVERS)
def test_every_kind_reads_the_same(tmp_path: Path, name: str) -> None:
    state = state_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    state["0.bias"] = state["0.bias"].bfloat16()
    SAVERS[name](state, tmp_path / name)
    found = checkpoint.read(tmp_path / name)
    assert set(found) == set(state)
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_folder(tmp_path: Path, name: str) -> None:
    SAVERS.get(name, save_file)(state_of(nn.Linear(3, 4)), tmp_path / name)
    assert set(checkpoint.read(tmp_path)) == {"weight", "bias"}


MEASURE = """
import resource, sys, torch
from pathlib import Path
from paredown.optimizer import checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
state = checkpoint.read(Path(sys.argv[1]))
assert float(state["w1"][-1]) == 1.0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["big.safetensors", pytest.param("big.pt", marks=pytest.mark.slow)])
def test_big_files_are_mapped(tmp_path: Path, name: str) -> None:
    state = {f"w{i}": torch.ones(8 << 20) for i in range(4)}
    SAVERS["a" + Path(name).suffix](state, tmp_path / name)
    size = (tmp_path / name).stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    assert size > 128 << 20
    assert int(done.stdout) * 1024 < size / 4


def header(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + data


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SAVE = "save the state dict alone: torch.save(model.state_dict(), path)"
BAD_BYTES: dict[str, tuple[bytes, str]] = {
    "empty.pt": (b"", "the file is empty; copy it again"),
    "short.safetensors": (b"abc", "the file is cut short: 3 bytes do not hold a header of 8 bytes; copy it again"),
    "header.safetensors": (
        header("{" + ONE + "}")[:20],
        "the file is cut short: 20 bytes do not hold a header of 54 bytes; copy it again",
    ),
    "cut.safetensors": (
        header("{" + ONE + "}", b"123"),
        "the header promises 4 bytes of tensors, the file holds 3; copy it again",
    ),
    "long.safetensors": (
        header("{" + ONE + "}", b"12345"),
        "the header promises 4 bytes of tensors, the file holds 5; copy it again",
    ),
    "json.safetensors": (
        header("{{"),
        "this is not a safetensors file: its header of 2 bytes cannot be read; copy it again",
    ),
    "list.safetensors": (
        header("[]"),
        "this is not a safetensors file: its header of 2 bytes cannot be read; copy it again",
    ),
    "twice.safetensors": (
        header("{" + ONE + "," + ONE + "}", b"1234"),
        '"a" is there twice; save the checkpoint again',
    ),
    "junk.pt": (b"hello world" * 9, f"torch.load cannot read it; {SAVE}"),
    "cut.pt": (b"PK\x03\x04" + b"x" * 99, "the file is cut short: its zip directory is missing; copy it again"),
    "protocol.pt": (pickle.dumps({"a": 1}), f"torch.load cannot read it; {SAVE}"),
    "net.h5": (b"1", 'a checkpoint cannot end in ".h5"; use one of .safetensors, .pt, .pth, .th, .bin, .pt2'),
    "x.safetensors.index.json": (b"{", "this is not JSON; copy it again"),
    "y.safetensors.index.json": (b"[]", 'the index has no "weight_map" of file names; download it again'),
    "z.safetensors.index.json": (
        b'{"weight_map": {"a": "../secret.safetensors"}}',
        'the shard "../secret.safetensors" lies outside the folder; name files beside the index',
    ),
    "w.safetensors.index.json": (
        b'{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
        'of 2 shards 2 are missing: "1.safetensors", "2.safetensors"; download them',
    ),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_file(tmp_path: Path, name: str) -> None:
    data, text = BAD_BYTES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        checkpoint.read(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}: {text}"
    assert caught.value.exit_code == 3


BAD_VALUES: dict[str, tuple[Any, str]] = {
    "code": (
        {"state_dict": {"a": torch.ones(1)}, "x": Evil()},
        f"refused: would run code (global {os.system.__module__}.system); {SAVE}",
    ),
    "module": (nn.Linear(1, 1), f"refused: would run code (global torch.nn.modules.linear.Linear); {SAVE}"),
    "args": ({"args": argparse.Namespace()}, f"refused: would run code (global argparse.Namespace); {SAVE}"),
    "tensor": (torch.ones(1), 'it holds no state dict but Tensor; save a state dict, or one under "state_dict"'),
    "other": (
        {"epoch": 1, "optimizer": {}},
        'it holds no state dict but a dict of "epoch", "optimizer"; save a state dict, or one under "state_dict"',
    ),
    "several": (
        {"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}},
        "it holds several state dicts: state_dict, model; save one of them",
    ),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    value, text = BAD_VALUES[name]
    torch.save(value, "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError) as caught:
        checkpoint.read(Path("a.pt"))
    assert str(caught.value) == f"a.pt: {text}"
    assert not Path("pwned").exists()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(InputError) as caught:
        checkpoint.read(tmp_path / "a.pt")
    assert str(caught.value) == f"{tmp_path}/a.pt: refused: would run code (a TorchScript archive); {SAVE}"


def test_missing_things(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "net.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "net.safetensors", "b": "net.safetensors"}}')
    (tmp_path / "empty").mkdir()
    expected = {
        "net.safetensor": 'there is no such checkpoint; did you mean "net.safetensors"?',
        "no/net.pt": f"there is no such checkpoint; there is none in {tmp_path / 'no'}",
        "empty": "the folder holds neither model.safetensors nor model.safetensors.index.json; "
        "name the checkpoint file",
        index.name: 'no shard holds "b"; download the checkpoint again',
    }
    for name, text in expected.items():
        with pytest.raises(InputError) as caught:
            checkpoint.read(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name}: {text}"


PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_stripped(prefix: str) -> None:
    module = tied()
    found = checkpoint.match({prefix + name: tensor for name, tensor in state_of(module).items()}, module)
    wanted = ["embed.weight", "norm.weight", "norm.bias", "head.bias"]
    wanted += ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert list(found) == wanted
    assert all(torch.equal(found[name], module.state_dict()[name]) for name in wanted)


def test_a_prefix_that_belongs_to_the_architecture_stays() -> None:
    module = nn.ModuleDict({"model": nn.Linear(2, 2)})
    assert set(checkpoint.match(state_of(module), module)) == {"model.weight", "model.bias"}


@pytest.mark.parametrize("gone", ["embed.weight", "head.weight", "norm.num_batches_tracked"])
def test_what_may_be_absent(gone: str) -> None:
    module = tied()
    state = state_of(module)
    del state[gone]
    assert torch.equal(checkpoint.match(state, module)["embed.weight"], module.state_dict()["embed.weight"])


def test_half_precision_stays() -> None:
    module = nn.Linear(3, 2)
    found = checkpoint.match({"weight": torch.ones(2, 3).half(), "bias": torch.ones(2).bfloat16()}, module)
    assert (found["weight"].dtype, found["bias"].dtype) == (torch.float16, torch.bfloat16)


TRAINED = "build the architecture that was trained"
BAD_STATES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": (
        {"norm.bias": None, "head.bias": None},
        f'the checkpoint lacks 2 of the architecture\'s 7 tensors: "norm.bias", "head.bias"; {TRAINED}',
    ),
    "renamed": (
        {"norm.bias": None, "norm.beta": torch.ones(4)},
        'the checkpoint lacks 1 of the architecture\'s 7 tensors: "norm.bias"; it has "norm.beta"; '
        'did you mean "norm.beta"?',
    ),
    "surplus": (
        {f"extra.{i}": torch.ones(1) for i in range(5)},
        'the checkpoint has 5 tensors that the architecture lacks: "extra.0", "extra.1", "extra.2" and 2 more; '
        f"{TRAINED}",
    ),
    "not persistent": (
        {"scratch": torch.ones(3)},
        f'the checkpoint has 1 tensor that the architecture lacks: "scratch"; {TRAINED}',
    ),
    "shape": (
        {"head.bias": torch.ones(5)},
        f'1 tensor has another shape: "head.bias" is [5] in the checkpoint, [6] in the architecture; {TRAINED}',
    ),
    "shapes": (
        {"head.bias": torch.ones(5), "norm.bias": torch.ones(2, 2)},
        '2 tensors have another shape: "norm.bias" is [2, 2] in the checkpoint, [4] in the architecture, '
        f'"head.bias" is [5] in the checkpoint, [6] in the architecture; {TRAINED}',
    ),
    "nan": (
        {"head.bias": torch.tensor([1.0, float("nan"), 2, float("inf"), 3, 4])},
        '"head.bias" has 2 of 6 values that are NaN or infinite; use a checkpoint from before training diverged',
    ),
    "integer": (
        {"head.bias": torch.ones(6, dtype=torch.int8)},
        '"head.bias" is int8 in the checkpoint, float32 in the architecture; '
        "give the weights as they were before quantization",
    ),
    "float8": (
        {"head.bias": torch.ones(6).to(torch.float8_e4m3fn)},
        '"head.bias" is float8_e4m3fn in the checkpoint, float32 in the architecture; '
        "give the weights as they were before quantization",
    ),
    "float": (
        {"norm.num_batches_tracked": torch.tensor(1.0)},
        '"norm.num_batches_tracked" is float32 in the checkpoint, int64 in the architecture; save the checkpoint again',
    ),
    "untied": (
        {"head.weight": torch.ones(6, 4)},
        '"embed.weight" and "head.weight" are one parameter in the architecture but differ in the checkpoint; '
        "untie them in the entry's code, or save the checkpoint again",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_bad_state(name: str) -> None:
    module = tied()
    changes, text = BAD_STATES[name]
    state = {key: value for key, value in {**state_of(module), **changes}.items() if value is not None}
    with pytest.raises(InputError) as caught:
        checkpoint.match(state, module)
    assert str(caught.value) == text


def test_nan_beyond_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK", 3)
    weight = torch.ones(4, 4)
    weight[3, 3] = torch.inf
    with pytest.raises(InputError, match=r'^"weight" has 1 of 16 values that are NaN or infinite; '):
        checkpoint.match({"weight": weight}, nn.Linear(4, 4, bias=False))


CONFIG = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 8}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_folder(tmp_path: Path, quiet: None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    module = huggingface.build(tmp_path)
    assert type(module).__name__ == "BertModel"
    save_file(state_of(module), tmp_path / "model.safetensors")
    assert len(checkpoint.match(checkpoint.read(tmp_path), huggingface.build(tmp_path))) == len(state_of(module))


BAD_CONFIGS = {
    "{": "this is not JSON; copy it again",
    '{"model_type": "bert"}': 'config.json names no "architectures"; give the model an entry',
    '{"architectures": ["NoNet"]}': 'transformers has no class "NoNet"; give the model an entry',
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", BAD_CONFIGS)
def test_bad_hugging_face_folder(tmp_path: Path, quiet: None, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError) as caught:
        huggingface.build(tmp_path)
    where = tmp_path / "config.json" if config == "{" else tmp_path
    assert str(caught.value) == f"{where}: {BAD_CONFIGS[config]}"


def test_hugging_face_folder_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeMissingError) as caught:
        huggingface.build(tmp_path)
    assert str(caught.value) == f"{tmp_path}: transformers is not installed; pip install 'paredown[hf]'"
    assert caught.value.exit_code == 7
