"""Compile the kernel that a plugin embeds into an engine to PTX, which the driver compiles for its GPU."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from ..cuda import cubins, launch, nvrtc, units
from ..cuda.sources import FLAGS
from . import node


def ptx(kind: launch.Kind, bits: int) -> bytes:
    """Return the kernel of a kind and width; CubinError where there is no compiler, or it refuses the source."""
    available = cubins.compilers()
    if not available:
        what = f"{cubins.VIRTUAL} needs a CUDA compiler"
        raise cubins.CubinError(f"{what}; put nvcc on the path, or pip install nvidia-cuda-nvrtc")
    compiler = cubins.compiler_for(cubins.VIRTUAL, available)
    source = units.read(f"../{node.BUCKET}")
    defined = {"KIND": node.CLASSES[kind], "NAME": kind, "BITS": str(bits)}
    text = "".join(f"#define PAREDOWN_{name} {value}\n" for name, value in defined.items()) + source.text
    if isinstance(compiler, cubins.Nvcc):
        return _run_nvcc(compiler, text)
    made = nvrtc.Source(name=Path(node.BUCKET).name, text=text, headers=source.headers)
    try:
        return nvrtc.compile_ptx(made, cubins.VIRTUAL, FLAGS, compiler)
    except nvrtc.NvrtcError as error:
        raise cubins.CubinError(str(error)) from error


def _run_nvcc(compiler: cubins.Nvcc, text: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "bucket.cu"), Path(folder, "bucket.ptx")
        source.write_text(text, encoding="utf-8")
        command = [compiler.path, "-ptx", f"-arch={cubins.VIRTUAL}", *FLAGS, f"-I{node.KERNELS / 'tensorrt'}"]
        done = subprocess.run([*command, "-o", made, source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise cubins.CubinError(f"nvcc does not compile {node.BUCKET}:\n{(done.stderr or done.stdout).strip()}")
        return made.read_bytes()
