"""Train the demo checkpoint: `python optimizer/recipes/train_digits.py [OUT]` writes digits.safetensors in seconds.

The test scans are looked at once, at the end, and nothing was chosen by them: epochs, rate and augmentation are the
first ones tried. Same torch, same machine, same bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.optimizer.recipes.digits import accuracy, network, train_scans

SEED = 0
EPOCHS = 40
BATCH = 64
PEAK_RATE = 5e-3
WEIGHT_DECAY = 0.05
SMOOTHING = 0.05


def train() -> nn.Module:
    """Train a fresh network on the train scans; deterministic given SEED."""
    torch.manual_seed(SEED)  # layer initialisation has no generator argument
    generator = torch.Generator().manual_seed(SEED)
    model, (x, y) = network(), train_scans()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for picks in torch.split(order[: len(x) // BATCH * BATCH], BATCH):
            loss = F.cross_entropy(model(shifted(x[picks], generator)), y[picks], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval()


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 12 % and move by up to 0.6 pixels, each scan on its own."""
    spread = torch.tensor([0.21, 0.12, 0.15, 0.15]).view(4, 1)  # radians, ratio, and half widths of the 8-pixel scan
    turn, scale, right, down = (2 * torch.rand(4, len(x), generator=generator) - 1) * spread
    cosine, sine = turn.cos() * (1 + scale), turn.sin() * (1 + scale)
    rows = torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(rows, list(x.shape), align_corners=False), align_corners=False)


def write(model: nn.Module, path: Path) -> float:
    """Write the checkpoint with how it was made in its metadata; return the test accuracy in percent."""
    percent = 100 * float(accuracy(model).mean())
    made = {
        "script": Path(__file__).name,
        "data": "sklearn.datasets.load_digits, 1197 train and 600 test scans",
        "seed": SEED,
        "epochs": EPOCHS,
        "torch": torch.__version__,
        "test_accuracy_percent": round(percent, 2),
    }
    # One key only: safetensors writes several metadata keys in an order that changes from run to run.
    save_file(model.state_dict(), path, metadata={"made": json.dumps(made)})
    return percent


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.safetensors")
    print(f"{target}: {write(train(), target):.2f} % of the test scans")
