"""`paredown::lut_linear` on CUDA tensors: each weight is packed at its first product and kept while its codes live.

A weight then has its codes twice on the GPU: in layout "c16", which the state of a module holds, and in "mma16". What
has no kernel (`call.refusal`) is computed by the reference, and a warning says so, once for each reason.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import lut_reference
from ..lut_linear import Call, LowRank, reference
from ..lut_spec import LutParts, LutSpec
from . import call as calls
from . import driver, launch, load

_PACKED: Any = WeakIdKeyDictionary()
"""Codes of layout "c16" -> what they were packed for -> the packed weight."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What a packed weight was made of: if a tensor was written since, its version is another."""

    spec: LutSpec
    kind: launch.Kind
    low_spec: LutSpec | None
    dtype: torch.dtype
    tensors: tuple[tuple[int, int], ...]


def run(call: Call) -> Tensor:
    """Return a product of tensors on a GPU; CudaError where the driver refuses."""
    spec, dtype, table = call.spec, call.x.dtype, call.parts.table.dtype
    reason = calls.refusal(spec, call.mode, dtype, table)
    kind = None if reason else launch.kind_of(spec, table, dtype, call.mode)
    if kind is None:
        return _refused(call, reason)
    try:
        weight = _packed(call, kind)
        t = None if call.low is None else call.low.t
        return calls.linear(call.x, weight, bias=call.bias, activation=call.activation, low_x=t)
    except (load.NoKernelsError, driver.NoDriverError) as error:
        return _refused(call, str(error))


def _refused(call: Call, reason: str) -> Tensor:
    _warn(reason)
    return reference(call)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"lut_linear decodes W at every call on this GPU: {reason}", RuntimeWarning, stacklevel=4)


def _packed(call: Call, kind: launch.Kind) -> calls.DeviceWeight:
    low_spec = None if call.low is None else call.low.spec
    made = _Made(call.spec, kind, low_spec, call.x.dtype, _identities(call.parts, call.low))
    found = _PACKED.setdefault(call.parts.codes, {})
    if made not in found:
        calls.refuse_capture("a weight is not packed yet")
        weight = calls.pack(call.parts, call.spec, kind, _left(call))
        # One weight for each kind and dtype: those of tensors as they were before are of no use.
        for old in [old for old in found if (old.kind, old.dtype) == (made.kind, made.dtype)]:
            del found[old]
        found[made] = weight
    packed: calls.DeviceWeight = found[made]
    return packed


def _left(call: Call) -> Tensor | None:
    """Return the left factor as the kernels take it: dense, n x rank, of the dtype of x."""
    return None if call.low is None else lut_reference.decode(call.low.parts, call.low.spec).to(call.x.dtype)


def _identities(parts: LutParts, low: LowRank | None) -> tuple[tuple[int, int], ...]:
    """Return address and version of every tensor of a weight; tensors of inference mode have no versions."""
    tensors = [parts.codes, parts.table, parts.scale]
    if low is not None:
        tensors += [low.parts.codes, low.parts.table, low.parts.scale]
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
