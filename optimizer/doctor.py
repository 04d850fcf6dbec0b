"""`optimize doctor`: what is here, what works on it, and how to mend what does not. Nothing is changed."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from ..kernels import build, native
from ..kernels.cuda import state
from .errors import RuntimeMissingError

NEEDED = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy", "safetensors")
EXTRAS = {
    "scikit-learn": "optimize demo needs it: pip install 'paredown[demo]'",
    "transformers": "Hugging Face folders need it: pip install 'paredown[hf]'",
}
AGAIN = "pip install it again (-v shows what the compiler says; PAREDOWN_KERNELS=required makes it an error)"


def examine(register: Callable[[Path], object]) -> list[str]:
    """Return lines to print: machine, packages, kernels, what is missing and what this version does not do.

    `register` loads the library of kernels into onnxruntime, and raises RuntimeMissingError where that fails.
    """
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    ]
    lines += [f"{'ok' if _version(name) else 'MISSING'}  {name} {_version(name)}".rstrip() for name in NEEDED]
    lines += [f"{'ok' if _version(name) else '--'}  {name} {_version(name) or why}" for name, why in EXTRAS.items()]
    return [*lines, *_compiler(), *_kernels(register), *state.examine()]


def _compiler() -> list[str]:
    try:
        tools = build.toolchain(build.find_compiler())
    except build.BuildError as error:
        return [f"--  C++ compiler: {error}"]
    return [f"ok  C++ compiler: {tools.version}, for {tools.machine}"]


def _kernels(register: Callable[[Path], object]) -> list[str]:
    """Return what the library was made of, what of it runs here, and whether onnxruntime takes it."""
    if not native.LIBRARY.exists():
        mend = AGAIN if build.find_compiler() else f"install a C++ compiler, then {AGAIN}"
        return [f"--  CPU kernels: not built, so that all runs on the reference, slowly and in more memory; {mend}"]
    lines = [*_contents(), *_in_use()]
    try:
        register(native.LIBRARY)
    except RuntimeMissingError as error:
        return [*lines, f"--  CPU kernels in onnxruntime: {error}"]
    return [*lines, f"ok  CPU kernels in onnxruntime {_version('onnxruntime')}: their operators load"]


def _contents() -> list[str]:
    made_of = build.record(native.LIBRARY)
    if made_of is None:
        return [f"--  CPU kernels: {native.LIBRARY.name} has no record of its making; {AGAIN}"]
    lines = [f"ok  CPU kernels: {', '.join(made_of.isas)} for {made_of.machine}, by {made_of.compiler}"]
    lines += [f"--  CPU kernels without {name}: {why}" for name, why in made_of.left_out.items()]
    if made_of.sources != build.sources_digest():
        lines.append(f"--  CPU kernels: the sources have changed since; {AGAIN}")
    return lines


def _in_use() -> list[str]:
    if reason := native.problem():
        return [f"--  CPU kernels: {reason}"]
    try:
        return [f"ok  CPU kernels on this processor: {native.isa()} in use, of {', '.join(native.isas())}"]
    except AttributeError as error:  # a library of other sources, which lacks a function
        return [f"--  CPU kernels: {error}; {AGAIN}"]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
