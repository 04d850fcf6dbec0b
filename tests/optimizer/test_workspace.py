"""The folder that is being made: locked, replaced in one move, and a cache that never gives back what is not whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from paredown.optimizer import workspace
from paredown.optimizer.errors import ExportError, RecipeError
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.weight import Uniform
from paredown.optimizer.workspace import Workspace, open_workspace

from .tiny import listing


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Workspace]:
    opened = open_workspace(tmp_path / "out", resume=False, force=False)
    yield opened
    opened.close()


def made(path: Path, text: str = "{}") -> Path:
    """Write a folder as optimize would."""
    path.mkdir()
    (path / "model.json").write_text(text)
    return path


def uniform() -> Uniform:
    codes = torch.arange(8, dtype=torch.uint8).view(2, 4)
    return Uniform(codes=codes, scale=torch.ones(2, 1, dtype=torch.float16), zero=4, code_bits=8)


def small_model() -> Model:
    spec = InputSpec(name="x", shape=("batch", 3))
    return from_module(
        torch.nn.Linear(3, 2), (spec,), Source(entry="torch.nn:Linear", args={"in_features": 3, "out_features": 2})
    )


def test_a_finished_folder_is_moved_and_nothing_else_stays(work: Workspace, tmp_path: Path) -> None:
    (work.folder / "model.json").write_text("{}")
    work.put_json("mark", [1.5])
    work.finish()
    assert listing(tmp_path) == {"out", "out/model.json"}


def test_force_replaces_in_one_move(tmp_path: Path) -> None:
    made(tmp_path / "out", "old")
    work = open_workspace(tmp_path / "out", resume=False, force=True)
    assert (tmp_path / "out/model.json").read_text() == "old"
    (work.folder / "model.json").write_text("new")
    work.finish()
    work.close()
    assert listing(tmp_path) == {"out", "out/model.json"}
    assert (tmp_path / "out/model.json").read_text() == "new"


def test_a_folder_killed_while_it_was_replaced_is_put_back(tmp_path: Path) -> None:
    made(tmp_path / ".out.old", "old")
    with pytest.raises(RecipeError, match='the output folder "out" exists already; use --force or another --out'):
        open_workspace(tmp_path / "out", resume=False, force=False)
    assert listing(tmp_path) == {"out", "out/model.json"}
    assert (tmp_path / "out/model.json").read_text() == "old"


@pytest.mark.parametrize("name", ["notes.txt", "sub/deep.txt"])
def test_force_never_replaces_somebody_elses_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(RecipeError, match='the folder "out" was not made by optimize; use another --out'):
        open_workspace(tmp_path / "out", resume=False, force=True)
    assert path.read_text() == "mine"


def test_a_second_run_is_refused_until_the_first_ends(work: Workspace, tmp_path: Path) -> None:
    before = listing(tmp_path)
    for resume in (False, True):
        with pytest.raises(RecipeError, match='another run is writing to the output folder "out"; wait for it') as told:
            open_workspace(tmp_path / "out", resume=resume, force=False)
        assert told.value.exit_code == 2
    assert listing(tmp_path) == before
    work.close()
    open_workspace(tmp_path / "out", resume=False, force=False).close()


def test_only_finished_layers_and_steps_are_worth_keeping(work: Workspace, tmp_path: Path) -> None:
    work.put_json("mark", 0.5)
    assert not work.discard_unless_costly()
    assert listing(tmp_path) == set()
    work.layers("mark").put("conv1", uniform())
    assert work.discard_unless_costly()
    assert {path.name for path in tmp_path.iterdir()} == {".out.cache"}


def test_a_layer_comes_back_as_it_was(work: Workspace) -> None:
    cache, weight = work.layers("mark"), uniform()
    assert cache.get("conv1") is None
    cache.put("conv1", weight)
    again = cache.get("conv1")
    assert isinstance(again, Uniform)
    assert torch.equal(again.codes, weight.codes)
    assert work.layers("other").get("conv1") is None
    assert cache.get("conv2") is None


def test_a_step_comes_back_as_it_was(work: Workspace) -> None:
    model = small_model()
    assert work.get_model("mark") is None
    work.put_model("mark", model, {"seconds": 1.5})
    found = work.get_model("mark")
    assert found is not None
    assert found[1] == {"seconds": 1.5}
    assert all(torch.equal(value, model.values()[name]) for name, value in found[0].values().items())


@pytest.mark.parametrize("size", [0, 5, 60])
def test_what_was_cut_short_is_made_again(size: int, work: Workspace) -> None:
    work.put_json("mark", list(range(40)))
    work.layers("mark").put("conv1", uniform())
    work.put_model("mark", small_model(), {})
    for path in work.cache.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:size])
    assert work.get_json("mark") is None
    assert work.layers("mark").get("conv1") is None
    assert work.get_model("mark") is None
    work.put_model("mark", small_model(), {})
    work.layers("mark").put("conv1", uniform())
    assert work.get_model("mark") is not None
    assert work.layers("mark").get("conv1") is not None


def test_a_fingerprint_tells_values_shapes_and_dtypes_apart() -> None:
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(5), -torch.zeros(4)]
    parts = [*zeros, torch.zeros(4, dtype=torch.bfloat16), torch.zeros(()), torch.zeros(0), "a", ("a",), 1, "1 "]
    marks = {workspace.fingerprint(part) for part in parts}
    assert len(marks) == len(parts)
    assert workspace.fingerprint("a", "b") != workspace.fingerprint("ab")
    assert workspace.fingerprint(torch.ones(2, 3).T) == workspace.fingerprint(torch.ones(3, 2))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("kind", ["python", "rust"])
def test_a_disk_that_cannot_be_written_is_told(number: int, kind: str) -> None:
    text = f"I/O error: {os.strerror(number)} (os error {number})"
    error = OSError(number, os.strerror(number)) if kind == "python" else RuntimeError(text)
    told = (
        f'cannot write to the output folder "out": {os.strerror(number).lower()}; free some space or use another --out'
    )
    with pytest.raises(ExportError) as caught, workspace.disk_errors(Path("a/out")):
        raise error
    assert str(caught.value) == told


@pytest.mark.parametrize("error", [ValueError("no"), OSError(errno.ENOENT, "no"), KeyError("space")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), workspace.disk_errors(Path("out")):
        raise error
