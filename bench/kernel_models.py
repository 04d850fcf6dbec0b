"""One-operator ONNX models of a linear layer, ours and onnxruntime's own, for `bench/kernels.py`.

Weights are drawn at random in the form that each operator stores; only "ours" and the dense one are compared for error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..kernels import layout
from ..kernels.lut_spec import LutParts, LutSpec, Mode
from ..kernels.onnx_ops import DOMAIN, VERSION, linear_op, onnx_attributes

MICROSOFT = "com.microsoft"
OPSET, IR = 20, 10
GROUP = 128
"""Inputs that share a scale, in our weights and where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a linear layer is stored and computed; `op` is what makes its node."""

    name: str
    op: str
    bits: int = 32
    group: int = GROUP
    accuracy: int = 4
    mode: Mode = "exact"
    session: tuple[tuple[str, str], ...] = ()

    @property
    def ours(self) -> bool:
        return self.op == "LutLinear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A model of `layers` equal layers, one after another (n = k where there are several)."""

    n: int
    k: int
    layers: int = 1
    seed: int = 0


def write(form: Form, chain: Chain, folder: Path) -> Path:
    """Write the model, weights in a file of their own, and return its path."""
    rng = np.random.default_rng(chain.seed)
    nodes, weights, value = [], [], "x"
    for layer in range(chain.layers):
        node, tensors = _layer(form, chain, rng, (value, f"y{layer}", f"l{layer}."))
        nodes.append(node)
        weights += [numpy_helper.from_array(array, name) for name, array in tensors.items()]
        value = f"y{layer}"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size])
        for name, size in (("x", chain.k), (value, chain.n))
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    imports = [helper.make_opsetid(*pair) for pair in (("", OPSET), (MICROSOFT, 1), (DOMAIN, VERSION))]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR)
    path = folder / f"{form.name.replace(' ', '_')}_{chain.n}x{chain.k}x{chain.layers}.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location=data_of(path).name, size_threshold=1024)
    return path


def data_of(path: Path) -> Path:
    """Return the file of weights beside a model."""
    return path.with_suffix(".data")


def weight_bytes(form: Form, n: int, k: int) -> int:
    """Return the bytes of codes and scales that one product reads."""
    if form.op == "MatMul":
        return 4 * n * k
    scale = 2 if form.ours else 4
    return n * k * form.bits // 8 + scale * n * (k // form.group)


def lut_weight(bits: int, n: int, k: int, rng: np.random.Generator) -> tuple[LutParts, LutSpec]:
    """Draw a weight of ours: any bytes are codes, entries of the table spread as those of a normal distribution."""
    spec = LutSpec(n=n, k=k, bits=bits, group=GROUP, zero=128.0, unit=1 / 127)
    codes = torch.from_numpy(rng.integers(0, 256, layout.codes_bytes(spec), dtype=np.uint8))
    ends = torch.special.ndtri((torch.arange(2**bits) + 0.5) / 2**bits)
    table = (ends / ends.abs().max() * 127 + 128).round().to(torch.uint8)[None]
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, layout.packed_scale_shape(spec)).astype(np.float16)) / k**0.5
    return LutParts(codes=codes, table=table, scale=scale), spec


def _layer(
    form: Form, chain: Chain, rng: np.random.Generator, names: tuple[str, str, str]
) -> tuple[onnx.NodeProto, dict[str, NDArray[np.generic]]]:
    """Return a node and its weights; `names`: of its input, its output, and what its weights' names begin with."""
    x, y, stem = names
    n, k = chain.n, chain.k
    if form.ours:
        parts, spec = lut_weight(form.bits, n, k, rng)
        op = linear_op(spec, mode=form.mode)
        tensors = {"codes": parts.codes.numpy(), "table": parts.table.numpy(), "scale": parts.scale.numpy()}
        tensors["bias"] = np.zeros(1, np.float32)
        attributes = onnx_attributes(op.name, spec, TensorProto.FLOAT)
        return _node(op.name, DOMAIN, names, tensors, attributes)
    if form.op == "MatMul":
        values = rng.standard_normal((k, n), dtype=np.float32) / np.float32(k**0.5)
        return helper.make_node("MatMul", [x, f"{stem}w"], [y]), {f"{stem}w": values}
    if form.op == "MatMulNBits":
        blocks, size = k // form.group, form.group * form.bits // 8
        tensors = {"codes": rng.integers(0, 256, (n, blocks, size), dtype=np.uint8), "scale": _scales(rng, n * blocks)}
        attributes = {"K": k, "N": n, "bits": form.bits, "block_size": form.group, "accuracy_level": form.accuracy}
        return _node(form.op, MICROSOFT, names, tensors, attributes)
    if form.op == "MatMulBnb4":
        codes = rng.integers(0, 256, n * k // 2, dtype=np.uint8)
        tensors = {"codes": codes, "scale": _scales(rng, n * k // form.group)}
        attributes = {"K": k, "N": n, "block_size": form.group, "quant_type": 1}
        return _node(form.op, MICROSOFT, names, tensors, attributes)
    assert form.op == "DynamicQuantizeMatMul"
    tensors = {"codes": rng.integers(-127, 128, (k, n), dtype=np.int8), "scale": _scales(rng, n)}
    return _node(form.op, MICROSOFT, names, tensors, {})


def _scales(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    return rng.uniform(0.5 / 512, 1.5 / 512, count).astype(np.float32)


def _node(
    op: str,
    domain: str,
    names: tuple[str, str, str],
    tensors: Mapping[str, NDArray[np.generic]],
    attributes: Mapping[str, Any],
) -> tuple[onnx.NodeProto, dict[str, NDArray[np.generic]]]:
    x, y, stem = names
    held = {stem + name: array for name, array in tensors.items()}
    return helper.make_node(op, [x, *held], [y], domain=domain, **attributes), held
