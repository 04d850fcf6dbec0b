"""A model in a folder: the same bytes for the same value, the same value from the bytes, and every damage named."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.optimizer import fold, store
from paredown.optimizer.errors import InputError
from paredown.optimizer.graph import quiet_export
from paredown.optimizer.model import ActQuant, InputSpec, Model, Source, SourceFile, from_module
from paredown.optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

from ..zoo.nets import ZOO, in_turn
from ..zoo.traced import case

each = pytest.mark.parametrize("name", in_turn(ZOO, 1))


def coded(weight: Weight, index: int) -> Weight:
    """Return a weight of one of four forms, near the dense one."""
    w = weight.dense()
    generator = torch.Generator().manual_seed(index)
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-3) / 7
    uniform = Uniform(codes=((w / scale).round() + 8).clamp(0, 15).byte(), scale=scale.half(), zero=8, code_bits=4)
    blocks = math.ceil(len(w) / 16)
    table = torch.randint(-127, 128, (blocks, 8), generator=generator).to(torch.int8)
    codes = torch.randint(0, 8, w.shape, generator=generator).byte()
    group = max(1, w.shape[1] - 1)
    scales = (scale * 7).repeat(1, math.ceil(w.shape[1] / group))
    table_weight = Codebook(codes=codes, table=table, scale=scales, code_bits=3, group=group, table_rows=16)
    low_rank = LowRank(left=Dense(values=w[:, :1].contiguous()), right=Dense(values=torch.ones(1, w.shape[1])))
    return (uniform, table_weight, Sum(terms=(uniform, low_rank)), low_rank)[index % 4]


@functools.cache
def compressed(name: str) -> Model:
    """Return a network of the zoo, folded, with weights of all forms, and a grid for its input if that is an image."""
    net = case(name)
    model = fold.apply(net.model, fold.plan(net.model, net.traced.graph))
    layouts = {param: sites[0].layout for param, sites in net.traced.graph.of_param().items()}
    model = replace(model, layouts={**model.layouts, **layouts})
    weights = {
        key: Dense(values=model.layouts[key].to_matrix(net.model.layouts[key].to_param(weight.dense())))
        for key, weight in model.weights.items()
    }
    kinds = {key: coded(weight, i) for i, (key, weight) in enumerate(weights.items())}
    image = net.net.file == "convolutions"
    acts = {f"input/{net.net.inputs[0].name}": ActQuant(scale=0.1, zero=3, signed=False)} if image else {}
    return replace(model.with_weights(kinds), acts=acts)


def run(module: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), quiet_export():
        return pytree.tree_leaves(module(*batch))  # type: ignore[no-any-return]


def same(one: Model, other: Model) -> None:
    """Assert that two models hold the same, to the bit."""
    assert one.values().keys() == other.values().keys()
    assert all(torch.equal(value, other.values()[key]) for key, value in one.values().items())
    assert {key: w.meta() for key, w in one.weights.items()} == {key: w.meta() for key, w in other.weights.items()}
    assert store.describe(one) == store.describe(other)
    assert one.source == other.source
    assert one.inputs == other.inputs


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@each
@pytest.mark.parametrize("kind", ["dense", "compressed"])
def test_a_model_comes_back_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    model = case(name).model if kind == "dense" else compressed(name)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    store.save(model, one)
    loaded = store.load(one)
    same(model, loaded)
    assert loaded.aliases() == model.aliases()
    batch = case(name).batches[0]
    expected, got = run(model.module(), batch), run(loaded.module(), batch)
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
    store.save(loaded, two)
    assert contents(one) == contents(two)
    assert set(contents(one)) == {"model.json", "model.safetensors", f"source/{case(name).net.file}.py"}


@pytest.mark.parametrize("name", ["residual", "llama", "lstm"])
def test_the_sizes_are_the_files(name: str, tmp_path: Path) -> None:
    for model in (case(name).model, compressed(name)):
        store.save(model, tmp_path)
        data = (tmp_path / "model.safetensors").read_bytes()
        assert model.size_bytes() == len(data) - 8 - int.from_bytes(data[:8], "little")


SCRIPT = """
import sys
from pathlib import Path
from paredown.optimizer import store
store.save(store.load(sys.argv[1]), Path(sys.argv[2]))
"""


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    store.save(compressed("residual"), one)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", SCRIPT, str(one), str(two)], check=True, env=environment)
    assert contents(one) == contents(two)


WIDE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 1024))
"""


def wide(folder: Path) -> Model:
    source = Source(entry="net.py:net", files=(SourceFile(name="net.py", text=WIDE),))
    module = nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 1024))
    model = from_module(module, (InputSpec(name="x", shape=("batch", 1024)),), source)
    store.save(model, folder)
    return model


def test_dense_tensors_are_memory_mapped(tmp_path: Path) -> None:
    wide(tmp_path)
    loaded = store.load(tmp_path)
    lines = [line for line in Path("/proc/self/smaps").read_text().split("VmFlags") if str(tmp_path) in line]
    assert lines
    resident = sum(int(part.split()[1]) for line in lines for part in line.splitlines() if part.startswith("Rss:"))
    starts = [int(piece.split("-")[0], 16) for line in lines for piece in line.split() if _is_range(piece)]
    ends = [int(piece.split("-")[1], 16) for line in lines for piece in line.split() if _is_range(piece)]
    assert max(ends) - min(starts) >= 4 * loaded.parameters()
    addresses = [weight.dense().data_ptr() for weight in loaded.weights.values()]
    assert all(any(low <= at < high for low, high in zip(starts, ends, strict=True)) for at in addresses)
    assert resident * 1024 < 4 * loaded.parameters() // 2


def _is_range(piece: str) -> bool:
    low, dash, high = piece.partition("-")
    return bool(dash) and all(len(part) >= 8 and set(part) <= set("0123456789abcdef") for part in (low, high))


def test_sources_in_folders_come_back(tmp_path: Path) -> None:
    net = "from parts.layer import make\n\ndef net():\n    return make()\n"
    layer = '"""\u00e9"""\nfrom torch import nn\ndef make():\n    return nn.Linear(4, 2)\n'
    texts = {"net.py": net, "parts/__init__.py": "", "parts/layer.py": layer}
    files = tuple(SourceFile(name=name, text=text) for name, text in texts.items())
    model = from_module(nn.Linear(4, 2), (), Source(entry="zoo/net.py:net", files=files))
    store.save(model, tmp_path)
    assert set(contents(tmp_path)) >= {"source/net.py", "source/parts/__init__.py", "source/parts/layer.py"}
    same(model, store.load(tmp_path))


def change(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weight(folder: Path, name: str, **changes: Any) -> None:
    weights = json.loads((folder / "model.json").read_text())["weights"]
    weights[name] = {**weights[name], **changes}
    change(folder, weights=weights)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def tamper(folder: Path) -> None:
    path = folder / "source" / "convolutions.py"
    path.write_text(path.read_text() + "\n")


def without(folder: Path, key: str) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


JSON, FILE, SOURCE = "{folder}/model.json", "{folder}/model.safetensors", "{folder}/source/convolutions.py"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "schema": (
        lambda f: change(f, schema="paredown.model/9"),
        f'{JSON}: schema "paredown.model/9" is not "paredown.model/1"; run optimize again',
    ),
    "list": (
        lambda f: (f / "model.json").write_text("[]"),
        f'{JSON}: schema "None" is not "paredown.model/1"; run optimize again',
    ),
    "json": (
        lambda f: (f / "model.json").write_text("{"),
        f"{JSON}: is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); "
        "copy the folder again",
    ),
    "no json": (
        lambda f: (f / "model.json").unlink(),
        '"{folder}" is not an output folder; it must hold model.json and model.safetensors',
    ),
    "tampered": (tamper, f"{SOURCE}: was changed after it was saved; restore it or run optimize again"),
    "no source": (
        lambda f: (f / "source" / "convolutions.py").unlink(),
        f"{SOURCE}: is missing; copy the whole folder",
    ),
    "no key": (
        lambda f: without(f, "edits"),
        f"{JSON}: does not fit model.safetensors: KeyError 'edits'; copy the folder again",
    ),
    "tensor": (
        lambda f: change(f, tensors=["nothing"]),
        f"{JSON}: does not fit model.safetensors: KeyError 'nothing'; copy the folder again",
    ),
    "dtype": (
        lambda f: edit_weight(f, "0.weight", dtype="float31"),
        f'{JSON}: unknown dtype "float31"; use the version of paredown that wrote it',
    ),
    "format": (
        lambda f: edit_weight(f, "0.weight", format="ternary"),
        f'{JSON}: unknown weight format "ternary"; use the version of paredown that wrote it',
    ),
    "codes": (
        lambda f: edit_weight(f, "0.weight", code_bits=3),
        f"{JSON}: codes take 108 bytes, which (8, 27) of 3 bits do not",
    ),
    "shape": (
        lambda f: edit_weight(f, "0.weight", shape=[8, 26]),
        f"{JSON}: codes take 108 bytes, which (8, 26) of 4 bits do not",
    ),
    "layout": (
        lambda f: edit_weight(f, "0.weight", layout={"kind": "conv", "shape": [8, 27, 3], "groups": 1}),
        f"{JSON}: does not fit model.safetensors: ValueError 0.weight of shape (8, 27) is no parameter (8, 27, 3); "
        "copy the folder again",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, text = DAMAGE[name]
    store.save(compressed("separable"), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        store.load(tmp_path)
    assert str(caught.value) == text.replace("{folder}", str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (cut, "model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"{}"), "model.safetensors"),
    ],
    ids=["cut", "gone", "text"],
)
def test_unreadable_tensors_are_an_input_error(damage: Callable[[Path], object], text: str, tmp_path: Path) -> None:
    store.save(compressed("separable"), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        store.load(tmp_path)
    assert text in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["../out.py", "/tmp/out.py", "a/../../out.py", "..", "", "a\\..\\b.py", "c:x.py"])
def test_source_names_never_leave_the_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    folder.mkdir(parents=True)
    model = case("separable").model
    text = f'{folder}/model.json: source file "{name}" would lie outside the folder'
    evil = replace(model, source=replace(model.source, files=(SourceFile(name=name, text="boom()"),)))
    with pytest.raises(InputError) as caught:
        store.save(evil, folder)
    assert str(caught.value) == text
    store.save(model, folder)
    change(folder, files=[{"name": name, "sha256": SourceFile(name=name, text="boom()").sha256}])
    with pytest.raises(InputError) as caught:
        store.load(folder)
    assert str(caught.value) == text
    assert not list(tmp_path.rglob("out.py"))


def test_an_unfitting_tensor_is_named_when_it_is_used(tmp_path: Path) -> None:
    model = case("separable").model
    store.save(model.with_tensors({"8.bias": torch.zeros(5)}), tmp_path)
    with pytest.raises(InputError) as caught:
        store.load(tmp_path).module()
    assert str(caught.value) == '"8.bias" has shape (5,), the architecture wants (4,)'
