"""What pyproject.toml cannot say: the kernels are compiled while the package is built, and the wheel is named by them.

    CXX=aarch64-linux-gnu-g++    another compiler; the wheel is then for the machine that it compiles for
    PAREDOWN_KERNELS=required    an error, not a warning, where the kernels cannot be compiled ("off": do not try)
    PAREDOWN_OBJECTS=folder      where compiled files are kept for the next build, by default build/kernels
    PAREDOWN_CUBINS=1            compiled CUDA kernels too, by nvcc or NVRTC; an error where there is neither

Without a compiler the package is built all the same, for any platform: everything then runs on the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("paredown", "kernels")


def module(name: str) -> ModuleType:
    """Load a module of the kernels by its file: the package is not installed yet."""
    spec = importlib.util.spec_from_file_location(f"paredown_{name}", ROOT / "kernels" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


def cuda() -> ModuleType:
    """Load what compiles the CUDA kernels: a module of a package, which it imports from."""
    folder = ROOT / "kernels" / "cuda"
    spec = importlib.util.spec_from_file_location(
        "paredown_cuda", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules["paredown_cuda"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("paredown_cuda.cubins")


kernels, elf = module("build"), module("elf")


class BuildKernels(Command):
    """Compile the kernels into the package; in place where the project is installed to be edited."""

    command_name = "build_kernels"
    description = "compile the CPU kernels"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [("build-lib=", "b", "folder of the built package")]
    editable_mode = False
    build_lib = None

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        library = self.folder() / kernels.LIBRARY
        if not self.editable_mode:  # what an earlier build left, perhaps for another machine
            library.unlink(missing_ok=True)
            library.with_suffix(".json").unlink(missing_ok=True)
            shutil.rmtree(self.folder() / "cuda" / "cubin", ignore_errors=True)
        wanted = os.environ.get("PAREDOWN_KERNELS", "auto")
        if wanted not in ("auto", "required", "off"):
            raise SystemExit(f'PAREDOWN_KERNELS={wanted} is none of "auto", "required", "off"')
        if wanted != "off":
            self.compile(library, required=wanted == "required")
        if os.environ.get("PAREDOWN_CUBINS", "0") != "0":
            self.compile_cubins()

    def compile(self, library: Path, *, required: bool) -> None:
        try:
            kernels.build(library, objects=Path(os.environ.get("PAREDOWN_OBJECTS") or ROOT / "build" / "kernels"))
        except kernels.BuildError as error:
            if required:
                raise SystemExit(f"kernels not built: {error}") from error
            self.warn(f"kernels not built, all will run on the reference: {error}")

    def compile_cubins(self) -> None:
        cubins = cuda()
        try:
            cubins.build(self.folder() / "cuda" / "cubin")
        except cubins.CubinError as error:
            raise SystemExit(f"cubins not built: {error}") from error

    def folder(self) -> Path:
        return ROOT / "kernels" if self.editable_mode else Path(self.build_lib, PACKAGE)

    def made(self) -> list[str]:
        """Return what there is of what this command makes, relative to the package."""
        library, cubins = self.folder() / kernels.LIBRARY, self.folder() / "cuda" / "cubin"
        files = [library, library.with_suffix(".json"), *sorted(cubins.glob("*"))]
        return [path.relative_to(self.folder()).as_posix() for path in files if path.exists()]

    def get_source_files(self) -> list[str]:
        return ["kernels/build.py", "kernels/elf.py"]  # the rest is data of the package

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, PACKAGE, name)) for name in self.made()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        return {str(Path(self.build_lib, PACKAGE, name)): f"kernels/{name}" for name in self.made()}


class BdistWheel(bdist_wheel):
    """A wheel for any Python 3, and for the platforms that its library runs on."""

    command_name = "bdist_wheel"

    def get_tag(self) -> tuple[str, str, str]:
        library = self.library()
        if library is None or self.plat_name_supplied:
            return super().get_tag()
        return "py3", "none", elf.platform_tag(elf.read(library))

    def write_wheelfile(self, *arguments: object, **options: object) -> None:
        self.root_is_pure = self.library() is None
        super().write_wheelfile(*arguments, **options)

    def library(self) -> Path | None:
        path = Path(self.get_finalized_command("build").build_lib, PACKAGE, kernels.LIBRARY)
        return path if path.exists() else None


build.sub_commands = [*build.sub_commands, ("build_kernels", None)]
setup(cmdclass={"build_kernels": BuildKernels, "bdist_wheel": BdistWheel})
