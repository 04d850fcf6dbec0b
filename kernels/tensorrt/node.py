"""The operator `LutLinearMma16` that a graph for TensorRT has where a plugin multiplies by codes.

    LutLinearMma16(codes, table, scale, x, x_scale, bias, low, low_x) -> act(x W^T + low_x low^T + bias)

Inputs are those of the kernels (`launch.INPUTS`), in their order. x, bias, low, low_x and y are of one type, float16 or
bfloat16. codes, table and scale are words of int32: TensorRT takes no bytes without a sign, and would convert floats.
low is (n, rank) with zeros up to whole 32 columns. What is not there (x_scale always) is one number.

Attributes are int32, named and numbered as the arguments of the kernels in `cuda/launch.py`, so that a plugin need know
nothing else. None of these kernels was ever executed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor
from torch.nn import functional

from .. import layout_mma16
from ..cuda import launch, tables
from ..lut_spec import ACTIVATIONS, Activation, LutSpec

OP, NAMESPACE = "LutLinearMma16", "paredown"
KERNELS = Path(__file__).resolve().parent.parent
SOURCES = ("tensorrt/plugin.cpp", *(f"ort/cuda_{name}.cpp" for name in ("device", "driver", "image", "plan")))
HEADERS = ("cpu/paredown.h", *(f"ort/cuda_{name}.h" for name in ("device", "driver", "image", "launch", "plan")))
"""What the C++ plugin is compiled of, in KERNELS, by a C++17 compiler; it is linked to the CUDA runtime alone."""
WORDS = ("codes", "table", "scale")
"""Inputs that are words of int32."""
NUMBERS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
"""Types as cpu/paredown.h numbers them."""
BUCKET = "tensorrt/bucket.cu"
"""One kernel for all batch sizes, which an ahead-of-time plugin embeds into the engine."""
BUCKETS = (launch.GEMVS[0], launch.GEMVS[1], launch.TILES[0])
"""The forms in it: up to 8 rows of x, up to 16, more. None takes more shared memory than a kernel may unasked."""
CLASSES = {"f16": "KindF16", "f16b": "KindF16B", "bf16": "KindBF16"}
"""Kind -> what it is compiled with as PAREDOWN_KIND."""
KINDS = tuple(launch.KINDS)
"""Attribute `kind` -> name, as `Kind` of ort/cuda_launch.h counts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """A weight as words of int32, and the type of its scales."""

    codes: Int32[Tensor, "code_words"]
    table: Int32[Tensor, "table_words"]
    scale: Int32[Tensor, "scale_words"]
    scale_type: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Epilogue:
    """What follows a product: whether a bias, of what rank the low-rank term is (0: none), the activation."""

    biased: bool = False
    rank: int = 0
    activation: Activation = ""


def refusal(spec: LutSpec, dtype: torch.dtype, table: torch.dtype) -> str:
    """Return "" if a plugin multiplies inputs of a type by such a weight, else the reason."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernels multiply float16 and bfloat16 exactly, not {dtype}".replace("torch.", "")
    if launch.kind_of(spec, table, dtype, "exact") is None:
        return launch.refusal(spec, "f16")
    if not launch.reads_in_place(spec, spec.k, 0):
        return f"rows of {spec.k} inputs in groups of {spec.group_columns} are not read in place: multiples of 8 and 32"
    return ""


def kind(spec: LutSpec, dtype: torch.dtype, table: torch.dtype) -> launch.Kind:
    """Return the kind of kernel for a weight that is not refused."""
    found = launch.kind_of(spec, table, dtype, "exact")
    if found is None or refusal(spec, dtype, table):
        raise ValueError(f"no plugin: {refusal(spec, dtype, table)}")
    return found


def pack(
    codes: UInt8[Tensor, "n k"], table: Tensor, scale: Float[Tensor, "n groups"], spec: LutSpec, dtype: torch.dtype
) -> Parts:
    """Return a weight for inputs of a type; `table` is bytes or float16, as `LutParts` has it."""
    entries = tables.device_table(table, spec, kind(spec, dtype, table.dtype))
    held = tables.device_scale(scale)
    held = held if held.dtype == torch.float16 else held.float()
    return Parts(
        codes=_words(layout_mma16.pack(codes, spec)),
        table=_words(entries),
        scale=_words(layout_mma16.pack_scale(held, spec)),
        scale_type=NUMBERS[held.dtype],
    )


def pack_left(left: Float[Tensor, "n rank"], dtype: torch.dtype) -> Float[Tensor, "n columns"]:
    """Return the left factor of a low-rank term as the kernels read it."""
    return functional.pad(left.to(dtype), (0, -left.shape[1] % 32)).contiguous()


def shared(spec: LutSpec, kind: launch.Kind) -> int:
    """Return the bytes of shared memory of the kernel that has all batch sizes (bucket.cu)."""
    return max(launch.shared(form, spec.bits, kind) for form in BUCKETS)


def attributes(spec: LutSpec, kind: launch.Kind, scale_type: int, after: Epilogue) -> dict[str, int]:
    """Return the attributes of a node."""
    sizes, number = layout_mma16.shape(spec), NUMBERS[torch.bfloat16 if kind == "bf16" else torch.float16]
    return {
        "n": spec.n,
        "k": spec.k,
        "bits": spec.bits,
        "group": spec.group,
        "kind": KINDS.index(kind),
        "units": sizes.units,
        "slots": sizes.slots,
        "steps_per_slot": sizes.steps_per_slot,
        "units_per_slot": sizes.units_per_slot,
        "table_rows": spec.table_rows,
        "x_stride": spec.k,
        "y_stride": spec.n,
        "scale_type": scale_type,
        "y_type": number,
        "low_type": number,
        "activation": ACTIVATIONS.index(after.activation),
        "has_bias": int(after.biased),
        "rank": after.rank,
        "low_stride": after.rank,
        "unit_bits": tables.float_bits(spec.unit),
        "shift_bits": tables.shift_bits(spec, kind),
        "shared": shared(spec, kind),
    }


def _words(tensor: Tensor) -> Int32[Tensor, "words"]:
    return tensor.contiguous().flatten().view(torch.uint8).view(torch.int32)
