"""Entries: the functions of a user that a recipe names, "path.py:function" or "module:function", loaded and called."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from .errors import Error, InputError, RecipeError, nearest
from .model import SourceFile

Function: TypeAlias = Callable[..., Any]
_FILES = "__paredown_files__"
"""Attribute of a module loaded here: ((path, text), ...) of it and its siblings when it was loaded."""
_SIBLINGS = "__paredown_siblings__"
"""Attribute of a module loaded here: name -> module of each sibling that it imported."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A user's function. `files`: its file first, then those of its folder that it imports; empty for a module."""

    text: str
    function: Function
    files: tuple[SourceFile, ...] = field(default=())

    @property
    def where(self) -> str:
        return f'entry "{self.text}"'

    @property
    def code(self) -> str:
        """Return the source text behind the function, as far as there is one: what a cached result depends on."""
        if self.files:
            return "\0".join(file.text for file in self.files)
        try:
            return inspect.getsource(sys.modules[self.function.__module__])
        except (OSError, TypeError, KeyError):
            return ""


def parts(entry: str) -> tuple[str, str]:
    """Split an entry at its last colon into file or module, and function."""
    place, colon, name = entry.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise RecipeError(f'the entry "{entry}" names no function', fix='write "path.py:function" or "module:function"')
    return place, name


def resolve(entry: str, base: Path) -> Entry:
    """Load an entry; a path is relative to `base`, the folder of the recipe.

    Raises RecipeError where the file or function is missing, InputError where the file itself raises.
    """
    place, name = parts(entry)
    where = f'entry "{entry}"'
    if not place.endswith(".py"):
        return Entry(text=entry, function=_function(_import(place, where), name, where))
    path = Path(os.path.abspath(base / place))
    if not path.is_file():
        beside = [item.name for item in path.parent.glob("*.py")] if path.parent.is_dir() else []
        fix = nearest(path.name, beside) if beside else f"there is no Python file in {_shown(path.parent)}"
        raise RecipeError(f"there is no file {_shown(path)}", where=where, fix=fix)
    files = _closure(path, where)
    module = _load(files, where)
    function = _beside(_function(module, name, where), module)
    sources = tuple(SourceFile(name=file.relative_to(path.parent).as_posix(), text=text) for file, text in files)
    return Entry(text=entry, function=function, files=sources)


def resolve_from_files(entry: str, files: Sequence[SourceFile]) -> Entry:
    """Load an entry from the texts that an output folder keeps; the first file is the entry's own.

    Without files the entry is a function of an installed package, never a path or a module of Python itself. The texts
    live in a temporary folder as long as the function.
    """
    if not files:
        place, _ = parts(entry)
        if place.endswith(".py") or place.partition(".")[0] in sys.stdlib_module_names:
            fix = "an output folder names its own source file or an installed package"
            raise InputError(
                "refused: it would run code that the folder does not hold", where=f'entry "{entry}"', fix=fix
            )
        return resolve(entry, Path())
    for file in files:
        name = PurePosixPath(file.name)
        if name.is_absolute() or ".." in name.parts or "\\" in file.name or ":" in file.name or not name.parts:
            raise InputError(f'source file "{file.name}" would lie outside the folder', where=f'entry "{entry}"')
    _, name_of_function = parts(entry)
    folder = Path(tempfile.mkdtemp(prefix="paredown-"))
    try:
        for file in files:
            path = folder / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text, encoding="utf-8", newline="")
        loaded = resolve(f"{files[0].name}:{name_of_function}", folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(loaded.function, shutil.rmtree, folder, True)
    return Entry(text=entry, function=loaded.function, files=tuple(files))


def call(function: Function, offered: Mapping[str, Any], where: str, args: Mapping[str, Any] | None = None) -> Any:
    """Call a user's function with those of `offered` that it accepts, and with all of `args`.

    Raises RecipeError where an argument is missing or not accepted, InputError where the function raises.
    """
    args, name = args or {}, getattr(function, "__name__", "the entry")
    accepted, everything = _parameters(function)
    for key in args:
        if key not in accepted and not everything:
            raise RecipeError(f'{name}() takes no argument "{key}"', where=where, fix=nearest(key, accepted))
    given = {key: value for key, value in offered.items() if everything or key in accepted} | dict(args)
    missing = [key for key, required in accepted.items() if required and key not in given]
    if missing:
        raise RecipeError(
            f'{name}() needs an argument "{missing[0]}"', where=where, fix=f"write args: {{{missing[0]}: ...}}"
        )
    with user_code(where):
        return function(**given)


def build_module(entry: Entry, args: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the network that an entry builds, seeded, leaving the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = call(entry.function, {}, entry.where, args)
    if isinstance(module, nn.Module):
        return module
    got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
    raise RecipeError(f"it returned {got}, not a torch.nn.Module", where=entry.where, fix="return the built network")


@contextlib.contextmanager
def user_code(where: str) -> Iterator[None]:
    """Turn what a user's code raises into an InputError that names its file and line."""
    try:
        yield
    except Error:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(_told(error), where=where, fix="mend the entry's code") from error


def foreign_module(name: str, kind: str) -> ModuleType:
    """Import somebody else's module by its dotted name; a RecipeError where it is not there or does not load."""
    fix = "install the module or fix its name"
    if name.startswith("."):
        raise RecipeError(f'{kind} "{name}" begins with a dot', fix="write the whole name of the module")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(f'{kind} "{name}" cannot be imported: {error}', fix=fix) from error
    except Exception as error:
        raise RecipeError(f'{kind} "{name}" cannot be imported: {_told(error)}', fix="mend the module") from error


def place(error: BaseException) -> str:
    """Return "file:line" of the innermost frame that is neither torch's nor ours, "" if there is none."""
    outside = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f"{_shown(Path(outside[-1].filename))}:{outside[-1].lineno}" if outside else ""


def _told(error: BaseException) -> str:
    """Return "file:line raised Type: message"."""
    last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_shown(Path(error.filename))}:{error.lineno} raised {last}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{place(error) or f'{_shown(Path(frame.filename))}:{frame.lineno}'} raised {last}"


def _is_library(filename: str) -> bool:
    if os.path.dirname(filename) == os.path.dirname(__file__) or "site-packages" in filename:
        return True
    return filename.startswith((os.path.dirname(os.__file__) + os.sep, "<"))


def _shown(path: Path) -> str:
    """Return a path relative to the current folder where it lies within."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _parameters(function: Function) -> tuple[dict[str, bool], bool]:
    """Return keyword name -> whether it is required, and whether any keyword is taken."""
    accepted: dict[str, bool] = {}
    everything = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            everything = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            accepted[parameter.name] = parameter.default is parameter.empty
    return accepted, everything


def _function(module: ModuleType, name: str, where: str) -> Function:
    found = getattr(module, name, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    if found is not None:
        raise RecipeError(f'"{name}" is {type(found).__name__}, not a function', where=where, fix="name a function")
    public = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
    raise RecipeError(f'there is no function "{name}" in it', where=where, fix=nearest(name, public))


def _import(name: str, where: str) -> ModuleType:
    try:
        missing = importlib.util.find_spec(name) is None
    except (ModuleNotFoundError, ValueError):
        missing = True
    if missing:
        raise RecipeError(f'there is no module "{name}"', where=where, fix='install it, or write "path.py:function"')
    with user_code(where):
        return importlib.import_module(name)


def _load(files: Sequence[tuple[Path, str]], where: str) -> ModuleType:
    """Execute the first file under a name of its own, or return it if it and its siblings are as they were."""
    path, text = files[0]
    name = f"paredown_entry_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    known = sys.modules.get(name)
    if known is not None and getattr(known, _FILES, None) == tuple(files):
        return known
    module = ModuleType(name)
    vars(module).update({"__file__": str(path), _FILES: tuple(files), _SIBLINGS: {}})
    with _as_script(module), user_code(where):
        sys.modules[name] = module
        try:
            exec(compile(text, str(path), "exec", dont_inherit=True), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextlib.contextmanager
def _as_script(module: ModuleType) -> Iterator[None]:
    """Let a loaded file find its siblings: `import layers` is its folder's layers.py, whoever else has a `layers`."""
    files: tuple[tuple[Path, str], ...] = getattr(module, _FILES)
    siblings: dict[str, ModuleType] = getattr(module, _SIBLINGS)
    folder = files[0][0].parent
    tops = {file.relative_to(folder).parts[0].removesuffix(".py") for file, _ in files[1:]}
    before = {name: found for name, found in sys.modules.items() if name.partition(".")[0] in tops}
    for name in before:
        del sys.modules[name]
    sys.modules.update(siblings)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        siblings.update({name: found for name, found in sys.modules.items() if name.partition(".")[0] in tops})
        sys.modules.update(before)


def _beside(function: Function, module: ModuleType) -> Function:
    """Return a function that finds its siblings also when it imports them only as it runs."""

    @functools.wraps(function)
    def found(*args: Any, **kwargs: Any) -> Any:
        with _as_script(module):
            return function(*args, **kwargs)

    return found


def _closure(path: Path, where: str) -> tuple[tuple[Path, str], ...]:
    """Return a file and, sorted, all files of its folder that it imports, at the top or anywhere within."""
    found: dict[Path, str] = {}
    pending = [path]
    while pending:
        file = pending.pop()
        if file not in found:
            found[file] = _text(file, where)
            pending += _imports(file, found[file], path.parent)
    rest = sorted(file for file in found if file != path)
    return tuple((file, found[file]) for file in (path, *rest))


def _text(file: Path, where: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{_shown(file)} is not UTF-8 text", where=where, fix="save it as UTF-8") from error


def _imports(file: Path, text: str, folder: Path) -> list[Path]:
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return []  # loading it reports the line
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(folder).parts[: -node.level] if node.level else ()
            stem = ".".join([*package, *([node.module] if node.module else [])])
            names += [stem, *(f"{stem}.{alias.name}".lstrip(".") for alias in node.names)]
    return [path for name in names for path in _files_of(name, folder)]


def _files_of(name: str, folder: Path) -> list[Path]:
    """Return the files of a folder that importing a dotted name would execute."""
    steps = name.split(".")
    prefixes = [folder.joinpath(*steps[: count + 1]) for count in range(len(steps))]
    candidates = [path for prefix in prefixes for path in (prefix / "__init__.py", prefix.with_suffix(".py"))]
    return [path for path in candidates if path.is_file()]
