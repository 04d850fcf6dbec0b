"""Compiled GPU code, and what its first bytes tell: the architecture, and the generation of CUDA that can load it.

A cubin is an ELF file. Compilers of CUDA 12 write ABI 7 (OS/ABI 0x33), which drivers of CUDA 12 and 13 load; those of
CUDA 13 write ABI 8 (0x41), which only drivers of CUDA 13 load. JetPack 6 has a driver of CUDA 12. Read off cubins that
NVRTC 12.6 and 13.0 and nvcc 13.0 made for sm_80 to sm_120; NVIDIA documents the header nowhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MACHINE_CUDA = 190
"""`e_machine` of ELF files for CUDA."""
GENERATIONS = {(0x33, 7): 12, (0x41, 8): 13}
"""(OS/ABI, ABI version) of a cubin -> the CUDA major version whose compilers write it."""

SINGLE = "a"
"""The ending of an architecture whose code runs on that one only: sm_90a."""


class ImageError(ValueError):
    """These bytes are no GPU code that we know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a cubin says of itself: `capability` 90 for sm_90 and sm_90a; `generation` 12 or 13."""

    capability: int
    generation: int


def read_header(image: bytes) -> Header:
    """Read the head of a cubin; raise ImageError if it is none, or of a generation that this version does not know."""
    if image[:6] != b"\x7fELF\x02\x01" or int.from_bytes(image[18:20], "little") != MACHINE_CUDA:
        raise ImageError("this is no cubin: not a 64-bit ELF file for CUDA")
    abi = (image[7], image[8])
    if abi not in GENERATIONS:
        raise ImageError(f"a cubin of OS/ABI {abi[0]:#x}, version {abi[1]} is unknown to this version of paredown")
    generation = GENERATIONS[abi]
    flags = int.from_bytes(image[48:52], "little")
    return Header(capability=flags & 255 if generation == 12 else flags >> 8 & 255, generation=generation)


def capability(architecture: str) -> int:
    """Return 90 for "sm_90" and "sm_90a"."""
    found = re.fullmatch(r"sm_(\d{2,3})[af]?", architecture)
    if found is None:
        raise ValueError(f"{architecture!r} is no architecture; write sm_80, sm_90a, ..")
    return int(found[1])


def runs_on(architecture: str, device: int) -> bool:
    """Tell whether code for an architecture runs on a device of capability `device` (87 for an Orin).

    Code runs on later devices of the same major version, except that sm_90a and its like run on their own only, and
    that code for a graphics card is not promised to run on a Tegra (8.7, 11.0), nor the reverse.
    """
    made = capability(architecture)
    if architecture.endswith(SINGLE) or TEGRA & {made, device}:
        return made == device
    return made // 10 == device // 10 and made <= device


TEGRA = frozenset({72, 87, 101, 110})
