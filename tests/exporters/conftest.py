"""Small networks of every kind of layer, with random packed weights of every form, exported once a session."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paredown.exporters import onnx as target
from paredown.exporters import tensorrt_engine, tensorrt_library
from paredown.optimizer.model import InputSpec, Model, Source, from_module
from paredown.optimizer.weight import Codebook, Dense, LowRank, Sum, Uniform, Weight

FORMS = ("codebook 3", "codebook 4 blocks groups", "uniform 8", "codebook 2 fp16", "uniform 4 groups", "codebook 8")


class Attention(nn.Module):
    """Embedding tied with the head, packed attention projections, linear layers on rank 3 and rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.inner = nn.Linear(16, 24)
        self.back = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.pool = nn.Linear(16, 5)
        self.pool_plain = nn.Linear(5, 3, bias=False)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens)
        y, _ = self.attention(x, x, x, need_weights=False)
        y = x + self.back(torch.relu(self.inner(y)))
        return {"logits": self.head(y), "pooled": self.pool_plain(torch.tanh(self.pool(y.mean(1))))}


class Convolutions(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions in one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.up_plain = nn.ConvTranspose2d(6, 4, 3, bias=False)
        self.line = nn.Conv1d(4, 6, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.plain(image)))
        x = self.up_plain(self.up(self.depthwise(self.grouped(x))))
        line: Tensor = self.line(x.flatten(2))
        return line


class Recurrent(nn.Module):
    """A bidirectional GRU on top of a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 4, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (hidden, _) = self.lstm(x)
        return self.gru(y)[0], hidden


class Pair(nn.Module):
    """Two inputs that share a batch; an output that is used again, and an input passed through."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.scale = nn.Parameter(torch.ones(1, 2, 4))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        total = torch.relu(self.left(left)) + self.right(right)
        return total, [(total.reshape(-1, 2, 4) * self.scale).sum(1), total], left


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(20, 17), nn.Linear(17, 12, bias=False), nn.Linear(12, 4)
        self.table = nn.Embedding(5, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(torch.relu(self.second(torch.relu(self.first(x + self.table.weight[:1])))))
        return y


def packed(values: Tensor, form: str, generator: torch.Generator) -> Weight:
    """Return a random weight of a form with the shape, the dtype and roughly the size of a matrix."""
    n, k = values.shape
    kind, bits = form.split()[0], int(form.split()[1])
    group = max(1, min(5, k - 1)) if "groups" in form else 0
    columns = -(-k // group) if group else 1
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (0.5 + torch.rand(n, columns, generator=generator)).half()
    spread = float(values.float().std()) if values.numel() > 1 else 1.0
    if kind == "uniform":
        zero = 2 ** (bits - 1)
        step = (scale * spread / zero).half()
        return Uniform(codes=codes, scale=step, zero=zero, code_bits=bits, group=group, dtype=values.dtype)
    rows = 16 if "blocks" in form else 0
    table = torch.randn(-(-n // rows) if rows else 1, 2**bits, generator=generator)
    stored = table.half() if "fp16" in form else (table.clamp(-3, 3) * 42).round().to(torch.int8)
    scale = (scale * spread * (1.0 if "fp16" in form else 3.0)).half()
    return Codebook(
        codes=codes, table=stored, scale=scale, code_bits=bits, group=group, table_rows=rows, dtype=values.dtype
    )


def pack_all(model: Model, forms: tuple[str, ...] = FORMS, seed: int = 0) -> Model:
    """Give each weight the next form in turn."""
    generator = torch.Generator().manual_seed(seed)
    changed = {
        name: packed(weight.dense(), forms[i % len(forms)], generator)
        for i, (name, weight) in enumerate(model.weights.items())
    }
    return model.with_weights(changed)


def pack_products(model: Model) -> Model:
    """Give each weight a low rank, a sum with a low rank, or a sum with a dense rest, in turn."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(w: Tensor) -> LowRank:
        left, right = w.new_ones(w.shape[0], 3) * w.std(), w[:3]
        return LowRank(left=packed(left, "codebook 4", generator), right=packed(right, "uniform 8", generator))

    changed: dict[str, Weight] = {}
    for i, (name, weight) in enumerate(model.weights.items()):
        w = weight.dense()
        base = packed(w, "codebook 3", generator)
        small = LowRank(left=Dense(values=w[:, :2] * 0.1), right=packed(w[:2], "codebook 4", generator))
        changed[name] = (low_rank(w), Sum(terms=(base, small)), Sum(terms=(base, Dense(values=w * 0.01))))[i % 3]
    return model.with_weights(changed)


def build(module: Callable[[], nn.Module], *inputs: InputSpec, dtype: torch.dtype = torch.float32) -> Model:
    """Return the model of a seeded module."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = module().to(dtype)
    return from_module(made, inputs, Source(entry="nets.py:net"))


IMAGE = InputSpec(name="image", shape=("batch", 3, 8, 8))
ROWS = InputSpec(name="x", shape=("batch", 20))
STEPS = InputSpec(name="steps", shape=("batch", "time", 6))
TOKENS = InputSpec(name="tokens", shape=("batch", "seq"), dtype="int64")
LEFT, RIGHT = InputSpec(name="a", shape=("batch", 6)), InputSpec(name="b", shape=("batch", 4))
HALF = InputSpec(name="x", shape=("batch", 20), dtype="float16")

NETS: dict[str, Callable[[], Model]] = {
    "attention": lambda: pack_all(build(Attention, TOKENS)),
    "convolutions": lambda: pack_all(build(Convolutions, IMAGE)),
    "recurrent": lambda: pack_all(build(Recurrent, STEPS)),
    "pair": lambda: pack_all(build(Pair, LEFT, RIGHT), ("uniform 4 groups", "codebook 5")),
    "half": lambda: pack_all(build(Perceptron, HALF, dtype=torch.float16)),
    "products": lambda: pack_products(build(Perceptron, ROWS)),
    "product convolutions": lambda: pack_products(build(Convolutions, IMAGE)),
    "dense": lambda: build(Attention, TOKENS),
}


def use_standin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where `tensorrt` is imported from, here and in the building process, and a GPU of 8.7 beside."""
    shutil.copy(Path(__file__).with_name("standin_tensorrt.py"), folder / "tensorrt.py")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(tensorrt_library, "capability", lambda: "8.7")
    here = tensorrt_engine.Place(device=torch.device("cpu"), stream=None)
    monkeypatch.setattr(tensorrt_engine, "place", lambda: here)
    sys.modules.pop("tensorrt", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    model: Model
    path: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    folder, made = tmp_path_factory.mktemp("exported"), dict[str, Exported]()

    def get(name: str) -> Exported:
        if name not in made:
            model, path = NETS[name](), folder / f"{name.replace(' ', '_')}.onnx"
            target.export(model, path)
            made[name] = Exported(model=model, path=path)
        return made[name]

    return get


@pytest.fixture
def perceptron() -> Model:
    """A small network of three packed linear layers."""
    return pack_all(build(Perceptron, ROWS))


SLOW_NETS = {"recurrent", "half", "product convolutions"}
"""Those that a test of every network leaves to the whole run."""


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_NETS)) for name in NETS])
def net(request: pytest.FixtureRequest, exported: Callable[[str], Exported]) -> Exported:
    return exported(request.param)
