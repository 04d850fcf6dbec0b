"""Dynamic int8 activations: which layers round their inputs to signed bytes at run time, and torch's form of that.

    round_inputs    rint(x * (127 / max |x|)) * (max |x| / 127) for each run of up to 128 inputs within a group
    round_images    the same, for all values of each image that is convolved
    low_rank_rest   y + ((x - rounded) R^T) L^T: a low rank beside the codes sees what rounding left off, since kernels
                    multiply it by the inputs as they are

both in float32, round half to even, as `kernels/cpu/paredown.h` says. Nothing is calibrated: a run has the range of its
own values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx

from ..kernels import lut_conv, lut_reference
from . import packed
from .errors import RecipeError
from .graph import Graph, Site
from .model import Model
from .steps import Decision, short
from .weight import LowRank

_LIBRARY: Any = torch.library.Library("paredown", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("round_inputs(Tensor x, int group) -> Tensor")
_LIBRARY.define("round_images(Tensor x) -> Tensor")
_LIBRARY.define("low_rank_rest(Tensor y, Tensor x, Tensor rounded, Tensor right, Tensor left) -> Tensor")


def operators() -> tuple[Any, ...]:
    """Return the operators as a graph holds them, in the order above; each gives its first argument's shape."""
    ops = torch.ops.paredown
    return ops.round_inputs.default, ops.round_images.default, ops.low_rank_rest.default


def mark(decisions: Sequence[Decision], uses: Mapping[str, Sequence[Site]]) -> tuple[Decision, ...]:
    """Ask for rounded inputs where a kernel can take them; RecipeError where no layer of the plan is like that."""
    able = {decision.layer for decision in decisions if not _refused(decision, uses)}
    if not able:
        raise RecipeError(
            "activations: dynamic needs a layer of evenly spaced levels or int8 tables with an int8 kernel (linear, "
            "convolution of one group), the step has none",
            fix="use table: int8, and group: 0 for convolutions, or leave activations out",
        )
    return tuple(replace(x, activations="dynamic") if x.layer in able else x for x in decisions)


def apply(model: Model, decisions: Sequence[Decision], graph: Graph) -> tuple[Model, tuple[str, ...]]:
    """Return the model with rounded inputs where a decision asks and the weight allows it, and notes on the rest."""
    uses = graph.of_param()
    reasons: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.method:
            asked = decision.activations == "dynamic"
            reason = _reason(model, decision.layer, uses) or _other_reader(graph, uses[decision.layer])
            reason = reason or ("" if asked else "the plan says so")
            reasons.setdefault(reason, []).append(decision.layer)
    taken = reasons.pop("", [])
    notes = [f"dynamic int8 activations: the inputs of {len(taken)} layers are rounded at run time"]
    for reason, names in reasons.items():
        notes.append(f"inputs are not rounded: {', '.join(map(short, names))} ({reason})")
    return replace(model, dynamic=model.dynamic | frozenset(taken)), tuple(notes)


def insert(graph: fx.Graph, captured: Graph, model: Model) -> dict[str, Tensor]:
    """Round the inputs of `model.dynamic` in a copy of the captured graph; return the constants that it then reads."""
    held: dict[str, Tensor] = {}
    known: dict[tuple[Any, ...], fx.Node] = {}
    sites = {name: site for name, (site, *_) in captured.sites.items() if site.kind in ("linear", "conv")}
    for node in list(graph.nodes):
        site = sites.get(node.name)
        if site is None or site.param not in model.dynamic:
            continue
        found = packed.terms(model.weights[site.param])
        assert found is not None
        x = node.args[site.operand]
        inputs, images, _ = operators()
        target, key = (images, (x,)) if site.kind == "conv" else (inputs, (x, found.base.group))
        if key not in known:
            known[key] = _call_before(graph, node, target, key, x)
        node.update_arg(site.operand, known[key])
        if found.low is not None:
            _add_rest(graph, node, (x, known[key]), _factors(held, site.param, found.low))
    return held


def _factors(held: dict[str, Tensor], param: str, low: LowRank) -> tuple[str, str]:
    """Put the factors of a low rank among the constants; return their names, right one first."""
    stem = param.replace(".", "_")
    names = f"{stem}_right", f"{stem}_left"
    held |= dict(zip(names, (low.right.dense(), low.left.dense()), strict=True))
    return names


def _call_before(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        made = graph.call_function(target, args)
    made.meta = {key: value for key, value in node.meta.items() if key == "nn_module_stack"}
    made.meta |= {"val": like.meta["val"]} if "val" in like.meta else {}
    return made


def _add_rest(graph: fx.Graph, node: fx.Node, inputs: tuple[fx.Node, fx.Node], constants: tuple[str, str]) -> None:
    with graph.inserting_after(node):
        made = graph.call_function(operators()[2], (node, *inputs))
    made.meta = {key: node.meta[key] for key in ("nn_module_stack", "val") if key in node.meta}
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    with graph.inserting_before(made):
        made.args = (*made.args, *(graph.create_node("get_attr", name) for name in constants))


def _refused(decision: Decision, uses: Mapping[str, Sequence[Site]]) -> bool:
    """Whether a decision cannot lead to rounded inputs, as far as a plan knows."""
    if not decision.method or _site_reason(uses.get(decision.layer, ())):
        return True
    made = decision.spec.format
    layouts = [site.layout for site in uses[decision.layer]]
    if any(layout.kind == "conv" and 0 < made.group < layout.matrix_shape[1] for layout in layouts):
        return True
    return decision.method != "uniform" and getattr(made, "table", "int8") != "int8"


def _reason(model: Model, name: str, uses: Mapping[str, Sequence[Site]]) -> str:
    return _site_reason(uses.get(name, ())) or packed.dynamic_refusal(model.weights[name], model.layouts[name])


def _other_reader(graph: Graph, sites: Sequence[Site]) -> str:
    """Return that an operator which is no site of a weight reads it too, as one that rounds no inputs, "" if none."""
    own = {site.node for site in sites}
    others = graph.readers(sites[0].param) - own
    # A view of the weight, such as its transpose, that only its sites read.
    views = {node.name for node in graph.nodes if node.name in others and {user.name for user in node.users} <= own}
    return "something else reads the weight too" if others - views else ""


def _site_reason(sites: Sequence[Site]) -> str:
    """Return why a weight with these uses has no int8 kernel; looking up rows is exact anyway."""
    products = [site for site in sites if site.kind != "embedding"]
    if not products:
        return "an embedding multiplies nothing" if sites else "no operator that paredown knows multiplies it"
    kinds = {site.kind for site in products}
    if "recurrent" in kinds:
        return "recurrent operators have no int8 kernel"
    if "conv_transpose" in kinds:
        return "transposed convolutions have no int8 kernel"
    if kinds == {"conv", "linear"}:
        return "both a linear layer and a convolution use it"
    if kinds == {"conv"} and (reason := packed.conv_shape_refusal(products[0].layout)):
        return reason
    rows = products[0].layout.matrix_shape[0]
    return "" if all((site.first, site.count) == (0, rows) for site in products) else "it is used in parts"


def round_inputs(x: Float[Tensor, "... k"], group: int) -> Float[Tensor, "... k"]:
    """Return inputs rounded to signed bytes, times their scales, in the dtype of x."""
    return lut_reference.round_inputs(x, group).to(x.dtype).contiguous()


def _round_images(x: Tensor) -> Tensor:
    return lut_conv.round_images(x).to(x.dtype).contiguous()


def _low_rank_rest(y: Tensor, x: Tensor, rounded: Tensor, right: Tensor, left: Tensor) -> Tensor:
    rest = (x.float() - rounded.float()) @ right.float().T @ left.float().T
    return (y.float() + rest).to(y.dtype).contiguous()


def _like(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY.impl("round_inputs", round_inputs, "CompositeExplicitAutograd")
_LIBRARY.impl("round_images", _round_images, "CompositeExplicitAutograd")
_LIBRARY.impl("low_rank_rest", _low_rank_rest, "CompositeExplicitAutograd")
torch.library.register_fake("paredown::round_inputs", _like, lib=_LIBRARY)
torch.library.register_fake("paredown::round_images", _like, lib=_LIBRARY)
torch.library.register_fake("paredown::low_rank_rest", _like, lib=_LIBRARY)
