"""The zoo: every small network with its inputs and the sites that its graph must show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from paredown.optimizer.model import InputSpec

from .net import Net as Net


def _image(channels: int = 3) -> tuple[InputSpec, ...]:
    return (InputSpec(name="image", shape=("batch", channels, 8, 8)),)


_TOKENS = InputSpec(name="tokens", shape=("batch", "time"), dtype="int64")
_STEPS = (InputSpec(name="steps", shape=("batch", "time", 5)),)


BERT_LAYER = """
layers.{0}.query.weight linear 0:8
layers.{0}.key.weight linear 0:8
layers.{0}.value.weight linear 0:8
layers.{0}.output.weight linear 0:8
layers.{0}.grow.weight linear 0:16
layers.{0}.shrink.weight linear 0:8
"""
LLAMA_LAYER = """
layers.{0}.q_proj.weight linear 0:16
layers.{0}.k_proj.weight linear 0:8
layers.{0}.v_proj.weight linear 0:8
layers.{0}.o_proj.weight linear 0:16
layers.{0}.gate_proj.weight linear 0:20
layers.{0}.up_proj.weight linear 0:20
layers.{0}.down_proj.weight linear 0:16
"""
VISION_LAYER = """
blocks.{0}.attention.in_proj_weight linear 0:24
blocks.{0}.attention.out_proj.weight linear 0:8
blocks.{0}.grow.weight linear 0:16
blocks.{0}.shrink.weight linear 0:8
"""
GRU_LAYER = """
gru.weight_ih_l{0} recurrent 0:18
gru.weight_hh_l{0} recurrent 0:18
gru.weight_ih_l{0}_reverse recurrent 0:18
gru.weight_hh_l{0}_reverse recurrent 0:18
"""
LSTM_LAYER = """
lstm.weight_ih_l{0} recurrent 0:24
lstm.weight_hh_l{0} recurrent 0:24
"""
CELL = """
cell.weight_ih recurrent 0:18
cell.weight_hh recurrent 0:18
"""

EXCITED_BLOCK = """
blocks.{0}.expand.weight conv 0:{1}
blocks.{0}.filter.weight conv 0:{1}
blocks.{0}.squeeze.weight conv 0:4
blocks.{0}.excite.weight conv 0:{1}
blocks.{0}.project.weight conv 0:8
"""
APART_BLOCK = """
blocks.{0}.attention.query.weight linear 0:12
blocks.{0}.attention.key.weight linear 0:12
blocks.{0}.attention.value.weight linear 0:12
blocks.{0}.attention.output.weight linear 0:12
blocks.{0}.grow.weight linear 0:16
blocks.{0}.shrink.weight linear 0:12
"""
PACKED_BLOCK = """
blocks.{0}.attention.qkv.weight linear 0:36
blocks.{0}.attention.proj.weight linear 0:12
blocks.{0}.grow.weight linear 0:16
blocks.{0}.shrink.weight linear 0:12
"""
PATCHES = """
embed.weight conv 0:12
positions.weight embedding 0:4
"""
TAGGER_LAYER = """
lstm.weight_ih_l{0} recurrent 0:32
lstm.weight_hh_l{0} recurrent 0:32
lstm.weight_ih_l{0}_reverse recurrent 0:32
lstm.weight_hh_l{0}_reverse recurrent 0:32
"""

NETS = (
    Net(
        file="convolutions",
        name="residual",
        inputs=_image(),
        sites="""
stem.weight conv 0:6
blocks.0.conv1.weight conv 0:6
blocks.0.conv2.weight conv 0:6
blocks.1.conv1.weight conv 0:10
blocks.1.conv2.weight conv 0:10
head.weight linear 0:5
""",
    ),
    Net(
        file="convolutions",
        name="separable",
        inputs=_image(),
        sites="""
0.weight conv 0:8
3.0.weight conv 0:8
3.3.weight conv 0:12
4.0.weight conv 0:12
4.3.weight conv 0:8
8.weight linear 0:4
""",
    ),
    Net(
        file="convolutions",
        name="waves",
        inputs=(InputSpec(name="wave", shape=("batch", 2, "time")),),
        sizes={"time": 16},
        sites="""
encode.weight conv 0:8
context.weight conv 0:8
head.weight linear 0:6
""",
    ),
    Net(
        file="convolutions",
        name="encoder_decoder",
        inputs=_image(),
        sites="""
down1.weight conv 0:6
down2.weight conv 0:8
up.weight conv_transpose 0:6
grouped_up.weight conv_transpose 0:4
out.weight conv 0:2
""",
    ),
    Net(
        file="convolutions",
        name="squeeze_excite",
        inputs=_image(),
        sites="""
conv.weight conv 0:8
squeeze.weight conv 0:4
excite.weight conv 0:8
head.weight conv 0:3
""",
    ),
    Net(
        file="convolutions",
        name="grouped",
        inputs=_image(4),
        sites="""
first.weight conv 0:12
second.weight conv 0:6
head.weight linear 0:3
""",
    ),
    Net(
        file="convolutions",
        name="detector",
        inputs=_image(),
        sites="""
stem.weight conv 0:8
deeper.weight conv 0:8
head.weight conv 0:6
head.weight conv 0:6
score.weight linear 0:3
""",
    ),
    Net(
        file="features",
        name="dense",
        inputs=_image(),
        sites="""
stem.weight conv 0:8
first.0.conv.weight conv 0:6
first.1.conv.weight conv 0:6
between.weight conv 0:10
second.conv.weight conv 0:6
head.weight linear 0:5
""",
    ),
    Net(
        file="features",
        name="restorer",
        inputs=_image(),
        sites="""
stem.weight conv 0:8
blocks.0.conv1.weight conv 0:12
blocks.0.conv2.weight conv 0:8
blocks.1.conv1.weight conv 0:12
blocks.1.conv2.weight conv 0:8
grow.weight conv 0:24
out.weight conv 0:3
""",
    ),
    Net(
        file="features",
        name="gated",
        inputs=_image(),
        sites="""
first.weight conv 0:16
second.weight conv 0:24
out.weight conv 0:4
""",
    ),
    Net(
        file="features",
        name="segmenter",
        inputs=_image(),
        sites="""
fine.weight conv 0:8
coarse.weight conv 0:12
context.weight conv 0:12
narrow.weight conv 0:8
auxiliary.weight conv 0:3
score.weight linear 0:2
mask.weight conv 0:3
""",
    ),
    Net(
        file="features",
        name="multiplied",
        inputs=(InputSpec(name="wave", shape=("batch", 4, "time")),),
        sizes={"time": 16},
        sites="""
encode.weight conv 0:8
twice.weight conv 0:16
mix.weight conv 0:6
thrice.weight conv 0:18
gather.weight conv 0:6
head.weight linear 0:3
""",
    ),
    Net(
        file="features",
        name="excited",
        inputs=_image(),
        sites="stem.weight conv 0:8"
        + EXCITED_BLOCK.format(0, 16)
        + EXCITED_BLOCK.format(1, 12)
        + "head.2.weight linear 0:12\nclassify.weight linear 0:4",
    ),
    Net(
        file="transformers",
        name="vision",
        inputs=_image(),
        sites="patches.weight conv 0:8" + VISION_LAYER.format(0) + VISION_LAYER.format(1) + "head.weight linear 0:4",
    ),
    Net(
        file="transformers",
        name="cross_attention",
        inputs=(
            InputSpec(name="query", shape=("batch", "queries", 8)),
            InputSpec(name="memory", shape=("batch", "time", 8)),
        ),
        sizes={"queries": 5, "time": 7},
        sites="""
attention.in_proj_weight linear 0:8
attention.in_proj_weight linear 8:16
attention.in_proj_weight linear 16:24
attention.out_proj.weight linear 0:8
shared.in_proj_weight linear 0:8
shared.in_proj_weight linear 8:24
shared.out_proj.weight linear 0:8
head.weight linear 0:3
""",
    ),
    Net(
        file="transformers",
        name="llama",
        inputs=(_TOKENS,),
        high=24,
        sizes={"time": 7},
        sites="embed_tokens.weight embedding 0:24"
        + LLAMA_LAYER.format(0)
        + LLAMA_LAYER.format(1)
        + "embed_tokens.weight linear 0:24",
    ),
    Net(
        file="transformers",
        name="bert",
        inputs=(_TOKENS, InputSpec(name="mask", shape=("batch", "time"), dtype="int64")),
        high=20,
        sizes={"time": 7},
        sites="""
words.weight embedding 0:20
positions.weight embedding 0:16
types.weight embedding 0:2
"""
        + BERT_LAYER.format(0)
        + BERT_LAYER.format(1)
        + "pooler.weight linear 0:8",
    ),
    Net(
        file="transformers",
        name="raw",
        inputs=(InputSpec(name="x", shape=("batch", "time", 6)),),
        sizes={"time": 5},
        sites="""
expand.weight linear_t 0:18
linear linear 0:8
right linear_t 0:5
both_ways linear_t 0:5
both_ways linear 0:5
""",
    ),
    Net(
        file="attentions",
        name="apart",
        inputs=_image(),
        sites=PATCHES + APART_BLOCK.format(0) + APART_BLOCK.format(1) + "head.weight linear 0:4",
    ),
    Net(
        file="attentions",
        name="packed",
        inputs=_image(),
        sites=PATCHES + PACKED_BLOCK.format(0) + PACKED_BLOCK.format(1) + "head.weight linear 0:4",
    ),
    Net(
        file="attentions",
        name="swiglu",
        inputs=(InputSpec(name="x", shape=("batch", "time", 6)),),
        sizes={"time": 5},
        sites="""
embed.weight linear 0:8
layers.0.gate_up.weight linear 0:28
layers.0.down.weight linear 0:8
layers.1.gate_up.weight linear 0:20
layers.1.down.weight linear 0:8
head.weight linear 0:3
""",
    ),
    Net(
        file="recurrent",
        name="gru",
        inputs=_STEPS,
        sizes={"time": 6},
        sites=GRU_LAYER.format(0) + GRU_LAYER.format(1) + "head.weight linear 0:4",
    ),
    Net(
        file="recurrent",
        name="lstm",
        inputs=_STEPS,
        sizes={"time": 6},
        sites=LSTM_LAYER.format(0) + LSTM_LAYER.format(1) + "head.weight linear 0:4",
    ),
    Net(
        file="recurrent",
        name="cells",
        inputs=(InputSpec(name="steps", shape=("batch", 4, 5)),),
        sites=CELL * 4 + "head.weight linear 0:2",
    ),
    Net(
        file="recurrent",
        name="gru_classifier",
        inputs=_STEPS,
        sizes={"time": 6},
        sites="""
embed.weight linear 0:8
gru.weight_ih_l0 recurrent 0:30
gru.weight_hh_l0 recurrent 0:30
gru.weight_ih_l1 recurrent 0:30
gru.weight_hh_l1 recurrent 0:30
head.weight linear 0:4
""",
    ),
    Net(
        file="recurrent",
        name="lstm_tagger",
        inputs=_STEPS,
        sizes={"time": 6},
        sites=TAGGER_LAYER.format(0) + TAGGER_LAYER.format(1) + "inner.weight linear 0:10\nhead.weight linear 0:4",
    ),
)

ZOO = {net.name: net for net in NETS}
"""Name -> network."""
NORMALIZED = ("residual", "separable", "waves", "encoder_decoder", "squeeze_excite", "grouped", "detector")
"""Those with batch normalizations that all fold."""


def in_turn(names: Iterable[str], turn: int) -> list[Any]:
    """Return networks as parameters of a test, every fifth in the fast suite; with other turns it is others' turn."""
    marks = ((), pytest.mark.slow)
    return [pytest.param(name, marks=marks[i % 5 != turn]) for i, name in enumerate(names)]
