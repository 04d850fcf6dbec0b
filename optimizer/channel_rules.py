"""What each operator means for channel numbers: the rules that `channels.Follower` applies."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from .channel_products import attention, matmul
from .channels import Channels, Follower, Rule, Value, filled, flat, frozen_like
from .graph import CELLS, RECURRENT, Graph, Site, argument
from .ledger import FREE, FROZEN
from .recurrent_channels import cell, recurrent


def follow(graph: Graph, fixed: Collection[str] = ()) -> Channels:
    """Follow the channels of a graph; `fixed` are weights whose rows must stay.

    Raises InfeasibleError for an operator that is not known here, unless nothing removable reaches it.
    """
    follower = Follower(graph=graph, channels=Channels(), fixed=frozenset(fixed), rule_of=rule_of)
    for node in graph.nodes:
        follower.visit(node)
    for output in graph.outputs:
        if output is not None:
            follower.freeze_all(follower.channels.values[output.name], "it is an output of the network")
    follower.square()
    return follower.channels


def rule_of(node: fx.Node, sites: Sequence[Site]) -> Rule | None:
    """Return the rule of an operator, None where there is none."""
    if node.target in RECURRENT:
        return recurrent
    if node.target in CELLS:
        return cell
    if sites:
        return _SITES[sites[0].kind]
    return _RULES.get(name_of(node))


def name_of(node: fx.Node) -> str:
    """Return an operator's name without namespace, overload and the underscore of in-place forms."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", "")
    return str(name) if name.startswith("_") else str(name).rstrip("_")


def _elementwise(follower: Follower, node: fx.Node) -> Any:
    values = flat([follower.value(arg) for arg in node.args])
    return follower.elementwise(values, node.meta["val"].shape)


def _same(follower: Follower, node: fx.Node) -> Any:
    return follower.value(node.args[0])


def _view(follower: Follower, node: fx.Node) -> Any:
    """Run a view on the numbers; pieces of a split must lose equally many unless their sizes are written out."""
    values = flat([follower.value(arg) for arg in node.args])
    packed = {id(value): follower.packed(value.ids) for value in values}
    own = all(value.own for value in values)

    def numbers(arg: Any) -> Any:
        value = follower.value(arg)
        return packed[id(value)].expand(value.shape) if isinstance(value, Value) else [numbers(a) for a in arg]

    args = fx.map_arg(node.args, numbers)
    call: Any = torch.reshape if name_of(node) in ("view", "_unsafe_view") else node.target
    result = call(*args, **node.kwargs)
    made = _values(follower, result, own)
    before = max((sum(s > 1 for s in ids.shape) for ids in packed.values()), default=0)
    follower.grids += [value for value in flat(made) if len(value.varying) > max(1, before)]
    if name_of(node) in ("split", "chunk", "unsafe_split", "unsafe_chunk"):
        _balance_pieces(follower, flat(made))
    return made


def _balance_pieces(follower: Follower, pieces: Sequence[Value]) -> None:
    if len({piece.shape for piece in pieces}) == 1 and pieces[0].varying:
        follower.balance([piece.ids for piece in pieces])
        return
    for piece in pieces:
        if len(piece.varying):
            follower.ledger.freeze(piece.ids, follower.why("it is split into unequal pieces"))


def _values(follower: Follower, result: Any, own: bool) -> Any:
    if isinstance(result, Tensor):
        return Value(ids=follower.packed(result), shape=tuple(result.shape), own=own)
    return [_values(follower, item, own) for item in result]


def _getitem(follower: Follower, node: fx.Node) -> Any:
    return follower.value(node.args[0])[node.args[1]]


def _free(follower: Follower, node: fx.Node) -> Any:
    return filled(node.meta["val"], FREE)


def _frozen(follower: Follower, node: fx.Node) -> Any:
    return frozen_like(node.meta["val"])


def _conv(follower: Follower, node: fx.Node) -> Any:
    (site,) = follower.graph.sites[node.name]
    matrix, x = follower.matrix(site), follower.value(node.args[0])
    axis = len(x.shape) - (len(site.layout.shape) - 2) - 1
    x = follower.settle(x, range(axis + 1, len(x.shape)), "it lies along an image dimension")
    follower.contract(x, axis, matrix.columns)
    groups = site.layout.groups
    if groups > 1 and matrix.columns.shape[1] == 1:
        rows = matrix.rows.reshape(groups, -1)
        follower.ledger.join(rows, matrix.columns)
    elif groups > 1:
        follower.balance(matrix.columns)
        follower.balance(matrix.rows.reshape(groups, -1))
    return _produced(follower, node, matrix.rows, axis, 2)


def _produced(follower: Follower, node: fx.Node, rows: Tensor, axis: int, bias_at: int) -> Value:
    """Return a site's result: the rows along `axis`, joined with its bias."""
    shape = tuple(node.meta["val"].shape)
    if len(rows) == 1:
        follower.ledger.freeze(rows, "it has one channel")
    made = Value(ids=rows.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape=shape)
    bias = follower.value(node.args[bias_at]) if len(node.args) > bias_at else None
    if isinstance(bias, Value):
        follower.elementwise([made, _along(bias, axis, len(shape))], shape)
    return follower.current(made)


def _along(value: Value, axis: int, dims: int) -> Value:
    """Return a vector laid along one of `dims` dimensions."""
    size = [-1 if a == axis else 1 for a in range(dims)]
    shape = tuple(value.shape[0] if a == axis else 1 for a in range(dims))
    return Value(ids=value.ids.reshape(size), shape=shape, own=value.own)


def _linear(follower: Follower, node: fx.Node) -> Any:
    (site,) = follower.graph.sites[node.name]
    matrix, x = follower.matrix(site), follower.value(node.args[site.operand])
    follower.contract(x, len(x.shape) - 1, matrix.columns)
    rows = matrix.rows[site.first : site.first + site.count]
    bias_at = 0 if name_of(node) == "addmm" else 2
    return _produced(follower, node, rows, len(node.meta["val"].shape) - 1, bias_at)


def _embedding(follower: Follower, node: fx.Node) -> Any:
    (site,) = follower.graph.sites[node.name]
    matrix = follower.matrix(site)
    follower.ledger.freeze(matrix.rows, "it is a table of entries")
    shape = tuple(node.meta["val"].shape)
    return Value(ids=matrix.columns.reshape((1,) * (len(shape) - 1) + (-1,)), shape=shape)


def _batch_norm(follower: Follower, node: fx.Node) -> Any:
    x = follower.value(node.args[0])
    parts = [follower.value(arg) for arg in node.args[1:5]]
    values = [x, *(_along(v, 1, len(x.shape)) for v in parts if isinstance(v, Value))]
    made = follower.elementwise(values, x.shape)
    return made if isinstance(node.meta["val"], Tensor) else [made, *frozen_like(node.meta["val"])[1:]]


def _prelu(follower: Follower, node: fx.Node) -> Any:
    x, slope = follower.value(node.args[0]), follower.value(node.args[1])
    if math.prod(slope.shape) == 1:
        return x
    return follower.elementwise([x, _along(slope, 1, len(x.shape))], x.shape)


def _group_norm(follower: Follower, node: fx.Node) -> Any:
    """Channels that are normalized together go together: what remains has the statistics that it had."""
    x, groups = follower.value(node.args[0]), cast(int, node.args[1])
    x = follower.current(follower.settle(x, range(2, len(x.shape)), "it lies along an image dimension"))
    if x.ids.shape[1] > 1:
        parted = x.ids.reshape(x.ids.shape[0], groups, -1)
        follower.ledger.join(parted, parted[..., :1])
    parts = [follower.value(arg) for arg in node.args[2:4]]
    values = [x, *(_along(v, 1, len(x.shape)) for v in parts if isinstance(v, Value))]
    return follower.elementwise(values, x.shape)


def _glu(follower: Follower, node: fx.Node) -> Any:
    """Halve a dimension: the second half gates the first."""
    x, axis = follower.current(follower.value(node.args[0])), int(argument(node, "dim", -1))
    axis %= len(x.shape)
    shape = tuple(node.meta["val"].shape)
    if axis not in x.varying:
        return Value(ids=x.ids, shape=shape)
    first, second = x.ids.chunk(2, dim=axis)
    return follower.elementwise([Value(ids=ids, shape=shape) for ids in (first, second)], shape)


def _normalized(follower: Follower, node: fx.Node) -> Any:
    x, dims = follower.value(node.args[0]), len(node.args[1])  # type: ignore[arg-type]
    return follower.settle(x, range(-dims, 0), "it is normalized over")


def _softmax(follower: Follower, node: fx.Node) -> Any:
    return follower.settle(follower.value(node.args[0]), [cast(int, node.args[1])], "it is normalized over")


def _reduced(follower: Follower, node: fx.Node) -> Any:
    x = follower.value(node.args[0])
    dims = argument(node, "dim", None) if len(node.args) > 1 or "dim" in node.kwargs else None
    axes = range(len(x.shape)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    axes = {int(axis) % max(1, len(x.shape)) for axis in axes}
    x = follower.settle(x, axes, "it is averaged or summed over")
    val = node.meta["val"]
    first = val if isinstance(val, Tensor) else val[0]
    keep = first.ndim == len(x.shape)
    ids = x.ids
    for axis in sorted(axes, reverse=True):
        ids = ids.narrow(axis, 0, 1) if keep else ids.select(axis, 0)
    made = Value(ids=ids, shape=tuple(first.shape), own=False)
    return made if isinstance(val, Tensor) else [made for _ in val]


def _pooled(follower: Follower, node: fx.Node) -> Any:
    """Pooling and resizing: the dimensions after the channels change size, and must not carry channels."""
    x, val = follower.value(node.args[0]), node.meta["val"]
    first = val if isinstance(val, Tensor) else val[0]
    dims = 1 if "1d" in name_of(node) or name_of(node).endswith("linear1d") else 3 if "3d" in name_of(node) else 2
    x = follower.settle(x, range(len(x.shape) - dims, len(x.shape)), "it lies along an image dimension")
    made = Value(ids=x.ids, shape=tuple(first.shape))
    return made if isinstance(val, Tensor) else [made for _ in val]


def _pad(follower: Follower, node: fx.Node) -> Any:
    """Padding with a constant adds channels that are fixed; any other kind needs the width as it is."""
    x, pads = follower.current(follower.value(node.args[0])), list(node.args[1])  # type: ignore[arg-type]
    mode = argument(node, "mode", "constant") if name_of(node) == "pad" else "constant"
    ids = x.ids
    for place in range(len(pads) // 2):
        axis, amount = len(x.shape) - 1 - place, pads[2 * place : 2 * place + 2]
        if not any(amount) or axis not in x.varying:
            continue
        if mode != "constant":
            follower.ledger.freeze(x.ids, follower.why("it is padded"))
            continue
        ends = [torch.full_like(ids.narrow(axis, 0, 1), FROZEN).repeat_interleave(max(0, n), axis) for n in amount]
        ids = torch.cat([ends[0], ids, ends[1]], dim=axis)
        low, high = (max(0, -n) for n in amount)
        ids = ids.narrow(axis, low, ids.shape[axis] - low - high)
    return follower.current(Value(ids=ids, shape=tuple(node.meta["val"].shape), own=x.own))


def _index(follower: Follower, node: fx.Node) -> Any:
    """Take entries along one dimension, which must not carry channels."""
    x, places = follower.value(node.args[0]), node.args[1]
    used = [i for i, item in enumerate(places) if item is not None]  # type: ignore[arg-type]
    x = follower.settle(x, used, "entries are taken along it")
    shape = tuple(node.meta["val"].shape)
    if len(used) != 1 or not x.varying:
        follower.ledger.freeze(x.ids, follower.why("entries are taken along it"))
        return frozen_like(node.meta["val"])
    (axis,) = used
    extra = len(shape) - len(x.shape) + 1
    ids = x.ids.select(axis, 0).reshape(*x.ids.shape[:axis], *(1,) * extra, *x.ids.shape[axis + 1 :])
    return Value(ids=ids, shape=shape)


def _index_select(follower: Follower, node: fx.Node) -> Any:
    x = follower.settle(follower.value(node.args[0]), [cast(int, node.args[1])], "entries are taken along it")
    return Value(ids=x.ids, shape=tuple(node.meta["val"].shape))


_SITES: dict[str, Rule] = {"linear": _linear, "conv": _conv, "conv_transpose": _conv, "embedding": _embedding}

_ELEMENTWISE = """add sub rsub mul div true_divide pow maximum minimum fmin fmax where atan2 remainder lerp addcmul
addcdiv relu relu6 hardtanh clamp clamp_min clamp_max gelu silu mish elu selu celu leaky_relu hardswish hardsigmoid
sigmoid tanh softplus softsign logsigmoid log_sigmoid hardshrink softshrink threshold exp expm1 log log1p log2 sqrt
rsqrt square reciprocal neg abs sign sin cos tan erf floor ceil round trunc eq ne lt le gt ge logical_and logical_or
logical_not bitwise_and bitwise_or bitwise_not isnan isinf nan_to_num masked_fill floor_divide _conj"""
_VIEWS = """view reshape _unsafe_view permute transpose t numpy_T mT unsqueeze squeeze expand slice select narrow split
split_with_sizes chunk unsafe_split unsafe_chunk unbind cat concat stack flatten unflatten repeat repeat_interleave flip
roll pixel_shuffle pixel_unshuffle channel_shuffle movedim expand_as view_as tile swapaxes"""
_IDENTITIES = """clone contiguous dropout feature_dropout alpha_dropout detach alias to _to_copy type_as lift_fresh_copy
lift_fresh lift positive"""
_POOLED = """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d
max_pool2d_with_indices max_pool1d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_bilinear2d upsample_linear1d upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact2d
_upsample_nearest_exact1d grid_sampler"""
_REDUCED = "mean sum amax amin max min var std var_mean std_mean prod norm linalg_vector_norm logsumexp any all"
_FREE_MAKERS = """zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
scalar_tensor"""

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_VIEWS.split(), _view),
    **dict.fromkeys(_IDENTITIES.split(), _same),
    **dict.fromkeys(_POOLED.split(), _pooled),
    **dict.fromkeys(_REDUCED.split(), _reduced),
    **dict.fromkeys(_FREE_MAKERS.split(), _free),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm"), matmul),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "getitem": _getitem,
    "prelu": _prelu,
    "glu": _glu,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": attention,
    "index": _index,
    "index_select": _index_select,
    "arange": _frozen,
}
