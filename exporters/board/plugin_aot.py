"""The plugin LutLinearMma16 ahead of time: TensorRT 10.9 and later put its PTX into the engine, which runs without it.

`register` makes it known to the parser. All that the kernel is told stands in the attributes of a node, and becomes
constants of the engine but for m, the rows of x. The kernel was never run on a GPU.
"""

from __future__ import annotations

import importlib
import inspect
import types
from pathlib import Path
from typing import Any

OP = "paredown::LutLinearMma16"
INPUTS = ("codes", "table", "scale", "x", "x_scale", "bias", "low", "low_x")
SIZES = ("n", "m", "k", "units", "slots", "steps_per_slot", "units_per_slot", "table_rows", "x_stride", "y_stride")
TYPES = ("scale_type", "y_type", "low_type")
EPILOGUE = ("activation", "has_bias", "rank", "low_stride", "unit_bits", "shift_bits")
NUMBERS = SIZES + TYPES + EPILOGUE
"""What the kernel takes between its inputs and its output."""
LOADED = ("kind", "bits", "shared")
"""What says which kernel, and how much memory it shares."""
ATTRIBUTES = tuple(name for name in NUMBERS if name != "m") + LOADED
KINDS = ("f16", "f16b", "bf16")
"""Attribute `kind` -> name, as kernels/tensorrt/node.py numbers them."""
ROWS, TOKENS, THREADS = 16, 32, 256
"""Rows of W and of x that a block of the grid stands for."""


def kernel_name(kind: int, bits: int) -> str:
    """Return the name of a kernel; its PTX is in a file of that name."""
    return f"paredown_bucket_{KINDS[kind]}_b{bits}"


def register(folder: Path, *, lazy: bool = False) -> None:
    """Make the plugin known, whose kernels lie in `folder`; with `lazy` the registry of TensorRT is not asked."""
    plugin = importlib.import_module("tensorrt.plugin")

    def describe(*inputs: Any, **told: int) -> Any:
        y = inputs[INPUTS.index("x")].like()
        y.shape_expr[len(y.shape_expr) - 1] = told["n"]
        return y

    def implement(*given: Any) -> Any:
        count = len(INPUTS)
        told = {name: given[count + index] for index, name in enumerate(ATTRIBUTES)}
        return _kernel(plugin, folder, given[INPUTS.index("x")], told)

    described = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in (*INPUTS, *ATTRIBUTES)]
    typed = [part.replace(annotation=plugin.TensorDesc if part.name in INPUTS else int) for part in described]
    describe.__signature__ = inspect.Signature(typed, return_annotation=plugin.TensorDesc)  # type: ignore[attr-defined]
    more = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("outputs", "tactic")]
    made = types.GenericAlias(tuple, (str, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs))
    implement.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*described, *more], return_annotation=made
    )
    plugin.register(OP, lazy_register=lazy)(describe)
    plugin.aot_impl(OP)(implement)


def _kernel(plugin: Any, folder: Path, x: Any, told: dict[str, int]) -> tuple[str, bytes, Any, Any]:
    """Return the kernel of a node, how it is started, and its numbers."""
    name = kernel_name(told["kind"], told["bits"])
    m = x.shape_expr.numel() // told["k"]
    start = plugin.KernelLaunchParams()
    start.grid_x = -(-told["n"] // ROWS)
    start.grid_y = plugin.cdiv(m, TOKENS)
    start.block_x = THREADS
    start.shared_mem = told["shared"]
    numbers = plugin.SymIntExprs(len(NUMBERS))
    for index, known in enumerate(NUMBERS):
        numbers[index] = plugin.SymInt32(m if known == "m" else told[known])
    return name, (folder / f"{name}.ptx").read_bytes(), start, numbers
