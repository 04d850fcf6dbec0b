"""What a shared library (ELF, 64 bits) asks of a machine: its processor, other libraries, versions of their symbols.

From it follows the platform tag that a wheel may honestly carry. Like build.py this file imports nothing of the
package.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MACHINES = {62: "x86_64", 183: "aarch64"}
SYMBOLS, DYNAMIC, NEEDS, VERSIONS = 11, 6, 0x6FFFFFFE, 0x6FFFFFFF
"""Types of sections: dynamic symbols, dynamic entries, versions needed, version of each symbol (System V ABI)."""
NEEDED = 1
"""The tag of a dynamic entry that names a library."""

PERMITTED = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|mvec)\.so\.\d+|ld-linux-[\w-]+\.so\.\d")
POLICIES: tuple[tuple[str, dict[str, tuple[int, ...]]], ...] = (
    ("2_17", {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7), "GCC": (4, 8, 0)}),
    ("2_24", {"GLIBC": (2, 24), "GLIBCXX": (3, 4, 22), "CXXABI": (1, 3, 10), "GCC": (4, 8, 0)}),
    ("2_27", {"GLIBC": (2, 27), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}),
    ("2_28", {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}),
    ("2_31", {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (7, 0, 0)}),
    ("2_34", {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0, 0)}),
    ("2_35", {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}),
    ("2_36", {"GLIBC": (2, 36), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}),
    ("2_38", {"GLIBC": (2, 38), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}),
    ("2_39", {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)}),
    ("2_41", {"GLIBC": (2, 41), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)}),
)
"""manylinux policies (PEP 600): the newest versions of symbols that each allows, as auditwheel 6 lists them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbol:
    """A dynamic symbol: whether it is defined here, and the version that it needs ("" = none)."""

    name: str
    defined: bool
    weak: bool
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLibrary:
    """The machine that a library runs on, the libraries it loads, and its dynamic symbols."""

    machine: str
    needed: tuple[str, ...]
    symbols: tuple[Symbol, ...]

    @property
    def exported(self) -> frozenset[str]:
        return frozenset(symbol.name for symbol in self.symbols if symbol.defined)

    @property
    def undefined(self) -> dict[str, str]:
        """Return what another library must bring, with its version; a weak symbol may stay absent."""
        return {symbol.name: symbol.version for symbol in self.symbols if not symbol.defined and not symbol.weak}

    @property
    def newest(self) -> dict[str, tuple[int, ...]]:
        """Return the newest version that is asked for of each family: {"GLIBC": (2, 34), ...}."""
        newest: dict[str, tuple[int, ...]] = {}
        for version in {symbol.version for symbol in self.symbols if symbol.version and not symbol.defined}:
            family, _, digits = version.partition("_")
            number = tuple(int(part) for part in digits.split(".")) if re.fullmatch(r"[\d.]+", digits) else (10**6,)
            newest[family] = max(newest.get(family, ()), number)
        return newest


@dataclass(frozen=True, slots=True)
class Section:
    """A section header: what it is, where it is in the file, and the section that it refers to."""

    kind: int
    offset: int
    size: int
    link: int


def read(path: Path) -> SharedLibrary:
    """Read a shared library; raise ValueError for a file that is no 64-bit little-endian ELF."""
    raw = path.read_bytes()
    if raw[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path.name} is no 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", raw, 18)
    sections = list(_sections(raw))
    return SharedLibrary(
        machine=MACHINES.get(machine, str(machine)),
        needed=tuple(_needed(raw, sections)),
        symbols=tuple(_symbols(raw, sections)),
    )


def platform_tag(library: SharedLibrary) -> str:
    """Return the tag of a wheel that holds this library: the oldest manylinux that allows it, else plain linux."""
    if all(PERMITTED.fullmatch(name) for name in library.needed):
        for policy, limits in POLICIES:
            if all(number <= limits.get(family, ()) for family, number in library.newest.items()):
                return f"manylinux_{policy}_{library.machine}"
    return f"linux_{library.machine}"


def _sections(raw: bytes) -> Iterator[Section]:
    (start,) = struct.unpack_from("<Q", raw, 40)
    size, count = struct.unpack_from("<HH", raw, 58)
    for i in range(count):
        _, kind, _, _, offset, length, link = struct.unpack_from("<IIQQQQI", raw, start + i * size)
        yield Section(kind, offset, length, link)


def _of(sections: list[Section], kind: int) -> Iterator[Section]:
    return (section for section in sections if section.kind == kind)


def _text(raw: bytes, table: Section, place: int) -> str:
    start = table.offset + place
    return raw[start : raw.index(b"\0", start)].decode()


def _needed(raw: bytes, sections: list[Section]) -> Iterator[str]:
    for section in _of(sections, DYNAMIC):
        for tag, value in struct.iter_unpack("<qQ", raw[section.offset : section.offset + section.size]):
            if tag == NEEDED:
                yield _text(raw, sections[section.link], value)


def _symbols(raw: bytes, sections: list[Section]) -> Iterator[Symbol]:
    versions = dict(_versions(raw, sections))
    indices = [
        i for s in _of(sections, VERSIONS) for (i,) in struct.iter_unpack("<H", raw[s.offset : s.offset + s.size])
    ]
    for section in _of(sections, SYMBOLS):
        entries = struct.iter_unpack("<IBBHQQ", raw[section.offset : section.offset + section.size])
        for i, (name, info, _, where, _, _) in enumerate(entries):
            if i:  # the first one is empty
                version = versions.get(indices[i] & 0x7FFF, "") if indices else ""
                text = _text(raw, sections[section.link], name)
                yield Symbol(name=text, defined=bool(where), weak=info >> 4 == 2, version=version)


def _versions(raw: bytes, sections: list[Section]) -> Iterator[tuple[int, str]]:
    """Yield (index, version) of each version that is needed: Elf64_Verneed and its chain of Elf64_Vernaux."""
    for section in _of(sections, NEEDS):
        at, more = section.offset, section.size > 0
        while more:
            _, count, _, first, step = struct.unpack_from("<HHIII", raw, at)
            place = at + first
            for _ in range(count):
                _, _, index, name, ahead = struct.unpack_from("<IHHII", raw, place)
                yield index & 0x7FFF, _text(raw, sections[section.link], name)
                place += ahead
            at, more = at + step, step > 0
