"""Every call of TensorRT that our source makes exists in 10.3, 10.16, 11.4 and RTX, with the arguments that we pass.

The list is the Protocols of `tensorrt_api.py`, to which mypy holds the source; these tests hold the Protocols to the
source (nothing is declared that is not called) and to the bindings of each version. Those are downloaded, and linked to
stubs that are compiled here: classes and signatures can be read without the library. docs/tensorrt_api.md is the table.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from paredown.exporters import tensorrt_api, tensorrt_engine

from .pages import WRITE, is_current
from .tensorrt_calls import split, takes

SOURCE = Path(tensorrt_api.__file__)
USERS = sorted(set(SOURCE.parent.glob("tensorrt*.py")) - {SOURCE})
CHECKER = Path(__file__).with_name("tensorrt_calls.py")
BINDINGS = {
    "10.3": ("tensorrt-cu12-bindings==10.3.0", 10),
    "10.16": ("tensorrt-cu13-bindings==10.16.1.11", 10),
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", 11),
}
"""Version -> the wheel of its bindings, and the major version of the libraries that it links."""
REGISTRY = (
    {"name": "IPluginRegistry.load_library", "path": ["IPluginRegistry", "load_library"], "arguments": 1},
    {"name": "IPluginRegistry.get_creator", "path": ["IPluginRegistry", "get_creator"], "arguments": 3},
)
"""What the runner of a bundle calls besides, to load a compiled plugin."""
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    *("getPluginRegistry", "getBuilderPluginRegistry", "initLibNvInferPlugins"),
)
PAGE = """# Every call of TensorRT

All {calls} names of TensorRT that the exporter and the runner of a bundle use, looked up in the bindings of each
version: "yes" is a name that is there and, for a method, a signature that takes as many arguments as we pass and gives
what we use. "not called" are those of the other library. `tests/exporters/test_tensorrt_api.py` writes and checks this
page, and holds the list to the source. The names of `tensorrt.plugin` (10.9 and later) are not in the table: with them
a plugin is defined under the bindings of 10.16 and 11.4 by `test_tensorrt_aot.py`. The C++ plugin is compiled, not
looked up.
"""
MODULES = ("TensorRT", "RtxTensorRT")
ENUMERATION = "NetworkDefinitionCreationFlag"
"""Where what all enumerators have is looked up."""
BUFFER = "__buffer__"
"""A class of the bindings does not show it; engines that are built here with RTX are read through it."""


# --- what is declared


@cache
def declared() -> tuple[dict[str, Any], ...]:
    """Return every call of the Protocols: what it is looked up by, its kind, its arguments and the classes it gives."""
    tree = ast.parse(SOURCE.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    known = {name.removeprefix("Rtx") for name in classes if name not in (*MODULES, "Enumerator")}
    found = [
        call(name, item, known)
        for name, node in classes.items()
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AnnAssign) and member(item) != BUFFER
    ]
    return (*found, *(constructor(node) for node in tree.body if isinstance(node, ast.AnnAssign) and makes(node)))


def call(owner: str, item: ast.FunctionDef | ast.AnnAssign, known: set[str]) -> dict[str, Any]:
    name, place = member(item), [] if owner in MODULES else [class_of(owner)]
    if isinstance(item, ast.FunctionDef) and not item.decorator_list and not name.startswith("__"):
        kind, count = "method", len([*item.args.posonlyargs, *item.args.args]) - 1
        result = sorted(known & names(item.returns)) if item.returns else []
    else:
        kind, count, result = "setting" if isinstance(item, ast.AnnAssign) and place else "value", 0, []
    path = [*place, *([] if name == "__call__" else [name])]
    found = {"path": path, "kind": kind, "arguments": count, "result": result, "rtx": owner.startswith("Rtx")}
    if name == "__call__":
        assert isinstance(item, ast.FunctionDef)
        found |= {"path": [*place, "__init__"], "kind": "method", "arguments": len(item.args.posonlyargs) - 1}
    return found | {"name": ".".join(found["path"])}


def constructor(node: ast.AnnAssign) -> dict[str, Any]:
    """Return the constructor that an alias MakeX: TypeAlias = Callable[[...], X] stands for."""
    assert isinstance(node.value, ast.Subscript)
    assert isinstance(node.value.slice, ast.Tuple)
    arguments, made = node.value.slice.elts
    assert isinstance(arguments, ast.List)
    path = [ast.unparse(made), "__init__"]
    rest = {"kind": "method", "arguments": len(arguments.elts), "result": [], "rtx": False}
    return {"name": ".".join(path), "path": path, **rest}


def makes(node: ast.AnnAssign) -> bool:
    return node.value is not None and ast.unparse(node.value).startswith("Callable")


def member(item: ast.FunctionDef | ast.AnnAssign) -> str:
    return item.name if isinstance(item, ast.FunctionDef) else ast.unparse(item.target)


def class_of(protocol: str) -> str:
    return ENUMERATION if protocol == "Enumerator" else protocol.removeprefix("Rtx")


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


# --- the declarations and our source


def test_what_is_declared_is_called() -> None:
    attributes = {
        node.attr for path in USERS for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }
    hidden = {"__init__", "__int__"}
    assert {entry["path"][-1] for entry in declared()} - hidden <= attributes


def test_what_is_called_of_the_module_is_declared() -> None:
    """mypy sees to the rest, as long as nothing evades it."""
    declared_names = {entry["name"] for entry in declared()}
    for path in USERS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "trt":
                assert node.attr in declared_names, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                assert not names(node.args[0]) & {"trt", "builder", "config", "network", "engine", "context"}
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                assert path.name == "tensorrt_library.py", "only there a module gets its type"


def test_the_list_is_no_empty_one() -> None:
    calls = {entry["name"]: entry for entry in declared()}
    assert len(calls) == len(declared()) > 35
    assert calls["Builder.build_serialized_network"] == {
        "name": "Builder.build_serialized_network",
        "path": ["Builder", "build_serialized_network"],
        "kind": "method",
        "arguments": 2,
        "result": ["IHostMemory"],
        "rtx": False,
    }
    assert calls["OnnxParser.__init__"]["arguments"] == 2
    assert calls["Logger.__init__"]["arguments"] == 1
    assert calls["IBuilderConfig.num_compute_capabilities"]["kind"] == "setting"
    assert [name for name, entry in calls.items() if entry["rtx"]] == [
        "ComputeCapability.__members__",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
        "ComputeCapability",
    ]


def test_signatures_are_read() -> None:
    text = "index: typing.SupportsInt, pairs: dict[str, int] = {}, strategy: A = <A.STATIC: 0>"
    assert [part.partition(":")[0].strip() for part in split(text)] == ["index", "pairs", "strategy"]
    assert [takes(text, count) for count in range(5)] == [False, True, True, True, False]
    assert [takes("", count) for count in range(2)] == [True, False]


# --- the declarations and the bindings


def ask(module: str, calls: list[dict[str, Any]], environment: dict[str, str]) -> dict[str, Any]:
    """Return the version of a module and the problems with each call, from a process of its own."""
    command = [sys.executable, "-P", CHECKER, module]
    done = subprocess.run(
        command,
        input=json.dumps(calls),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The environment in which the bindings of each version import, linked to stubs."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stubs that the bindings of TensorRT are linked to")
    folder = tmp_path_factory.mktemp("bindings")
    return {version: environment(folder / version, compiler, *wheel) for version, wheel in BINDINGS.items()}


def environment(folder: Path, compiler: str, wheel: str, major: int) -> dict[str, str]:
    (folder / "stubs").mkdir(parents=True)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder]
    done = subprocess.run([*command, "--python-version", python, wheel], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{wheel} cannot be downloaded for Python {python}: the calls of TensorRT are not checked")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    source = folder / "stubs" / "stubs.c"
    source.write_text("".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for name in LIBRARIES:
        file = f"lib{name}.so.{major}"
        link = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", folder / "stubs" / file, source]
        subprocess.run(link, check=True)
    return {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / "stubs")}


@pytest.mark.slow
def test_every_call_exists_in_every_version(bindings: dict[str, dict[str, str]]) -> None:
    common = [entry for entry in declared() if not entry["rtx"]]
    kinds = [{**value("DataType", name), "name": f"DataType.{name}"} for name in tensorrt_engine.DTYPES]
    board = [value("get_plugin_registry"), *({**entry, "kind": "method", "result": []} for entry in REGISTRY)]
    found = {version: ask("tensorrt_bindings", [*common, *kinds, *board], env) for version, env in bindings.items()}
    assert [answer["version"].startswith(version) for version, answer in found.items()] == [True] * len(BINDINGS)
    if importlib.util.find_spec("tensorrt_rtx"):
        found["RTX"] = ask("tensorrt_rtx", [*declared(), *kinds], {})
    wrong = {(v, name): text for v, answer in found.items() for name, text in answer["problems"].items() if text}
    assert wrong == {}
    if "RTX" in found:
        versions = {version: answer["version"] for version, answer in found.items()}
        rows = table({f"{version} ({versions[version]})": answer["problems"] for version, answer in found.items()})
        text = "\n".join([PAGE.format(calls=len(rows) - 2), *rows, ""])
        assert is_current("tensorrt_api.md", text), f"run this test with {WRITE}=1"


def table(problems: dict[str, dict[str, str]]) -> list[str]:
    """Return call x version as lines of Markdown: yes, what is wrong, or nothing where it is not called."""
    calls = list(dict.fromkeys(name for answers in problems.values() for name in answers))
    rows = [[name, *(shown(answers.get(name)) for answers in problems.values())] for name in calls]
    head = ["call", *problems]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def shown(answer: str | None) -> str:
    return "not called" if answer is None else answer or "yes"


def value(*path: str) -> dict[str, Any]:
    return {"name": ".".join(path), "path": list(path), "kind": "value", "arguments": 0, "result": [], "rtx": False}


@pytest.mark.slow
def test_what_was_removed_is_noticed(bindings: dict[str, dict[str, str]]) -> None:
    """The flags that 11 took away, too few arguments and a wrong result: a check that never fails proves nothing."""
    method = {"kind": "method", "arguments": 1, "result": [], "rtx": False}
    calls = [
        value("BuilderFlag", "FP16"),
        {**method, "name": "too few", "path": ["Builder", "build_serialized_network"]},
        {**method, "name": "another", "path": ["Builder", "create_network"], "result": ["ICudaEngine"]},
        {**value("Builder", "num_DLA_cores"), "kind": "setting", "name": "read only"},
    ]
    old, new = (ask("tensorrt_bindings", calls, bindings[version])["problems"] for version in ("10.3", "11.4"))
    assert (old["BuilderFlag.FP16"], new["BuilderFlag.FP16"]) == ("", "there is no FP16")
    for answers in (old, new):
        assert answers["too few"].startswith("it does not take 1 arguments: ")
        assert answers["another"].startswith("it does not return ICudaEngine: create_network(self: ")
        assert answers["read only"] == "it cannot be set"


def test_the_stand_in_has_every_call(tmp_path: Path) -> None:
    """What runs in place of the library is no other library: all that is declared of the module and its classes."""
    shutil.copy(Path(__file__).with_name("standin_tensorrt.py"), tmp_path / "tensorrt.py")
    calls = [value(entry["path"][0]) for entry in declared() if not entry["rtx"] and not is_inner(entry)]
    answer = ask("tensorrt", calls, {"PYTHONPATH": str(tmp_path)})
    assert {name: text for name, text in answer["problems"].items() if text} == {}


def is_inner(entry: dict[str, Any]) -> bool:
    """Whether a class is only ever given by a call, so that the stand-in may name it as it likes."""
    return entry["path"][0].startswith("I")
