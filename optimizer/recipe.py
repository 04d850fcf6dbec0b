"""Recipes: what a user wants done, read from YAML into frozen values and written back with every default filled in."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from . import tree
from .errors import RecipeError, nearest
from .sections import BenchSpec as BenchSpec
from .sections import DataSpec as DataSpec
from .sections import Gates as Gates
from .sections import MetricSpec as MetricSpec
from .sections import ModelSpec as ModelSpec
from .sections import at_least
from .tree import Node

if TYPE_CHECKING:
    from .steps import StepModule

DATA_VARIABLE, DATA_DEFAULT = "PAREDOWN_DATA", "../shared/data"
MAX_VALUES = 100_000
"""Aliases may repeat a part of a recipe, but not blow it up."""

_READY = ("prune", "factorize", "quantize")
_STEPS: Mapping[str, str] = {**{name: f"{__package__}.{name}" for name in _READY}, "recover": ""}
"""Step name -> the module with its `Spec`; "" where this version has none yet."""


def _build_steps(node: Node) -> tuple[Step, ...]:
    if not isinstance(node.value, tuple):
        raise node.error(f"steps must be a list, got {tree.shown(node)}", 'write "- quantize: {...}"')
    return tuple(_step(item) for item in node.value)


def _show_steps(steps: tuple[Step, ...]) -> list[dict[str, Any]]:
    return [{step.name: tree.show_all((step.spec, *step.extras))} for step in steps]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: the Spec of its module, and the other Specs whose keys share the mapping (a quantizer's)."""

    name: str
    spec: Any
    extras: tuple[Any, ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe. `base`: the folder that its paths are relative to. `lines`: top-level key -> "recipe.yaml:12"."""

    model: ModelSpec | None = None
    data: DataSpec | None = None
    metric: MetricSpec | None = None
    steps: tuple[Step, ...] = field(default=(), metadata={"build": _build_steps, "show": _show_steps})
    objective: Literal["latency", "size"] = "size"
    gates: Gates = field(default_factory=Gates)
    export: tuple[str, ...] = ()
    bench: BenchSpec | None = None
    seed: int = 0
    name: str = field(default="recipe", compare=False, metadata={"hidden": True})
    base: Path = field(default=Path(), compare=False, metadata={"hidden": True})
    lines: Mapping[str, str] = field(default_factory=dict, compare=False, metadata={"hidden": True})

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)

    def at(self, key: str) -> str:
        """Return where a top-level key was written, for the `where` of an error."""
        return self.lines.get(key, self.name)

    def path(self, text: str) -> Path:
        """Return a path of this recipe: $PAREDOWN_DATA/ expanded, else relative to the recipe's folder."""
        head, _, rest = text.partition("/")
        if head in (f"${DATA_VARIABLE}", f"${{{DATA_VARIABLE}}}"):
            return Path(os.environ.get(DATA_VARIABLE, DATA_DEFAULT)) / rest
        return self.base / text


def read(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; `settings` are changes such as "steps.0.quantize.bits=3"."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not text: byte {error.start} is not UTF-8", where=str(path)) from error
    except IsADirectoryError as error:
        raise RecipeError("is a folder", where=str(path), fix="name the recipe file in it") from error
    except OSError as error:
        beside = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        fix = nearest(path.name, beside) if beside else "name a YAML file"
        raise RecipeError("there is no such recipe", where=str(path), fix=fix) from error
    return parse(text, str(path), path.parent, settings)


def parse(text: str, name: str = "recipe", base: Path = Path(), settings: Sequence[str] = ()) -> Recipe:
    """Parse a recipe; `name` is what errors call it."""
    node = _compose(text, name)
    if node.value is None:
        raise RecipeError("the recipe is empty", where=name, fix='write at least "steps:"')
    if not isinstance(node.value, Mapping):
        raise node.error(f"a recipe is a mapping, got {tree.shown(node)}", 'begin with "model:" or "steps:"')
    node = override(node, settings)
    lines = {key: child.where for key, child in node.mapping("recipe").items()}
    return replace(tree.build(Recipe, node), name=name, base=base, lines=lines)


def override(node: Node, settings: Sequence[str]) -> Node:
    """Return a recipe's tree with values set by path, as in "steps.0.quantize.bits=3" (steps count from 0).

    A key that has dots is found where the mapping has it already, or is written in double quotes.
    """
    for setting in settings:
        where = f"--set {setting}"
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise RecipeError("there is no value", where=where, fix="write path.to.key=value")
        try:
            value = replace(_compose(text, where), where=where)
        except RecipeError as error:
            raise RecipeError(error.what, where=where, fix=error.fix) from error
        node = _set(node, re.findall(r'"[^"]*"|[^.]+', path), value)
    return node


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML with every default written; `parse(dump(recipe)) == recipe`."""
    return yaml.dump(tree.show(recipe), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def amend(step: Step, changes: Mapping[str, Any]) -> Step:
    """Return a step with some of its keys changed, checked as if the recipe had said so."""
    written = {**tree.show_all((step.spec, *step.extras)), **changes}
    return _step(tree.of_plain({step.name: written}, step.where))


def _step(node: Node) -> Step:
    if not isinstance(node.value, Mapping) or len(node.value) != 1:
        got = ", ".join(node.value) if isinstance(node.value, Mapping) else tree.shown(node)
        raise node.error(f"a step is one name with its settings, got {got}", 'write "- quantize: {bits: 4}"')
    ((name, child),) = node.value.items()
    child = Node(value={}, where=child.where) if child.value is None else child
    entries, module = child.mapping(name), _module(name, child)
    spec, *extras = tree.build_all(_types(module, child), child, name)
    if "override" in entries:
        spec = replace(spec, override=_override(module, child, name))
    return Step(name=name, spec=spec, extras=tuple(extras), where=child.where)


def _types(module: ModuleType, node: Node) -> tuple[type, ...]:
    """Return the dataclasses behind a step's mapping; the module may choose them by what is written."""
    try:
        return module.spec_types(node.plain()) if hasattr(module, "spec_types") else (module.Spec,)
    except RecipeError as error:
        raise tree.located(error, node) from error


def _override(module: ModuleType, node: Node, name: str) -> dict[str, dict[str, Any]]:
    """Check a step's `override`, glob -> some of the step's keys, as if each stood in the step itself.

    Keys of the step that an overridden quantizer does not know are left out for it.
    """
    entries = dict(node.mapping(name))
    found: dict[str, dict[str, Any]] = {}
    for glob, child in entries.pop("override").mapping("override").items():
        changed = child.mapping(f'override of "{glob}"')
        if "override" in changed:
            raise changed["override"].error("an override within an override", "list the glob beside the other one")
        known = tree.known_keys(_types(module, replace(child, value={**entries, **changed})))
        merged = {**{key: item for key, item in entries.items() if key in known}, **changed}
        node = replace(child, value=merged)
        values = tree.show_all(tree.build_all(_types(module, node), node, name))
        found[glob] = {key: values[key] for key in changed}
    return found


def _module(name: str, node: Node) -> ModuleType:
    """Return the module of a step; a name with a dot is somebody else's module."""
    ready = [known for known, module in _STEPS.items() if module]
    if name not in _STEPS and "." not in name:
        raise node.error(f'there is no step "{name}"', nearest(name, ready))
    if _STEPS.get(name) == "":
        raise node.error(f'the step "{name}" is not available in this version', "use " + ", ".join(ready))
    try:
        return importlib.import_module(_STEPS.get(name, name))
    except ModuleNotFoundError as error:
        raise node.error(f'the step "{name}" cannot be imported: {error}', "install its package") from error


def _set(node: Node, keys: Sequence[str], value: Node) -> Node:
    if not keys:
        return value
    if node.value is None:
        node = Node(value={}, where=node.where)
    if isinstance(node.value, tuple):
        index = int(keys[0]) if keys[0].isdigit() else -1
        if not 0 <= index < len(node.value):
            raise value.error(f'"{keys[0]}" is not a position in this list', f"use 0 to {len(node.value) - 1}")
        items = list(node.value)
        items[index] = _set(items[index], keys[1:], value)
        return Node(value=tuple(items), where=node.where)
    if not isinstance(node.value, Mapping):
        raise value.error(f'"{keys[0]}" lies within {tree.shown(node)}, which is no mapping', "shorten the path")
    key, used = _longest_key(keys, node.value)
    inner = _set(node.value.get(key, Node(value=None, where=value.where)), keys[used:], value)
    return Node(value={**node.value, key: inner}, where=node.where)


def _longest_key(keys: Sequence[str], known: Mapping[str, Node]) -> tuple[str, int]:
    """Return the next key of a path and how many of its parts that is: "layer3.0.conv1" may be one key."""
    for used in range(len(keys), 1, -1):
        if ".".join(keys[:used]) in known:
            return ".".join(keys[:used]), used
    return keys[0].strip('"'), 1


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `no`, `on` and `1:30` are text, `1e-3` is a number. Nothing is ever constructed."""


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would otherwise read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PLAIN = (
    ("null", r"null|Null|NULL|~|", ("n", "N", "~", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?[0-9]+", tuple("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", tuple("-+.0123456789")),
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _PLAIN:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _compose(text: str, name: str) -> Node:
    """Parse YAML into a located tree."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        return Node(value=None, where=name) if root is None else _Tree(name).convert(root)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"this is not YAML: {error.problem}", where=name + line, fix="mend the line") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"this is not YAML: {str(error).splitlines()[0]}", where=name) from error
    except RecursionError as error:
        raise RecipeError("values are nested too deeply", where=name) from error


_SCALARS: Mapping[str, Callable[[str], tree.Value]] = {
    "null": lambda _: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "str": str,
}


class _Tree:
    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def convert(self, node: yaml.Node, line: int | None = None) -> Node:
        where = f"{self.name}:{(node.start_mark.line if line is None else line) + 1}"
        self.count += 1
        if self.count > MAX_VALUES:
            raise RecipeError("aliases repeat without end", where=where, fix="write the values out")
        return Node(value=self._value(node, where), where=where)

    def _value(self, node: yaml.Node, where: str) -> tree.Value:
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.convert(item) for item in node.value)
        if isinstance(node, yaml.MappingNode):
            return self._entries(node)
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), str(node.value)
        if kind not in _SCALARS:
            raise RecipeError(f'the tag "{node.tag}" is not allowed', where=where, fix="write a plain value")
        try:
            return _SCALARS[kind](text)
        except ValueError as error:
            raise RecipeError(f"{text[:20]!r} cannot be read as {kind}", where=where) from error

    def _entries(self, node: yaml.MappingNode) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            where = f"{self.name}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError("a key must be text", where=where)
            if key.value in entries:
                raise RecipeError(f'the key "{key.value}" is there twice', where=where, fix="remove one")
            entries[key.value] = self.convert(value, key.start_mark.line)
        return entries


def step_module(name: str) -> StepModule:
    """Return the module of a step that a recipe names."""
    return cast("StepModule", importlib.import_module(_STEPS.get(name, name)))


def show_step(step: Step) -> dict[str, Any]:
    """Return a step's settings as plain data, every default written."""
    return tree.show_all((step.spec, *step.extras))


def dump_data(value: Any) -> str:
    """Return plain data as YAML, one line per innermost mapping."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=200)


def read_data(path: Path) -> Any:
    """Return a YAML file as plain data."""
    try:
        return _compose(path.read_text(encoding="utf-8"), str(path)).plain()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("cannot be read", where=str(path), fix="name a plan.yaml that optimize wrote") from error
