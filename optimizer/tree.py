"""Frozen dataclasses built strictly from a tree of located values: every error says the line it came from.

What a field's metadata may say: `flatten` (a nested dataclass whose keys lie in the same mapping; a field called
`format` is one too), `aliases` (word -> value), `hidden` (no key of its own), `build` and `show` (functions Node ->
value and value -> plain value), `rest` (takes all keys that no field has, as a mapping of nodes: who knows them checks
them later).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import RecipeError, nearest

T = TypeVar("T")
Value: TypeAlias = "bool | int | float | str | tuple[Node, ...] | Mapping[str, Node] | None"
Plain: TypeAlias = "bool | int | float | str | Sequence[Plain] | Mapping[str, Plain] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A value and where it was written ("recipe.yaml:12"), which makes no two values different."""

    value: Value
    where: str = dataclasses.field(compare=False)

    def plain(self) -> Any:
        """Return the value without places: None, bool, int, float, str, tuple or dict."""
        match self.value:
            case tuple():
                return tuple(item.plain() for item in self.value)
            case Mapping():
                return {key: item.plain() for key, item in self.value.items()}
            case _:
                return self.value

    def error(self, what: str, fix: str = "") -> RecipeError:
        return RecipeError(what, where=self.where, fix=fix)

    def mapping(self, key: str) -> Mapping[str, Node]:
        """Return the entries of a mapping; an error for anything else."""
        if not isinstance(self.value, Mapping):
            raise self.error(f"{key} must be a mapping, got {shown(self)}")
        return self.value


def of_plain(value: Plain, where: str) -> Node:
    """Return a tree whose every value is at one place; the inverse of `Node.plain`."""
    if isinstance(value, Mapping):
        return Node(value={key: of_plain(item, where) for key, item in value.items()}, where=where)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Node(value=tuple(of_plain(item, where) for item in value), where=where)
    return Node(value=value, where=where)


def build(cls: type[T], node: Node, key: str = "this") -> T:
    """Build one dataclass from a mapping; `key` is what errors call it."""
    return cast(T, build_all((cls,), node, key)[0])


def build_all(types: Sequence[type], node: Node, key: str = "this") -> tuple[Any, ...]:
    """Build several dataclasses whose keys share one mapping.

    A key that two of them know goes to both. One that is not written takes the value of the first, so that there is
    one value per key.
    """
    entries = node.mapping(key)
    known = known_keys(types)
    takes_all = any(field.metadata.get("rest") for cls in types for field in dataclasses.fields(cls))
    for name, child in entries.items():
        if name not in known and not takes_all:
            raise child.error(f'there is no key "{name}"', nearest(name, known))
    values: list[Any] = []
    settled: dict[str, Any] = {}
    for cls in types:
        values.append(_construct(cls, node, settled))
        settled = {**_plain_fields(values[-1]), **settled}
    return tuple(values)


def known_keys(types: Sequence[type]) -> set[str]:
    """Return the keys that a mapping of these dataclasses may hold."""
    names: set[str] = set()
    for cls in types:
        for field in dataclasses.fields(cls):
            if _is_flat(field):
                names |= known_keys((get_type_hints(cls)[field.name],))
            elif not field.metadata.get("hidden") and not field.metadata.get("rest"):
                names.add(field.name)
    return names


def show(value: Any) -> Any:
    """Return a built value as plain lists, mappings and scalars, every default filled in."""
    if dataclasses.is_dataclass(value):
        return _show_fields(value)
    if isinstance(value, Mapping):
        return {key: show(item) for key, item in value.items()}
    return [show(item) for item in value] if isinstance(value, tuple) else value


def show_all(values: Sequence[Any]) -> dict[str, Any]:
    """Return several values that share one mapping as that mapping."""
    merged: dict[str, Any] = {}
    for value in values:
        merged |= {key: item for key, item in _show_fields(value).items() if key not in merged}
    return merged


def shown(node: Node) -> str:
    """Return a value as an error message quotes it."""
    match node.value:
        case None:
            return "nothing"
        case bool():
            return str(node.value).lower()
        case tuple():
            return "a list"
        case Mapping():
            return "a mapping"
        case _:
            return repr(node.value)


def convert(hint: Any, node: Node, key: str) -> Any:
    """Return the node's value as the type that a hint asks for; `key` is what errors call it."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return node.plain()
    if origin in (Union, UnionType):
        return _union(hint, node, key)
    if origin is Literal:
        return _literal(args, node, key)
    if origin is tuple and isinstance(node.value, tuple):
        return tuple(convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(node.value))
    if origin is not None and issubclass(origin, Mapping) and isinstance(node.value, Mapping):
        return {name: convert(args[1], item, name) for name, item in node.value.items()}
    if dataclasses.is_dataclass(hint):
        return build(cast(type, hint), node, key)
    if hint is float and type(node.value) is int:
        return float(node.value)
    if type(node.value) is not hint or (hint is float and not math.isfinite(cast(float, node.value))):
        raise _mismatch(hint, node, key)
    return node.value


def _construct(cls: type, node: Node, settled: Mapping[str, Any]) -> Any:
    entries, hints, values = node.mapping("this"), get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        name = field.name
        if field.metadata.get("hidden"):
            continue
        if field.metadata.get("rest"):
            values[name] = {key: child for key, child in entries.items() if key not in known_keys((cls,))}
        elif _is_flat(field):
            values[name] = _construct(hints[name], node, {**_plain_fields(_default(field)), **settled})
        elif name in entries:
            values[name] = _field(field, hints[name], entries[name])
        elif name in settled:
            values[name] = settled[name]
        elif _default(field) is MISSING:
            raise node.error(f'the key "{name}" is missing')
    try:
        return cls(**values)
    except RecipeError as error:
        raise located(error, node) from error


def located(error: RecipeError, node: Node) -> RecipeError:
    """Return an error with the line of the first key that its text names, or else of the whole mapping."""
    if error.where:
        return error
    entries = node.value if isinstance(node.value, Mapping) else {}
    words = [word for word in re.findall(r"[A-Za-z_]\w*", error.what) if word in entries]
    where = entries[words[0]].where if words else node.where
    return type(error)(error.what, where=where, fix=error.fix)


def _field(field: dataclasses.Field[Any], hint: Any, node: Node) -> Any:
    aliases: Mapping[str, Any] = field.metadata.get("aliases", {})
    if isinstance(node.value, str) and node.value in aliases:
        return aliases[node.value]
    if "build" in field.metadata:
        return field.metadata["build"](node)
    try:
        return convert(hint, node, field.name)
    except RecipeError as error:
        if aliases and isinstance(node.value, str) and not error.fix:
            raise node.error(error.what, "or write " + " or ".join(aliases)) from error
        raise


def _is_flat(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("flatten", field.name == "format"))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _plain_fields(value: Any) -> dict[str, Any]:
    """Return the keys of a built dataclass and their values; nothing for MISSING."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        if _is_flat(field):
            found |= _plain_fields(getattr(value, field.name))
        elif not field.metadata.get("hidden") and not field.metadata.get("rest"):
            found[field.name] = getattr(value, field.name)
    return found


def _show_fields(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if _is_flat(field):
            found |= _show_fields(item)
        elif field.metadata.get("rest"):
            found |= {key: show(child.plain()) for key, child in item.items()}
        elif not field.metadata.get("hidden"):
            found[field.name] = field.metadata["show"](item) if "show" in field.metadata else show(item)
    return found


def _union(hint: Any, node: Node, key: str) -> Any:
    arms = [arm for arm in get_args(hint) if arm is not NoneType]
    if node.value is None and NoneType in get_args(hint):
        return None
    if len(arms) == 1:
        return convert(arms[0], node, key)
    for arm in arms:
        try:
            return convert(arm, node, key)
        except RecipeError:
            continue
    raise _mismatch(hint, node, key)


def _literal(choices: tuple[Any, ...], node: Node, key: str) -> Any:
    for choice in choices:
        if type(node.value) is type(choice) and node.value == choice:
            return choice
    fix = nearest(node.value, map(str, choices)) if isinstance(node.value, str) else ""
    raise node.error(f"{key} must be {_wanted(Literal[choices])}, got {shown(node)}", fix)


def _mismatch(hint: Any, node: Node, key: str) -> RecipeError:
    fix = f"write [{node.value}]" if get_origin(hint) is tuple and not isinstance(node.value, Mapping) else ""
    return node.error(f"{key} must be {_wanted(hint)}, got {shown(node)}", fix if node.value is not None else "")


def _wanted(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_wanted(arm) for arm in args if arm is not NoneType)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}
    return names.get(origin or hint, "a mapping")
