"""Registers the plugin with the real `tensorrt.plugin`, and asks it for the kernel of a node as TensorRT would.

Run in a process of its own, whose bindings are linked to stubs: arguments are the folder of plugin_aot.py and that of
the kernels, attributes and the shape of x come as JSON on stdin. Expressions of dimensions are numbers here.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

trt: Any = importlib.import_module("tensorrt_bindings")
sys.modules["tensorrt"] = trt


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "PROD": lambda a, b: a * b,
    "SUM": lambda a, b: a + b,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class Number:
    """A dimension that is known."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Builder:
    """Computes instead of noting what is to be computed."""

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, op: Any, first: Number, second: Number) -> Number:
        return Number(OPERATIONS[op.name](first.value, second.value))


def main() -> None:
    plugin: Any = importlib.import_module("tensorrt_bindings.plugin")
    sys.modules["tensorrt.plugin"] = plugin
    tensors: Any = importlib.import_module("tensorrt_bindings.plugin._tensor")
    library: Any = importlib.import_module("tensorrt_bindings.plugin._lib")
    sys.path.insert(0, sys.argv[1])
    aot: Any = importlib.import_module("plugin_aot")
    aot.register(Path(sys.argv[2]), lazy=True)
    defined = library.QDP_REGISTRY[aot.OP]
    asked = json.load(sys.stdin)
    told, shape = asked["attributes"], asked["x"]

    trt.IDimensionExpr = Number
    tensors.SymIntExpr._exprBuilder = Builder()
    x = plugin.from_shape_expr(tuple(shape), trt.DataType.HALF)
    inputs = [x if name == "x" else plugin.from_shape_expr((1,), trt.DataType.INT32) for name in aot.INPUTS]
    given = {name: told[name] for name in defined.input_attrs}
    y = defined.register_func(*inputs, **given)
    name, image, start, numbers = defined.aot_impl_func(*inputs, *given.values(), [y], 0)
    answer = {
        "version": trt.__version__,
        "inputs": defined.input_tensor_names,
        "attributes": list(defined.input_attrs),
        "outputs": defined.num_outputs,
        "y": [part.constant_value() for part in y.shape_expr],
        "dtype": y.dtype.name,
        "name": name,
        "image": image.decode(),
        "grid": [part._expr.value for part in (start.grid_x, start.grid_y, start.grid_z)],
        "block": [part._expr.value for part in (start.block_x, start.block_y, start.block_z)],
        "shared": start.shared_mem._expr.value,
        "numbers": [part._expr.value for part in numbers],
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
