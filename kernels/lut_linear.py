"""`paredown::lut_linear` for torch: y = act(x W^T + t L^T + bias) with W, and L, stored as codes into a table.

The operator, its fake and what runs without any kernel are here; a device's kernels are registered for its dispatch
key. On CPUs the compiled library computes float32, float16 and bfloat16 where it was built, everything else is
`lut_reference`. `mode` means what `cpu/paredown.h` says; the low-rank term is exact in both modes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from . import lut_reference, native
from .lut_arguments import FLOAT_TYPES, PARTS, WEIGHT, check_parts, check_place, numbers, pointer, read_spec, tensors
from .lut_spec import ACTIVATIONS, MODES, Activation, LutParts, LutSpec, Mode
from .onnx_ops import DOMAIN

DEFAULTS = ("exact", "", None, None, None, None, None, (), ())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """The term t L^T: t = x R^T, computed before, and the left factor L (n, rank)."""

    t: Float[Tensor, "... rank"]
    parts: LutParts
    spec: LutSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One product, its tensors and sizes checked against each other."""

    x: Float[Tensor, "... k"]
    parts: LutParts
    spec: LutSpec
    mode: Mode
    activation: Activation
    bias: Shaped[Tensor, "n"] | None
    low: LowRank | None


def lut_linear(
    x: Float[Tensor, "... k"],
    parts: LutParts,
    spec: LutSpec,
    *,
    mode: Mode = "exact",
    activation: Activation = "",
    bias: Float[Tensor, "n"] | None = None,
    low: LowRank | None = None,
) -> Float[Tensor, "... n"]:
    """Return act(x W^T + t L^T + bias) in the dtype of x; ValueError where tensors and sizes do not fit."""
    left = () if low is None else (low.t, *tensors(low.parts), *numbers(low.spec))
    product: Tensor = torch.ops.paredown.lut_linear(x, *tensors(parts), *numbers(spec), mode, activation, bias, *left)
    return product


class LutLinear(nn.Module):
    """A linear layer that holds its weight as codes, and so does its state; it has no gradient.

    `right` gives t of the low-rank term from x; `left` is that term's other factor. `.to` and `.half` change the bias
    and `right`; codes, tables and scales keep their types, and y has the type of x.
    """

    codes: Tensor
    table: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        parts: LutParts,
        spec: LutSpec,
        *,
        mode: Mode = "exact",
        activation: Activation = "",
        bias: Float[Tensor, "n"] | None = None,
        left: tuple[LutParts, LutSpec] | None = None,
        right: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (left is None) != (right is None):
            raise ValueError("a low-rank term needs both factors: left and right")
        self.spec, self.mode, self.activation = spec, mode, activation
        self.left_spec = left[1] if left else None
        self.in_features, self.out_features = spec.k, spec.n
        self.right = None if right is None else right.requires_grad_(False)
        for name, tensor in zip(PARTS, tensors(parts), strict=True):
            self.register_buffer(name, tensor)
        for name, tensor in zip(PARTS, tensors(left[0]) if left else (), strict=False):
            self.register_buffer(f"left_{name}", tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        left: tuple[Any, ...] = ()
        if self.right is not None and self.left_spec is not None:
            parts = (getattr(self, f"left_{name}") for name in PARTS)
            left = (self.right(x), *parts, *numbers(self.left_spec))
        sizes = numbers(self.spec)
        product: Tensor = torch.ops.paredown.lut_linear(
            x, self.codes, self.table, self.scale, *sizes, self.mode, self.activation, self.bias, *left
        )
        return product

    def extra_repr(self) -> str:
        said = f"{self.in_features}, {self.out_features}, bits={self.spec.bits}, mode={self.mode}"
        return said + (f", activation={self.activation}" if self.activation else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LutLinear:
        """Move codes, tables and scales where `fn` moves them, but do not convert them."""
        with keep_types(self, (*PARTS, *(f"left_{name}" for name in PARTS if self.left_spec))):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


@contextmanager
def keep_types(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Undo what converts the types of these buffers of a module, but not what moves them."""
    kept = {name: module.get_buffer(name) for name in names}
    yield
    for name, tensor in kept.items():
        moved = module.get_buffer(name)
        if moved.dtype != tensor.dtype:
            setattr(module, name, tensor.to(moved.device))


def backend(key: str, run: Callable[[Call], Tensor]) -> None:
    """Let `run` compute the products of tensors of a dispatch key ("CUDA"), from now on in this process."""
    _LIBRARY.impl("lut_linear", lambda *arguments: run(_call(*arguments)), key)


def reference(call: Call) -> Float[Tensor, "... n"]:
    """Return a product in plain torch, on any device."""
    x, spec, low = call.x, call.spec, call.low
    y = lut_reference.product(x, lut_reference.decode(call.parts, spec), spec.group, call.mode)
    if low is not None:
        y = y + lut_reference.product(low.t, lut_reference.decode(low.parts, low.spec), 0, "exact")
    if call.bias is not None:
        y = y + call.bias
    return lut_reference.activate(y, call.activation).to(x.dtype)


def _on_cpu(call: Call) -> Tensor:
    return _compiled(call) if call.x.dtype in FLOAT_TYPES and native.available() else reference(call)


def _on_gpu(call: Call) -> Tensor:
    from .cuda import op  # it imports this module, and is of no use without a GPU

    return op.run(call)


def _compiled(call: Call) -> Tensor:
    """Return a product of the compiled library."""
    x, low, n = _rows(call.x), call.low, call.spec.n
    y = x.new_empty((*call.x.shape[:-1], n))
    if not y.numel():
        return y
    t = None if low is None else _rows(low.t)
    library, bias = native.library(), None if call.bias is None else call.bias.contiguous()
    linear = native.Linear(
        *(pointer(call.parts, call.spec), x.data_ptr(), y.data_ptr(), x.shape[0], x.stride(0), n),
        *(FLOAT_TYPES[x.dtype], MODES.index(call.mode), ACTIVATIONS.index(call.activation)),
        *(None if bias is None else bias.data_ptr(), None if low is None else pointer(low.parts, low.spec)),
        *((None, 0) if t is None else (t.data_ptr(), t.stride(0))),
        *(None, 0, torch.get_num_threads()),
    )
    address = ctypes.byref(linear)
    linear.scratch_bytes = library.paredown_scratch(address)
    scratch = torch.empty(linear.scratch_bytes, dtype=torch.uint8)
    linear.scratch = scratch.data_ptr()
    native.check(library.paredown_run_linear(address))
    return y


def _rows(x: Float[Tensor, "... k"]) -> Float[Tensor, "m k"]:
    """Return x as rows whose elements lie side by side; a copy only where they do not."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _fake(*arguments: Any) -> Tensor:
    call = _call(*arguments)
    return call.x.new_empty((*call.x.shape[:-1], call.spec.n))


def _call(
    x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, sizes: Sequence[int], grid: Sequence[float], *rest: Any
) -> Call:
    """Return the call that an operator's arguments mean; torch leaves the last out where they have their defaults."""
    mode, activation, bias, t, left_codes, left_table, left_scale, left_sizes, left_grid = rest + DEFAULTS[len(rest) :]
    spec = read_spec(tuple(sizes), tuple(grid))
    parts, low = LutParts(codes=codes, table=table, scale=scale), None
    check_parts("lut_linear: ", parts, spec, mode)
    if t is not None:
        left = LutParts(codes=left_codes, table=left_table, scale=left_scale)
        low = LowRank(t=t, parts=left, spec=read_spec(tuple(left_sizes), tuple(left_grid)))
        check_parts("lut_linear: left_", left, low.spec)
    call = Call(x=x, parts=parts, spec=spec, mode=mode, activation=activation, bias=bias, low=low)
    _check(call)
    return call


def _check(call: Call) -> None:
    x, low, spec = call.x, call.low, call.spec
    if x.dtype not in FLOAT_TYPES and x.dtype != torch.float64:
        raise ValueError(f"lut_linear: activations of {x.dtype} are not floating point")
    if x.dim() == 0 or x.shape[-1] != spec.k:
        raise ValueError(f"lut_linear: x is {tuple(x.shape)}, the weight ({spec.n}, {spec.k}) takes {spec.k} columns")
    if call.mode not in MODES or call.activation not in ACTIVATIONS:
        raise ValueError(f"lut_linear: no mode {call.mode!r} with activation {call.activation!r}")
    check_place("lut_linear", x, (*tensors(call.parts), call.bias))
    _check_like("bias", call.bias, x, (spec.n,))
    if low is not None:
        check_place("lut_linear", x, (low.t, *tensors(low.parts)))
        _check_like("t", low.t, x, (*x.shape[:-1], low.spec.k))
        if low.spec.n != spec.n:
            raise ValueError(f"lut_linear: the left factor has {low.spec.n} rows, the weight {spec.n}")
    read = x, call.bias, None if low is None else low.t
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in read):
        raise RuntimeError("lut_linear has no gradient: compressed models are for inference, use torch.no_grad()")


def _check_like(name: str, tensor: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
        have = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"lut_linear: {name} is {have}, must be {x.dtype} {tuple(shape)} like x")


_SCHEMA = (
    f"lut_linear(Tensor x, {WEIGHT}, str mode='exact', str activation='', "
    "Tensor? bias=None, Tensor? t=None, Tensor? left_codes=None, Tensor? left_table=None, "
    "Tensor? left_scale=None, int[] left_sizes=[], float[] left_grid=[]) -> Tensor"
)
_LIBRARY: Any = torch.library.Library(DOMAIN, "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA)
backend("CompositeExplicitAutograd", reference)
backend("CPU", _on_cpu)
backend("CUDA", _on_gpu)
torch.library.register_fake(f"{DOMAIN}::lut_linear", _fake, lib=_LIBRARY)
