"""Which TensorRT is installed: the full library or TensorRT-RTX, of which version, and what it can do here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from ..kernels.cuda import driver
from ..optimizer.errors import ExportError, RecipeError, RuntimeMissingError, nearest
from .tensorrt_api import RtxTensorRT, TensorRT

Name: TypeAlias = Literal["tensorrt", "rtx"]
MODULES: dict[Name, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
TITLES: dict[Name, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
VERSIONS: dict[Name, tuple[tuple[int, int], tuple[int, int]]] = {
    "tensorrt": ((10, 3), (12, 0)),
    "rtx": ((1, 7), (2, 0)),
}
"""The first version that is used of each, and the first that is not."""
INSTALL: dict[Name, str] = {
    "tensorrt": "pip install 'paredown[tensorrt]'; a Jetson has it with JetPack, for virtual environments made with "
    "--system-site-packages",
    "rtx": "pip install 'paredown[rtx]'",
}
NO_GPU = "there is no GPU here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An installed library that this package can use; `module` is what it is imported as."""

    name: Name
    version: str

    @property
    def module(self) -> str:
        return MODULES[self.name]

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]} {self.version}"


def find(name: str = "") -> Library:
    """Return the library of that name; without one the full library, else TensorRT-RTX.

    RuntimeMissingError, with how to install it, where there is none; ExportError for a version that is not supported.
    """
    if name:
        chosen = _named(name)
        found = _installed(chosen)
        if found is None:
            raise RuntimeMissingError(f"{TITLES[chosen]} is not installed", fix=INSTALL[chosen])
        return _checked(found)
    for candidate in MODULES:
        found = _installed(candidate)
        if found is not None:
            return _checked(found)
    fix = "; or ".join(INSTALL[candidate] for candidate in reversed(MODULES))
    raise RuntimeMissingError("neither TensorRT nor TensorRT-RTX is installed", fix=fix)


def module(name: Name) -> TensorRT:
    """Import a library; ImportError where it is not there or does not load."""
    return cast(TensorRT, importlib.import_module(MODULES[name]))


def rtx_module() -> RtxTensorRT:
    return cast(RtxTensorRT, importlib.import_module(MODULES["rtx"]))


def embeds_plugins() -> bool:
    """Whether the full library has `tensorrt.plugin` with ahead-of-time plugins."""
    try:
        return hasattr(importlib.import_module("tensorrt.plugin"), "aot_impl")
    except ImportError:
        return False


def capability() -> str:
    """Return the compute capability of the first GPU, "8.7" for an Orin; "" where there is none."""
    try:
        return _dotted(driver.capability(0)) if driver.device_count() else ""
    except driver.CudaError:
        return ""


def capabilities() -> tuple[str, ...]:
    """Return the compute capabilities that TensorRT-RTX builds engines for, "8.6" and so on."""
    names = [name.removeprefix("SM") for name in rtx_module().ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(_dotted(number) for number in sorted(map(int, names)))


def examine() -> list[str]:
    """Return lines for `optimize doctor`, each marked "ok" or "--": what is installed and what it can do here."""
    return [_line(name) for name in MODULES]


def _line(name: Name) -> str:
    try:
        found = _installed(name)
        if found is None:
            return f"--  {TITLES[name]}: not installed; {INSTALL[name]}"
        _checked(found)
    except (ExportError, RuntimeMissingError) as error:
        return f"--  {error}"
    here = capability()
    runs = f"runs them on this GPU ({here})" if here else f"runs none, {NO_GPU}"
    if name == "rtx":
        return f"ok  {found.title}: builds engines for {', '.join(capabilities())}, with or without a GPU; {runs}"
    if not here:
        return f"--  {found.title}: builds and runs engines on the GPU that they are for, and {NO_GPU}"
    return f"ok  {found.title}: builds engines for this GPU ({here}) and {runs}"


def _named(name: str) -> Name:
    for known in MODULES:
        if name == known:
            return known
    raise RecipeError(f'there is no TensorRT library "{name}"', where="--library", fix=nearest(name, MODULES))


def _installed(name: Name) -> Library | None:
    """Return a library that imports; RuntimeMissingError for one that is there and does not load."""
    try:
        return Library(name=name, version=str(module(name).__version__))
    except ModuleNotFoundError as error:
        if error.name == MODULES[name]:
            return None
        raise RuntimeMissingError(f"{TITLES[name]} does not load: {error}", fix=INSTALL[name]) from error
    except (ImportError, OSError, AttributeError) as error:
        raise RuntimeMissingError(f"{TITLES[name]} does not load: {error}", fix=INSTALL[name]) from error


def _checked(library: Library) -> Library:
    first, last = VERSIONS[library.name]
    numbers = tuple(int(part) for part in library.version.split(".")[:2] if part.isdigit())
    if not first <= numbers < last:
        raise ExportError(
            f"{library.title} is installed, this version of paredown builds with "
            f"{'.'.join(map(str, first))} and later, below {last[0]}",
            fix=f"{INSTALL[library.name]} in a version of that range, or name the other with --library",
        )
    return library


def _dotted(number: int) -> str:
    return f"{number // 10}.{number % 10}"
