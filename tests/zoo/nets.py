"""The zoo: every small network with its inputs, seeded batches and the sites that its graph must show."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from paredown.optimizer.model import InputSpec, Model, Source, SourceFile, from_module

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network of the zoo.

    file, name: `<file>.py:<name>` builds it. high: whole-number inputs lie below it. sizes: a value for each named
    dimension but the batch. sites: each use of a weight in graph order, one a line: parameter, kind, rows; "linear_t"
    is a parameter (in, out) that multiplies from the right.
    """

    file: str
    name: str
    inputs: tuple[InputSpec, ...]
    high: int = 2
    sizes: Mapping[str, int] = field(default_factory=dict)
    sites: str

    def build(self) -> nn.Module:
        """Return the network, the same one each time, its normalizations as if trained."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: nn.Module = getattr(importlib.import_module(f".{self.file}", __package__), self.name)()
            for part in module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    _settle(part)
        return module.eval()

    def batch(self, size: int, seed: int = 0, **sizes: int) -> tuple[Tensor, ...]:
        """Return one seeded input per spec; named dimensions as given."""
        generator = torch.Generator().manual_seed(seed)
        known = {"batch": size, **self.sizes, **sizes}
        return tuple(self._example(spec, known, generator) for spec in self.inputs)

    def batches(self, *sizes: int) -> list[tuple[Tensor, ...]]:
        """Return batches of the given sizes."""
        return [self.batch(size, seed) for seed, size in enumerate(sizes)]

    def source(self) -> Source:
        name = f"{self.file}.py"
        return Source(entry=f"{name}:{self.name}", files=(SourceFile(name=name, text=(FOLDER / name).read_text()),))

    def model(self) -> Model:
        return from_module(self.build(), self.inputs, self.source())

    def _example(self, spec: InputSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.dtype != "int64":
            return torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))
        return torch.randint(0, 2 if spec.name == "mask" else self.high, shape, generator=generator)


def _settle(norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Give a normalization statistics, gains and shifts that are neither 0 nor 1, some of them negative."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight, std=1.0)
        nn.init.normal_(norm.bias, std=0.5)


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
)

ZOO = {net.name: net for net in NETS}
"""Name -> network."""
NORMALIZED = ("residual", "separable", "waves", "encoder_decoder", "squeeze_excite", "grouped", "detector")
"""Those with batch normalizations."""
