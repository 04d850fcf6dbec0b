"""Entries: found, loaded with their siblings, kept as text, called; and what is wrong is said with its line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paredown.optimizer import entry
from paredown.optimizer.errors import InputError, RecipeError
from paredown.optimizer.model import SourceFile

NET = """
import json
from layers import width
from torch import nn

def build(scale: int = 1) -> nn.Module:
    return nn.Linear(width(), 2 * scale)

def lazy():
    import later
    return nn.Linear(later.SIZE, 1)

def number():
    return 3

def cls():
    return nn.Linear

def data(samples, *, seed=0):
    return [samples, seed]

def anything(**given):
    return given

def fails():
    return 1 / 0

def library_fails():
    return json.loads("{\\n")

def leaves():
    raise SystemExit(2)

SIZE = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zoo").mkdir()
    write(tmp_path / "zoo", {"net.py": NET, "layers.py": "from deep.size import W\ndef width(): return W\n"})
    write(tmp_path / "zoo", {"deep/__init__.py": "", "deep/size.py": "from . import unit\nW = unit.U\n"})
    write(tmp_path / "zoo", {"deep/unit.py": "U = 5\n", "later.py": "SIZE = 7\n", "unused.py": "boom(\n"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def resolve(text: str) -> entry.Entry:
    return entry.resolve(text, Path())


def test_a_file_is_loaded_with_its_siblings_and_they_are_kept(folder: Path) -> None:
    path = list(sys.path)
    loaded = resolve("zoo/net.py:build")
    assert entry.build_module(loaded).in_features == 5
    names = ["net.py", "deep/__init__.py", "deep/size.py", "deep/unit.py", "later.py", "layers.py"]
    assert [file.name for file in loaded.files] == names
    assert loaded.files[0].text == NET
    assert sys.path == path


def test_a_sibling_may_be_imported_late(folder: Path) -> None:
    assert entry.build_module(resolve("zoo/net.py:lazy")).in_features == 7


def test_two_folders_with_siblings_of_one_name_do_not_mix(folder: Path) -> None:
    write(folder / "other", {"net.py": NET, "layers.py": "def width(): return 9\n", "later.py": "SIZE = 8\n"})
    first, second = resolve("zoo/net.py:lazy"), resolve("other/net.py:lazy")
    sizes = [entry.build_module(loaded).in_features for loaded in (first, second, first, resolve("other/net.py:build"))]
    assert sizes == [7, 8, 7, 9]


def test_one_file_is_loaded_once_and_again_when_a_sibling_changes(folder: Path) -> None:
    net = resolve("zoo/net.py:build").function.__globals__
    assert resolve("zoo/net.py:data").function.__globals__ is net
    write(folder / "zoo", {"deep/unit.py": "U = 1234\n"})
    assert entry.build_module(resolve("zoo/net.py:build")).in_features == 1234


def test_a_loaded_module_of_a_siblings_name_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = object()
    monkeypatch.setitem(sys.modules, "layers", other)
    assert entry.build_module(resolve("zoo/net.py:build")).in_features == 5
    assert sys.modules["layers"] is other


def test_kept_files_are_enough(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = resolve("zoo/net.py:build").files
    for name in ("net.py", "layers.py", "later.py"):
        (folder / "zoo" / name).unlink()
    again = entry.resolve_from_files("zoo/net.py:build", files)
    assert (again.text, again.files) == ("zoo/net.py:build", files)
    assert entry.build_module(again).in_features == 5
    assert entry.build_module(entry.resolve_from_files("zoo/net.py:lazy", files)).in_features == 7


@pytest.mark.parametrize(
    "name", ["../evil.py", "/tmp/evil.py", "a/../../evil.py", "C:\\evil.py", "a\\..\\..\\evil.py", ""]
)
def test_kept_files_stay_within_their_folder(name: str) -> None:
    with pytest.raises(InputError) as caught:
        entry.resolve_from_files("net.py:build", [SourceFile(name="net.py", text=""), SourceFile(name=name, text="")])
    assert str(caught.value) == f'entry "net.py:build": source file "{name}" would lie outside the folder'


def test_a_module_of_this_machine() -> None:
    loaded = resolve("torch.nn:Identity")
    assert isinstance(entry.build_module(loaded), nn.Identity)
    assert loaded.files == ()
    assert isinstance(entry.build_module(entry.resolve_from_files("torch.nn:Identity", ())), nn.Identity)


def test_building_is_seeded_and_leaves_the_random_state(folder: Path) -> None:
    loaded = resolve("zoo/net.py:build")
    state = torch.random.get_rng_state()
    first, second = entry.build_module(loaded, {"scale": 2}), entry.build_module(loaded, {"scale": 2})
    assert torch.equal(first.weight, second.weight)
    assert first.weight.shape == (4, 5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_call_passes_what_the_function_accepts(folder: Path) -> None:
    offered = {"samples": 4, "seed": 2, "other": 1}
    assert entry.call(resolve("zoo/net.py:data").function, offered, "here") == [4, 2]
    assert entry.call(resolve("zoo/net.py:anything").function, offered, "here", {"k": 3}) == {**offered, "k": 3}
    assert entry.call(resolve("zoo/net.py:data").function, offered, "here", {"seed": 9}) == [4, 9]


NO_FUNCTION = 'write "path.py:function" or "module:function"'
BAD = {
    "net.py": f'the entry "net.py" names no function; {NO_FUNCTION}',
    ":build": f'the entry ":build" names no function; {NO_FUNCTION}',
    "net.py:": f'the entry "net.py:" names no function; {NO_FUNCTION}',
    "net.py:a.b": f'the entry "net.py:a.b" names no function; {NO_FUNCTION}',
    "zoo/nett.py:build": 'entry "zoo/nett.py:build": there is no file zoo/nett.py; did you mean "net.py"?',
    "no/net.py:build": 'entry "no/net.py:build": there is no file no/net.py; there is no Python file in no',
    "zoo/net.py:biuld": 'entry "zoo/net.py:biuld": there is no function "biuld" in it; did you mean "build"?',
    "zoo/net.py:SIZE": 'entry "zoo/net.py:SIZE": "SIZE" is int, not a function; name a function',
    "no_such_module:f": 'entry "no_such_module:f": there is no module "no_such_module"; '
    'install it, or write "path.py:function"',
    "torch.no.such:f": 'entry "torch.no.such:f": there is no module "torch.no.such"; '
    'install it, or write "path.py:function"',
    "zoo/broken.py:f": 'entry "zoo/broken.py:f": zoo/broken.py:3 raised ZeroDivisionError: division by zero; '
    "mend the entry's code",
    "zoo/syntax.py:f": "entry \"zoo/syntax.py:f\": zoo/syntax.py:2 raised SyntaxError: '(' was never closed; "
    "mend the entry's code",
    "zoo/imports.py:f": 'entry "zoo/imports.py:f": zoo/imports.py:1 raised ModuleNotFoundError: '
    "No module named 'no_such_module'; mend the entry's code",
    "zoo/via.py:f": "entry \"zoo/via.py:f\": zoo/unused.py:1 raised SyntaxError: '(' was never closed; "
    "mend the entry's code",
    "zoo/latin.py:f": 'entry "zoo/latin.py:f": zoo/latin.py is not UTF-8 text; save it as UTF-8',
}


@pytest.mark.parametrize("text", BAD)
def test_bad_entry(folder: Path, text: str) -> None:
    write(folder / "zoo", {"broken.py": "x = 1\n\nx / 0\n", "syntax.py": "x = 1\nf(\n", "via.py": "import unused\n"})
    write(folder / "zoo", {"imports.py": "import no_such_module\n"})
    (folder / "zoo" / "latin.py").write_bytes(b"# \xff\n")
    with pytest.raises((RecipeError, InputError)) as caught:
        resolve(text)
    assert str(caught.value) == BAD[text]
    assert caught.value.exit_code == (3 if "mend" in BAD[text] or "UTF-8" in BAD[text] else 2)


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({}, 'entry "zoo/net.py:number": it returned int, not a torch.nn.Module; return the built network'),
    "cls": (
        {},
        'entry "zoo/net.py:cls": it returned the class Linear, not a torch.nn.Module; return the built network',
    ),
    "build": (
        {"scal": 1},
        'entry "zoo/net.py:build": build() takes no argument "scal"; did you mean "scale"?',
    ),
    "data": ({}, 'entry "zoo/net.py:data": data() needs an argument "samples"; write args: {samples: ...}'),
    "fails": (
        {},
        'entry "zoo/net.py:fails": zoo/net.py:26 raised ZeroDivisionError: division by zero; mend the entry\'s code',
    ),
    "library_fails": (
        {},
        'entry "zoo/net.py:library_fails": zoo/net.py:29 raised json.decoder.JSONDecodeError: '
        "Expecting property name enclosed in double quotes: line 2 column 1 (char 2); mend the entry's code",
    ),
    "leaves": ({}, 'entry "zoo/net.py:leaves": zoo/net.py:32 raised SystemExit: 2; mend the entry\'s code'),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(folder: Path, name: str) -> None:
    args, text = BAD_CALLS[name]
    with pytest.raises((RecipeError, InputError)) as caught:
        entry.build_module(resolve(f"zoo/net.py:{name}"), args)
    assert str(caught.value) == text
    assert caught.value.exit_code == (3 if "mend" in text else 2)
    assert ("mend" in text) == (caught.value.__cause__ is not None)


def test_an_error_of_ours_passes_through() -> None:
    with pytest.raises(RecipeError, match=r"^mine$"), entry.user_code("here"):
        raise RecipeError("mine")
    with pytest.raises(KeyboardInterrupt), entry.user_code("here"):
        raise KeyboardInterrupt
