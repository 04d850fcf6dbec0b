"""What a module of TensorRT has of the calls on stdin, as JSON on stdout: run in a process of its own.

Under link stubs the classes can be read and nothing may be called.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from types import ModuleType
from typing import Any

SIGNATURE = r"^(?:\d+\. )?{name}\(self: [^,()]+(?:, (?P<arguments>.*))?\) -> (?P<result>.*)$"


def examine(module: ModuleType, calls: list[dict[str, Any]]) -> dict[str, str]:
    """Return call -> what is wrong with it, "" where it is there and takes as many arguments as are passed."""
    return {call["name"]: problem(module, call) for call in calls}


def problem(module: ModuleType, call: dict[str, Any]) -> str:
    owner: Any = module
    for part in call["path"]:
        if not hasattr(owner, part):
            return f"there is no {part}"
        owner = getattr(owner, part)
    if call["kind"] == "setting" and getattr(owner, "fset", None) is None:
        return "it cannot be set"
    if call["kind"] != "method":
        return ""
    found = [*re.finditer(SIGNATURE.format(name=call["path"][-1]), owner.__doc__ or "", re.MULTILINE)]
    if not found:
        return "it has no signature"
    fitting = [match for match in found if takes(match["arguments"] or "", call["arguments"])]
    if not fitting:
        return f"it does not take {call['arguments']} arguments: {found[0][0]}"
    missing = [name for name in call["result"] if not any(name in match["result"] for match in fitting)]
    return f"it does not return {missing[0]}: {fitting[0][0]}" if missing else ""


def takes(arguments: str, count: int) -> bool:
    """Whether so many positional arguments fit a signature."""
    texts = split(arguments)
    required = sum(" = " not in text for text in texts)
    return required <= count <= len(texts)


def split(arguments: str) -> list[str]:
    """Return the arguments of a signature; commas within brackets separate none."""
    depth, texts = 0, [""]
    for letter in arguments:
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            texts.append("")
        else:
            texts[-1] += letter
    return [text for text in texts if text.strip()]


if __name__ == "__main__":
    library = importlib.import_module(sys.argv[1])
    found = {"version": library.__version__, "problems": examine(library, json.load(sys.stdin))}
    json.dump(found, sys.stdout)
