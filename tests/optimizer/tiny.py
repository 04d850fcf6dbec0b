"""A tiny project in a folder (network, data, metric, recipe, trained weights), and the command run on it in-process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paredown.optimizer import cli

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.conv2(x))
        return self.linear(x.mean((2, 3)))

def build():
    return Net()

def calibration(samples, seed):
    return torch.randn(samples, 3, 12, 12, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
def score(model):
    x = torch.randn(50, 3, 12, 12, generator=torch.Generator().manual_seed(9))
    return (model(x).argmax(1) == 3).double()
"""

RECIPE = """
model: {entry: "net.py:build", checkpoint: net.safetensors, inputs: {x: [batch, 3, 12, 12]}}
data: {entry: "net.py:calibration", samples: 16}
metric: {entry: "net.py:score"}
steps:
  - quantize: {quantizer: kmeans, bits: 4}
export: [onnx]
""".lstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the command printed and returned. `error`: the lines on stderr that are no progress."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> list[str]:
        lines = [line for line in self.err.splitlines() if line]
        return [line for line in lines if line.startswith("optimize:") or not (line.endswith(" ...") or line[0] == " ")]


def project(folder: Path) -> Path:
    """Write the project into a folder."""
    (folder / "net.py").write_text(NET)
    (folder / "recipe.yaml").write_text(RECIPE)
    save_file(_weights(), folder / "net.safetensors")
    return folder


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that is there."""
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new))


def reweight(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Change the weights of the project."""
    path = folder / "net.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(dict(change(state)), path)


def optimize(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> Outcome:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["optimize", *map(str, args)])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return Outcome(code=caught.value.code, out=out.getvalue(), err=err.getvalue())


def listing(folder: Path) -> set[str]:
    """Return every path in a folder, hidden ones too, but for Python's caches."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv1.weight": (8, 3, 3, 3), "conv2.weight": (16, 8, 3, 3), "linear.weight": (10, 16)}
    state = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    state |= {"conv2.bias": torch.zeros(16), "linear.bias": torch.linspace(-1, 1, 10)}
    return state | {f"bn.{name}": value for name, value in nn.BatchNorm2d(8).state_dict().items()}
