"""Run an ONNX file in onnxruntime on the CPU."""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from ..kernels import native
from ..optimizer.errors import ExportError, InputError
from .onnx_session import session_options
from .runner import RunnerOptions

if TYPE_CHECKING:
    from ..optimizer.model import InputSpec

OPERATORS = re.compile(rb"Lut(Planes)?(Linear|Conv)|LutGather")
"""What `kernels/onnx_ops.py` calls the operators that the library has; that module imports torch."""
NUMPY_NAMES = {"float": "float32", "double": "float64"}
"""onnxruntime's names of types that numpy calls otherwise."""


class OnnxRunner:
    """An ONNX file in a session; `outputs` are the names that `run` returns, in the order of the file.

    name: "onnxruntime", and how packed layers run where the file has them: "with kernels" or "without kernels".
    """

    def __init__(self, session: onnxruntime.InferenceSession, name: str = "onnxruntime") -> None:
        self._session, self._name = session, name
        self._outputs = tuple(str(value.name) for value in session.get_outputs())

    @property
    def name(self) -> str:
        return self._name

    @property
    def inputs(self) -> Sequence[InputSpec]:
        from ..optimizer.model import InputSpec

        values = self._session.get_inputs()
        return tuple(InputSpec(name=value.name, shape=_shape(value), dtype=_dtype(value)) for value in values)

    @property
    def outputs(self) -> tuple[str, ...]:
        return self._outputs

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return one array per output; an InputError where the feeds do not fit the inputs."""
        try:
            values = self._session.run(None, feeds)
        except Exception as error:
            self._explain(feeds)
            raise ExportError(f"onnxruntime stopped: {_first_line(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def _explain(self, feeds: dict[str, np.ndarray]) -> None:
        """Raise the InputError that says which feed does not fit, if one does not."""
        known = {value.name: value for value in self._session.get_inputs()}
        if known.keys() != feeds.keys():
            have, want = ", ".join(sorted(feeds)) or "none", ", ".join(known)
            raise InputError(f"the file takes the inputs {want}", where=f"feeds {have}", fix="pass exactly those")
        for name, value in known.items():
            array, where = feeds[name], f'input "{name}"'
            if str(array.dtype) != _dtype(value):
                raise InputError(f"dtype {array.dtype} was fed, the file takes {_dtype(value)}", where=where)
            if not _fits(array.shape, _shape(value)):
                wanted = f"[{', '.join(map(str, _shape(value)))}]"
                raise InputError(f"shape {list(array.shape)} was fed, the file takes {wanted}", where=where)


def load(path: Path, options: RunnerOptions) -> OnnxRunner:
    """Return the file ready to run; ExportError if onnxruntime does not take it.

    exact: onnxruntime's kernels for low bits otherwise round activations to int8 (0.5 % error, onnxruntime 1.31).
    """
    packed = has_packed_layers(path)
    library = kernel_library() if packed and options.kernels else None
    settings = session_options(threads=options.threads, library=library)
    settings.log_severity_level = 4
    # Threads that spin after a run would slow down whatever alternates with this session in one process.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if options.exact:
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        if reason := _lacks(path):
            raise ExportError(reason, where=path.name, fix="keep both in one folder, or export it again") from error
        raise ExportError(
            f"onnxruntime does not load it: {_first_line(error)}",
            where=path.name,
            fix="bfloat16 and opsets above 25 need another runtime; else export it again",
        ) from error
    extra = f" {'with' if library else 'without'} kernels" if packed else ""
    return OnnxRunner(session, f"onnxruntime{extra}")


def has_packed_layers(path: Path) -> bool:
    """Return whether a file has operators that our library computes; it is not parsed, which would need onnx."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return OPERATORS.search(content) is not None


def kernel_library() -> Path | None:
    """Return our library for onnxruntime, None where it was not built."""
    return native.ort_library() if native.available() else None


def kernels() -> str:
    """Return the instruction sets of our kernels that this processor runs, "" where they were not built."""
    return ", ".join(native.isas()) if native.available() else ""


def weight_files(path: Path) -> list[Path]:
    """Return the files beside this one that hold its weights; an InputError where one is missing or too short."""
    if reason := _lacks(path):
        raise InputError(reason, where=path.name, fix="keep both in one folder, or export it again")
    return sorted({path.with_name(location) for location, _ in _weights_elsewhere(path)})


def _lacks(path: Path) -> str:
    """Return which file with weights of this one is missing or too short, "" where none is."""
    for location, end in _weights_elsewhere(path):
        beside = path.with_name(location)
        if not beside.is_file():
            return f"its weights are in {location}, which is missing"
        if beside.stat().st_size < end:
            return f"its weights are in {location}, which is incomplete"
    return ""


def _weights_elsewhere(path: Path) -> list[tuple[str, int]]:
    """Return the file of each tensor that is not in this one, and where in it the tensor ends."""
    import onnx  # takes memory that a process which runs a file does not need
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
    except Exception:  # it is no ONNX file at all, which onnxruntime says
        return []
    found = (ExternalDataInfo(tensor) for tensor in tensors if uses_external_data(tensor))
    return [(info.location, (info.offset or 0) + (info.length or 0)) for info in found]


def _dtype(value: onnxruntime.NodeArg) -> str:
    inner = str(value.type).removeprefix("tensor(").removesuffix(")")
    return NUMPY_NAMES.get(inner, inner)


def _shape(value: onnxruntime.NodeArg) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size or f"dim_{i}") for i, size in enumerate(value.shape))


def _fits(have: tuple[int, ...], want: tuple[int | str, ...]) -> bool:
    if len(have) != len(want):
        return False
    return all(isinstance(wanted, str) or size == wanted for size, wanted in zip(have, want, strict=True))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].removeprefix("[ONNXRuntimeError] : ") if lines else type(error).__name__
