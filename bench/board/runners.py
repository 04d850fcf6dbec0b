"""What runs an artifact on a board: a session of onnxruntime, or the engine of a bundle by the bundle's own run.py."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

USAGE, MISSING, FAILED, NO_RUNTIME = 2, 3, 6, 7
BUILD_SECONDS = 3600


class BoardError(Exception):
    """What was wrong and what to do, with the exit code."""

    def __init__(self, code: int, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.code, self.fix = code, fix


def open_runner(artifact: dict[str, Any], threads: int, library: str) -> Any:
    """Return the artifact ready to run: `name`, `run(feeds)`, `details(feeds)`. library: path of our kernels or ""."""
    if artifact["kind"] == "bundle":
        return Bundle(Path(artifact["path"]), artifact["plugin"])
    return Onnx(artifact, threads, library)


class Onnx:
    """A file in a session with the options of a local run (`exporters/onnx_runner.py`)."""

    def __init__(self, artifact: dict[str, Any], threads: int, library: str) -> None:
        runtime = _import("onnxruntime")
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        settings.log_severity_level = 4
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if artifact["exact"]:
            settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        if artifact["packed"] and library:
            settings.register_custom_ops_library(library)
        try:
            self._session = runtime.InferenceSession(artifact["path"], settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            what = f"onnxruntime {runtime.__version__} on the board does not load {artifact['name']}: {_line(error)}"
            raise BoardError(FAILED, what, "install a newer onnxruntime there, or export it again") from error
        extra = (" with kernels" if library else " without kernels") if artifact["packed"] else ""
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.name, self._artifact = f"onnxruntime{extra}", artifact["name"]

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._outputs, self._session.run(None, feeds)))  # noqa: B905

    def details(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run once: what fails, fails before anything is timed."""
        try:
            self.run(feeds)
        except Exception as error:
            raise BoardError(FAILED, f"{self._artifact} does not run on the board: {_line(error)}") from error
        return {}


class Bundle:
    """The engine of a bundle, built on the board where there is none that fits; times include transfers."""

    RUNS = 50

    def __init__(self, folder: Path, plugin: str) -> None:
        found = importlib.util.spec_from_file_location(f"bundle_{folder.name}", folder / "run.py")
        assert found is not None
        assert found.loader is not None
        self._module: Any = importlib.util.module_from_spec(found)
        found.loader.exec_module(self._module)
        try:
            self._engine = self._open(folder, plugin)
        except self._module.BoardError as error:
            raise BoardError(error.code, str(error)) from error
        self.name = "tensorrt" + (f" {plugin}" if plugin else "")

    def _open(self, folder: Path, plugin: str) -> Any:
        settings = self._module.read_settings()
        self._module.load_tensorrt(settings)
        try:
            return self._module.Engine(plugin, settings)
        except self._module.BoardError as error:
            if error.code != MISSING:
                raise
        build(folder, plugin)
        return self._module.Engine(plugin, settings)

    def run(self, feeds: dict[str, Any]) -> object:
        return self._engine.run(feeds)

    def details(self, feeds: dict[str, Any]) -> dict[str, Any]:
        """Return the latency without transfers, by the clock of the host around the launch and the wait."""
        try:
            seconds = sorted(self._engine.timed(feeds)[1] for _ in range(self.RUNS))
        except self._module.BoardError as error:
            raise BoardError(error.code, str(error)) from error
        return {"latency_ms_p50_without_transfers": 1e3 * seconds[self.RUNS // 2]}


def build(folder: Path, plugin: str) -> None:
    """Build the engine of a bundle by its own script, whose last line says what is wrong."""
    command = ["bash", "build.sh"] + ([plugin] if plugin else [])
    done = subprocess.run(
        command, cwd=str(folder), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_SECONDS
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        code = done.returncode if done.returncode in (USAGE, MISSING, FAILED, NO_RUNTIME) else FAILED
        raise BoardError(code, f"the engine was not built on the board: {said[-1]}")


def check_library(path: str) -> str:
    """Return why onnxruntime does not take our library here, "" where it does."""
    settings = _import("onnxruntime").SessionOptions()
    try:
        settings.register_custom_ops_library(path)
    except Exception as error:
        return _line(error)
    return ""


def _import(name: str) -> Any:
    """Import a runtime, which may be installed and broken."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        fix = f"run python3 -m pip install {name} there"
        raise BoardError(NO_RUNTIME, f"{name} does not load on the board: {_line(error)}", fix) from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
