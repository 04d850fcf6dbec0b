"""Options of onnxruntime sessions, with our library of kernels registered."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from ..kernels import native
from ..optimizer.errors import RuntimeMissingError


def session_options(*, threads: int = 0, library: Path | None = None) -> onnxruntime.SessionOptions:
    """Return options with this many threads (0 = onnxruntime's default) and the operators of `library` registered.

    library: what `paredown.kernels.ort_library()` returns. None: operators run as their portable bodies. Registering
    takes some milliseconds of every session (7 ms in onnxruntime 1.31.1 on a Zen 5), so a file without our operators
    needs none.
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    if library is not None:
        if library == native.LIBRARY and (reason := native.problem()):
            raise RuntimeMissingError(reason, fix="or run without kernels")
        try:
            settings.register_custom_ops_library(str(library))
        except Exception as error:
            raise RuntimeMissingError(
                f"onnxruntime {onnxruntime.__version__} does not load it: {str(error).splitlines()[0]}",
                where=library.name,
                fix="build it again for this machine, or run without kernels",
            ) from error
    return settings
