"""What is in the machine code of a kernel, read from its cubin: no disassembler comes with the packages of nvcc.

An instruction is 16 bytes, little-endian; its low 9 bits say what it is (bits 9 to 11 say whether an operand is a
register, a constant or an immediate). A branch has its distance, in words of 4 bytes from the next instruction, from
bit 34 on, of which sm_90 and later put the lowest 8 bits at bit 16. NVIDIA documents none of this: it was read off what
nvdisasm 13.5 prints for sm_80 to sm_120, and test_cuda_sass.py compares with nvdisasm where that is installed.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = {
    0x02: "MOV",
    0x07: "SEL",
    0x0C: "ISETP",
    0x10: "IADD3",
    0x11: "LEA",
    0x12: "LOP3",
    0x16: "PRMT",
    0x19: "SHF",
    0x35: "IADD",
    0x36: "VIADD",
    0x37: "IMMA",
    0x3C: "HMMA",
    0x143: "CALL",
    0x144: "CALL",
    0x147: "BRA",
    0x150: "RET",
    0x181: "LDG",
    0x183: "LDL",
    0x184: "LDS",
    0x187: "STL",
    0x1AE: "LDGSTS",
    0x1BA: "UBLKCP",
}
DECODE = ("PRMT", "LOP3", "SHF")
INTEGER = (*DECODE, "IADD3", "IADD", "VIADD", "ISETP", "SEL", "LEA")
"""What the integer pipe does; a move may go to another pipe as IMAD."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """Its name, "" for what we do not count, and where a branch goes."""

    name: str
    target: int = -1


def kernels(cubin: bytes) -> dict[str, list[Instruction]]:
    """Return the instructions of each kernel of a cubin, an ELF file with a section of code for each."""
    offset, size, count, names_at = struct.unpack_from("<40xQ10xHHH", cubin)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    names = headers[names_at][4]
    found = {}
    for header in headers:
        name = cubin[names + header[0] : cubin.index(b"\0", names + header[0])].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = _instructions(
                cubin[header[4] : header[4] + header[5]], _machine(cubin)
            )
    return found


def loops(code: Sequence[Instruction]) -> list[Counter[str]]:
    """Return the counts of the loops that multiply matrices, shortest first: what a backward branch jumps over."""
    bodies = [code[item.target : i + 1] for i, item in enumerate(code) if item.name == "BRA" and 0 <= item.target < i]
    counts = [Counter(item.name for item in body) for body in sorted(bodies, key=len)]
    return [count for count in counts if (count["HMMA"] or count["IMMA"]) and count["LDS"]]


def _machine(cubin: bytes) -> int:
    """Return the architecture, 90 for sm_90a: its place in the flags depends on the ABI (kernels/cuda/image.py)."""
    flags = int(struct.unpack_from("<I", cubin, 48)[0])
    return flags >> 8 & 255 if cubin[8] >= 8 else flags & 255


def _instructions(text: bytes, machine: int) -> list[Instruction]:
    found = []
    for at in range(0, len(text), 16):
        word = int.from_bytes(text[at : at + 16], "little")
        name = NAMES.get(word & 0x1FF, "")
        found.append(Instruction(name, (at + 16 + _distance(word, machine)) // 16 if name == "BRA" else -1))
    return found


def _distance(word: int, machine: int) -> int:
    high = word >> 34 & (1 << 48) - 1
    high -= (high >> 47) << 48
    return 4 * (high if machine < 90 else high << 8 | word >> 16 & 255)
