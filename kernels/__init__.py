"""Kernels for weights that are stored as codes into a table, and what they compute in plain torch and plain ONNX."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ort_library"]


def ort_library() -> Path:
    """Return the library to give to `SessionOptions.register_custom_ops_library`; LibraryError where there is none."""
    from . import native

    return native.ort_library()
