"""The graph of a network, and the sites at which its weights meet their inputs.

`torch.export` gives the graph. A site is found by what an operator does, not by the class of a module: packed attention
projections, functional calls, tied embeddings and recurrent matrices are all seen.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import OutputKind

from .errors import ExportError
from .model import aliases
from .weight import Layout

aten = torch.ops.aten

SiteKind: TypeAlias = Literal["linear", "conv", "conv_transpose", "embedding", "recurrent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One use of a weight: operator `node` multiplies rows `first..first+count` of the matrix of `param`.

    `operand` is the position of the operator's argument that the weight multiplies, `layout` how this use reads the
    parameter, `module` the path of the module that made the call.
    """

    node: str
    operand: int
    param: str
    kind: SiteKind
    layout: Layout
    first: int
    count: int
    module: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Graph:
    """A network as operators in order. `values` names the parameter or buffer behind a placeholder."""

    nodes: tuple[fx.Node, ...]
    values: Mapping[str, str]
    constants: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[fx.Node | None, ...]
    sites: Mapping[str, tuple[Site, ...]]
    program: torch.export.ExportedProgram

    def of_param(self) -> dict[str, tuple[Site, ...]]:
        """Return the sites of each parameter, in graph order."""
        found: dict[str, list[Site]] = {}
        for sites in self.sites.values():
            for site in sites:
                found.setdefault(site.param, []).append(site)
        return {param: tuple(sites) for param, sites in found.items()}

    def readers(self, param: str) -> frozenset[str]:
        """Return the nodes that read a parameter, sites or not, by name."""
        held = [node for node in self.nodes if node.op == "placeholder" and self.values.get(node.name) == param]
        return frozenset(user.name for node in held for user in node.users)


def capture(module: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """Export a module in evaluation mode on one example.

    Raises ExportError with the exporter's own first sentence where the network cannot be captured.
    """
    try:
        with quiet_export(), torch.no_grad():
            program = torch.export.export(module.eval(), example, strict=False)
            if any(_writes_into_others(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
    except Exception as error:
        first = str(error).strip().splitlines()
        raise ExportError(
            f"the network cannot be captured: {first[0] if first else type(error).__name__}",
            fix="torch.export must accept it: no Python branches on tensor values, inputs as the recipe says",
        ) from error
    return from_program(program, module)


def from_program(program: torch.export.ExportedProgram, module: nn.Module) -> Graph:
    """Return the graph of an exported program whose parameters are those of `module`."""
    names, signature = aliases(module), program.graph_signature
    values = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values = {placeholder: names.get(name, name) for placeholder, name in values.items()}
    lifted = signature.inputs_to_lifted_tensor_constants
    constants: dict[str, Any] = {name: program.constants[target] for name, target in lifted.items()}
    nodes = tuple(program.graph.nodes)
    for node in nodes:
        if node.op == "get_attr":
            constants[node.name] = operator.attrgetter(str(node.target))(program.graph_module)
    shapes = {name: tuple(param.shape) for name, param in module.named_parameters()}
    finder = _Finder(values=values, shapes=shapes)
    sites = {node.name: found for node in nodes if (found := tuple(finder.sites(node)))}
    return Graph(
        nodes=nodes,
        values=values,
        constants=constants,
        inputs=tuple(name for name in signature.user_inputs if isinstance(name, str)),
        outputs=_outputs(nodes, program),
        sites=sites,
        program=program,
    )


def module_path(node: fx.Node) -> str:
    """Return the path of the module whose forward made this node, "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]).removeprefix("L['self'].").removeprefix("L['self']") if paths else ""


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep the exporter's warnings away, and attention off the fused path that hides its projections."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


_CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_CONVS |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_PRODUCTS = {aten.mm.default: 1, aten.matmul.default: 1, aten.addmm.default: 2, aten.linear.default: 1}
RECURRENT = {aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input}
CELLS = {aten.gru_cell.default, aten.lstm_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default}
_VIEWS = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.view.default,
    aten.reshape.default,
    aten.numpy_T.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    operator.getitem,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finder:
    values: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    def sites(self, node: fx.Node) -> Iterator[Site]:
        if node.op != "call_function":
            return
        if node.target in _PRODUCTS:
            yield from self._product(node)
        elif node.target in _CONVS:
            yield from self._whole(node, node.args[1], "conv")
        elif node.target in _TRANSPOSED:
            yield from self._whole(node, node.args[1], "conv_transpose")
        elif node.target == aten.embedding.default:
            yield from self._whole(node, node.args[0], "embedding", operand=1)
        elif node.target in CELLS:
            yield from self._whole(node, node.args[2], "recurrent")
            yield from self._whole(node, node.args[3], "recurrent", operand=1)
        elif node.target in RECURRENT:
            for param in _input_and_hidden(node):
                yield from self._whole(node, param, "recurrent")

    def _whole(self, node: fx.Node, weight: Any, kind: SiteKind, operand: int = 0) -> Iterator[Site]:
        param = self.values.get(getattr(weight, "name", ""), "")
        if param not in self.shapes:
            return
        shape = self.shapes[param]
        groups = argument(node, "groups", 1) if kind in ("conv", "conv_transpose") else 1
        layout_kind: Any = kind if kind in ("conv", "conv_transpose") else "matrix"
        layout = Layout(kind=layout_kind, shape=shape, groups=groups)
        rows = shape[1] * groups if kind == "conv_transpose" else shape[0]
        yield _site(node, param, kind, layout, slice(0, rows), operand)

    def _product(self, node: fx.Node) -> Iterator[Site]:
        weight = node.args[_PRODUCTS[node.target]]  # type: ignore[index]
        source = self._source(weight)
        if source is None or len(self.shapes[source]) != 2:
            return
        ids = self._ids(weight, source)
        if node.target != aten.linear.default:
            ids = ids.T if ids.ndim == 2 else ids
        shape = self.shapes[source]
        for kind, matrix_ids in (("matrix", _ids_of(shape)), ("matrix_t", _ids_of(shape).T)):
            first = _row_run(ids, matrix_ids)
            if first is not None:
                layout = Layout(kind=kind, shape=shape)  # type: ignore[arg-type]
                operand = 1 if node.target == aten.addmm.default else 0
                yield _site(node, source, "linear", layout, slice(first, first + len(ids)), operand)
                return

    def _source(self, node: Any) -> str | None:
        """Return the parameter behind a chain of views, or None."""
        while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _VIEWS:
            node = node.args[0]
        name = self.values.get(getattr(node, "name", ""))
        return name if name in self.shapes else None

    def _ids(self, node: Any, source: str) -> Any:
        """Run a chain of views on element numbers instead of values."""
        if node.op == "placeholder":
            return _ids_of(self.shapes[source])
        return node.target(self._ids(node.args[0], source), *node.args[1:], **node.kwargs)


def _site(node: fx.Node, param: str, kind: SiteKind, layout: Layout, rows: slice, operand: int) -> Site:
    return Site(
        node=node.name,
        operand=operand,
        param=param,
        kind=kind,
        layout=layout,
        first=rows.start,
        count=rows.stop - rows.start,
        module=module_path(node),
    )


def _ids_of(shape: tuple[int, ...]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.arange(count).reshape(shape)


def _row_run(ids: Any, matrix: Tensor) -> int | None:
    """Return the first row if `ids` is a run of whole rows of `matrix`, else None."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != matrix.shape[1]:
        return None
    matches = (matrix[:, 0] == ids[0, 0]).nonzero()
    if not len(matches):
        return None
    first = int(matches[0])
    return first if torch.equal(matrix[first : first + len(ids)], ids) else None


def flat_weights(node: fx.Node) -> list[fx.Node]:
    """Return the parameters of a recurrent operator, layer by layer and direction by direction."""
    return [arg for arg in node.args[2] if isinstance(arg, fx.Node)]  # type: ignore[union-attr]


def _input_and_hidden(node: fx.Node) -> Iterator[fx.Node]:
    """Yield W_ih and W_hh of each layer and direction; the projection of an LSTM multiplies what no operator shows."""
    flat, cells = flat_weights(node), cast(int, node.args[4]) * (2 if node.args[7] else 1)
    for start in range(0, len(flat), len(flat) // cells):
        yield from flat[start : start + 2]


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """Return an operator's argument by its schema name, however it was passed."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    position = next(i for i, known in enumerate(schema) if known.name == name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


_FRESH = (
    _CONVS
    | _TRANSPOSED
    | {
        aten.linear.default,
        aten.batch_norm.default,
        aten.layer_norm.default,
        aten.group_norm.default,
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.sub.Tensor,
        aten.cat.default,
    }
)


def _writes_into_others(node: fx.Node) -> bool:
    """Return whether an operator may change an input, a buffer, a constant or what a view shows.

    An activation in place on what a layer has just made (the usual case) does not, and the graph is kept as it is.
    """
    if not _in_place(node):
        return False
    changed = node.args[0]
    while isinstance(changed, fx.Node) and _in_place(changed):
        changed = changed.args[0]
    return not (isinstance(changed, fx.Node) and changed.target in _FRESH)


def _in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _outputs(nodes: tuple[fx.Node, ...], program: torch.export.ExportedProgram) -> tuple[fx.Node | None, ...]:
    """Return the outputs that the module's caller gets, without those that stand for changed buffers and inputs."""
    (output,) = nodes[-1].args
    flat = output if isinstance(output, (tuple, list)) else (output,)
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    wanted = [item for item, kind in zip(flat, kinds, strict=True) if kind == OutputKind.USER_OUTPUT]
    return tuple(item if isinstance(item, fx.Node) else None for item in wanted)
