"""What our operators launch on a GPU against what torch launches (kernels/cuda/call.py) for the same layer."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from paredown.kernels import lut_reference
from paredown.kernels.cuda import call, launch
from paredown.kernels.lut_spec import ACTIVATIONS, LutParts

from .ort_gpu import STREAM, Gpu
from .ort_models import ACTIVATIONS as SUFFIXES
from .ort_models import Layer


@dataclass(frozen=True, slots=True)
class TorchStart:
    """A launch of kernels/cuda/call.py."""

    how: launch.Launch
    values: Mapping[str, Tensor | int]


def torch_starts(one: Layer, x: Tensor, t: Tensor | None, processors: int) -> list[TorchStart]:
    """Return what torch starts for a layer, on a GPU of so many multiprocessors, without running it."""
    case, starts = one.case, []

    def start(kernel: str, how: launch.Launch, values: Mapping[str, Tensor | int], place: call.Place) -> None:
        starts.append(TorchStart(how, {name: values[name] for name in launch.ARGUMENTS[kernel]}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "_start", start)
        patch.setattr(call, "_place", lambda x: call.Place(device=0, processors=processors, stream=STREAM))
        kind = launch.kind_of(case.spec, one.weight.table.dtype, x.dtype, "int8" if case.int8 else "exact")
        assert kind is not None
        weight = call.pack(_parts(one.weight.parts), case.spec, kind, _left(one, x.dtype))
        activation = ACTIVATIONS[SUFFIXES.index(case.activation)]
        bias = one.bias if case.biased else None
        call.linear(x, weight, bias=bias, activation=activation, low_x=t)
    return starts


def _parts(parts: tuple[Tensor, Tensor, Tensor]) -> LutParts:
    return LutParts(codes=parts[0], table=parts[1], scale=parts[2])


def _left(one: Layer, dtype: torch.dtype) -> Tensor | None:
    return None if one.left is None else lut_reference.decode(_parts(one.left.parts), one.left.spec).to(dtype)


UPLOADED = ("table", "scale", "low", "bias")


def assert_same_starts(gpu: Gpu, wanted: Sequence[TorchStart]) -> None:
    """Hold launches against torch's: numbers equal, pointers one to one, the same bytes behind what was uploaded."""
    assert [start.name for start in gpu.starts] == [start.how.name for start in wanted]
    address, sizes = {0: 0}, {}
    for start, like in zip(gpu.starts, wanted, strict=True):
        assert start.sizes == (*like.how.grid, *like.how.block, like.how.shared), start.name
        assert start.stream == (0 if start.name == "paredown_repack" else STREAM)
        for name, value in like.values.items():
            found = start.arguments[name]
            if isinstance(value, int):
                assert found == value, (start.name, name)
            elif name != "c16":  # which is gone
                assert address.setdefault(value.data_ptr(), found) == found, (start.name, name)
                sizes[found] = value.nbytes
                if name in UPLOADED:
                    held = ctypes.string_at(found, value.nbytes)
                    assert held == value.contiguous().flatten().view(torch.uint8).numpy().tobytes(), (start.name, name)
    assert_apart(gpu.buffers(), sizes)


def assert_apart(buffers: Mapping[int, int], sizes: Mapping[int, int]) -> None:
    """Check that what begins at each address is as large as needed, within one buffer, and overlaps with nothing."""
    for here, after in zip(sorted(sizes), [*sorted(sizes)[1:], 2**64], strict=True):
        begin = max(start for start in buffers if start <= here)
        assert here + sizes[here] <= min(after, begin + buffers[begin])
