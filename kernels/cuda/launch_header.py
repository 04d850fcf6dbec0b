"""What the operators for onnxruntime must know of the CUDA kernels, written as a C++ header: names, forms, arguments.

    python -m paredown.kernels.cuda.launch_header

`launch` stays the one description; tests/kernels/test_ort_cuda.py finds a header that lags behind it. The header also
names the sources of each unit by their digest, so that the library loads no kernels that were made of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from . import cubins, image, launch, sources, units

PATH = Path(__file__).resolve().parent.parent / "ort" / "cuda_launch.h"
HEAD = """\
/* Names, forms and arguments of the CUDA kernels, and the digests of their sources.
 *
 * kernels/cuda/launch_header.py writes this file: change launch.py or the sources, then run
 * python -m paredown.kernels.cuda.launch_header.
 */
#ifndef PAREDOWN_ORT_CUDA_LAUNCH_H
#define PAREDOWN_ORT_CUDA_LAUNCH_H

#include "cuda_driver.h"

namespace paredown::ort::cuda {
"""
TAIL = """\
}  // namespace paredown::ort::cuda

#endif
"""


def text() -> str:
    """Return the header as it should be."""
    parts = (_constants(), _forms(), _units(), *(_arguments(name) for name in launch.ARGUMENTS))
    return "\n".join((HEAD, *parts, TAIL))


def _constants() -> str:
    return (
        f"constexpr int kThreads = {launch.THREADS}, kWarps = {launch.WARPS}, kGemvMost = {launch.GEMV_M};\n"
        f"constexpr int kTegra[] = {{{', '.join(map(str, sorted(image.TEGRA)))}}};\n"
        f"constexpr char kSingle = '{image.SINGLE}';\nconstexpr char kVirtual[] = \"{cubins.VIRTUAL}\";\n"
    )


def _forms() -> str:
    lines = [
        f'    {{"{form.name}", {form.rows}, {form.tokens}, {str(form in launch.TILES).lower()}}},'
        for form in launch.FORMS
    ]
    fields = "struct Form {\n  const char *name;\n  int rows, tokens;\n  bool tile;\n};"
    return "\n".join((fields, "constexpr Form kForms[] = {", *lines, "};", ""))


def _units() -> str:
    """Return the units, with the shared memory of each form in the order of `kForms`."""
    kinds = ", ".join(f"k{kind.capitalize()}" for kind in launch.KINDS)
    lines = [
        f'    {{k{kind.capitalize()}, {bits}, "{kind}", "{unit}",\n     "{_digest(unit)}",\n     '
        f"{{{', '.join(str(launch.shared(form, bits, cast(launch.Kind, kind))) for form in launch.FORMS)}}}}},"
        for kind, bits in sources.LINEAR
        for unit in (sources.unit_of(kind, bits),)
    ]
    prepare = launch.reduce(1, 1).unit
    fields = (
        f"enum Kind {{ {kinds} }};\n"
        "struct Unit {\n  Kind kind;\n  int bits;\n  const char *kind_name, *file, *digest;\n"
        f"  unsigned shared[{len(launch.FORMS)}];\n}};"
    )
    last = f'constexpr Unit kPrepare = {{kF16, 0, "", "{prepare}",\n    "{_digest(prepare)}", {{}}}};'
    return "\n".join((fields, "constexpr Unit kUnits[] = {", *lines, "};", last, ""))


def _arguments(kernel: str) -> str:
    names = launch.ARGUMENTS[kernel]
    return f"struct {kernel.capitalize()}Arguments {{\n{_wrapped(names)}\n}};\n"


def _wrapped(names: Sequence[str], width: int = 110) -> str:
    """Return members that are all an Argument, in lines of at most `width`."""
    lines, line = [], "  Argument"
    for i, name in enumerate(names):
        added = f" {name}" + ("," if i + 1 < len(names) else ";")
        if len(line) + len(added) > width:
            lines.append(line)
            line = "     "
        line += added
    return "\n".join((*lines, line))


def _digest(unit: str) -> str:
    return units.digest(units.read(unit))


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
