"""`optimize doctor`: what is here, what works on it, and how to mend what does not. Nothing is changed."""

from __future__ import annotations

import os
import platform
from importlib import metadata

NEEDED = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "scipy", "safetensors")
EXTRAS = {
    "scikit-learn": "optimize demo needs it: pip install 'paredown[demo]'",
    "transformers": "Hugging Face folders need it: pip install 'paredown[hf]'",
    "tensorrt": "TensorRT engines are not built by this version",
}


def examine() -> list[str]:
    """Return lines to print: machine, packages, what is missing and what this version does not do."""
    lines = [
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    ]
    lines += [f"{'ok' if _version(name) else 'MISSING'}  {name} {_version(name)}".rstrip() for name in NEEDED]
    lines += [f"{'ok' if _version(name) else '--'}  {name} {_version(name) or why}" for name, why in EXTRAS.items()]
    lines.append("--  low-bit kernels: none in this version; codebooks are decoded to floats when a file is loaded")
    return lines


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
