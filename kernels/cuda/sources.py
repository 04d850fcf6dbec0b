"""What is compiled for NVIDIA GPUs: the translation units of the CUDA kernels, their flags and their architectures."""

from __future__ import annotations

ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_110", "sm_120")
"""A100, RTX 30, Jetson Orin, RTX 40 and L4, H100 and H200, Jetson Thor, RTX 50."""

FLAGS = ("-std=c++17",)
"""Flags that nvcc and NVRTC both take. Rounding stays exact: no fast math."""

LINEAR = (*((kind, bits) for kind in ("f16", "bf16", "s8") for bits in (2, 3, 4)), ("f16b", 4))
"""(kind, bits) of the linear kernels; `launch.KINDS` says what a kind is. One unit each, of the same kernels."""

UNITS = (*(f"linear_{kind}_{bits}.cu" for kind, bits in LINEAR), "prepare.cu")
"""Files of this folder; each is compiled alone, so that a GPU without cubins compiles only what it runs."""


def unit_of(kind: str, bits: int) -> str:
    """Return the unit that has the linear kernels of a kind and width."""
    return f"linear_{kind}_{bits}.cu"
