"""What a board calls of TensorRT besides this package, against the bindings of each version: the ahead-of-time plugin
by the real `tensorrt.plugin`, up to the start of its kernel, and the registry of compiled plugins.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paredown.exporters.board import plugin_aot, run
from paredown.kernels.lut_spec import LutSpec
from paredown.kernels.tensorrt import node

from .test_tensorrt_api import BINDINGS, REGISTRY, declared, environment

HERE = Path(__file__).resolve().parent
BOARD = Path(plugin_aot.__file__).parent
SPEC = LutSpec(n=300, k=64, bits=4, zero=128.0, unit=0.01)
TOLD = node.attributes(SPEC, "f16b", 1, node.Epilogue(biased=True, activation="relu"))
EMBEDDING = ("10.16", "11.4")
"""Versions whose bindings have `tensorrt.plugin`."""


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The environment in which the bindings of each version import, linked to stubs."""
    folder = tmp_path_factory.mktemp("bindings")
    return {version: environment(folder / version, "gcc", *wheel) for version, wheel in BINDINGS.items()}


def asked(folder: Path, bindings: dict[str, str], shape: list[int]) -> dict[str, Any]:
    command = [sys.executable, HERE / "aot_stubbed.py", BOARD, folder]
    given = json.dumps({"attributes": TOLD, "x": shape})
    done = subprocess.run(command, input=given, env=bindings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", EMBEDDING)
@pytest.mark.parametrize(("shape", "m"), [([1, 64], 1), ([3, 11, 64], 33)])
def test_the_plugin_is_what_tensorrt_takes(
    bindings: dict[str, dict[str, str]], tmp_path: Path, version: str, shape: list[int], m: int
) -> None:
    name = "paredown_bucket_f16b_b4"
    (tmp_path / f"{name}.ptx").write_text("PTX of the kernel")
    found = asked(tmp_path, bindings[version], shape)
    assert found["version"].startswith(version)
    assert found["inputs"] == list(plugin_aot.INPUTS)
    assert found["attributes"] == list(plugin_aot.ATTRIBUTES)
    assert (found["outputs"], found["y"], found["dtype"]) == (1, [*shape[:-1], 300], "HALF")
    assert (found["name"], found["image"]) == (name, "PTX of the kernel")
    assert (found["grid"], found["block"]) == ([19, -(-m // 32), 1], [256, 1, 1])
    assert found["shared"] == node.shared(SPEC, "f16b")
    assert found["numbers"] == [m if name == "m" else TOLD[name] for name in plugin_aot.NUMBERS]


def test_a_board_calls_what_is_declared() -> None:
    """Every attribute of TensorRT's objects in run.py is one that the exporter calls too, or one of the registry."""
    known = {entry["path"][-1] for entry in declared()} | {"get_plugin_registry"}
    known |= {str(entry["path"][-1]) for entry in REGISTRY}
    known |= {entry["path"][0] for entry in declared()}
    objects = {"trt", "builder", "network", "parser", "config", "profile", "registry", "error", "_runtime"}
    objects |= {"_engine", "_context", "logger"}
    used = {
        found.attr
        for found in ast.walk(ast.parse(Path(run.__file__).read_text()))
        if isinstance(found, ast.Attribute) and ast.unparse(found.value).rpartition(".")[2] in objects
    }
    assert used - known - {"code", "name"} == set()
    assert len(used) > 25
