"""UltraFace slim-320, a single-shot face detector (its repository's README; SSD, arXiv 1512.02325), and its metrics.

Checkpoint `face/ultraface_slim_320.safetensors`. There are 6 images and no labels: calibration varies images 0, 2, 4,
and the metric is the agreement with the uncompressed network on images 1, 3, 5.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

CHECKPOINT = "face/ultraface_slim_320.safetensors"
IMAGES = "face/face_images_6.npz"
CALIBRATION_BATCH = 16
SEEN = 0.3  # an anchor counts where either network gives it this score for a face
BLOCKS = (32, 32, 32, 64, 64, 64, 64, 128, 128, 128, 256, 256)
HALVED = (2, 4, 8, 11)  # the modules of stride 2, counted from 0
TAPPED = (7, 10, 12)  # the modules whose output is a feature of the heads
HEADS = ((64, 3), (128, 2), (256, 2), (256, 3))  # channels of a feature, anchors in each of its cells


class UltraFace(nn.Module):
    """Scores [batch, 4420, 2] (background, face), raw boxes [batch, 4420, 4] of images [batch, 3, 240, 320]."""

    def __init__(self) -> None:
        super().__init__()
        modules = [nn.Sequential(nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())]
        for i, (inputs, outputs) in enumerate(zip((16, *BLOCKS), BLOCKS, strict=False), start=1):
            modules.append(_separable(inputs, outputs, 2 if i in HALVED else 1))
        self.base_net = nn.Sequential(*modules)
        down = nn.Sequential(nn.Conv2d(64, 64, 3, 2, padding=1, groups=64), nn.ReLU(), nn.Conv2d(64, 256, 1))
        self.extras = nn.ModuleList([nn.Sequential(nn.Conv2d(256, 64, 1), nn.ReLU(), down, nn.ReLU())])
        self.classification_headers = nn.ModuleList(_heads(values=2))
        self.regression_headers = nn.ModuleList(_heads(values=4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = []
        for i, module in enumerate(self.base_net):
            x = module(x)
            if i in TAPPED:
                features.append(x)
        features.append(self.extras[0](x))
        scores, boxes = _read(self.classification_headers, features, 2), _read(self.regression_headers, features, 4)
        return scores.softmax(2), boxes


def ultraface() -> nn.Module:
    return UltraFace()


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Draw images 0, 2, 4, flipped by chance and made darker or lighter by up to 30 %, in batches of 16."""
    generator = torch.Generator().manual_seed(seed)
    pool = _images()[0::2]
    picks = torch.randint(len(pool), (samples,), generator=generator)
    gain = 0.7 + 0.6 * torch.rand(samples, 1, 1, 1, generator=generator)
    flip = torch.rand(samples, generator=generator) < 0.5
    x = (pool[picks] * gain).clamp(max=255)
    x[flip] = x[flip].flip(3)
    return [(part,) for part in _scaled(x).split(CALIBRATION_BATCH)]


@torch.no_grad()
def agreement(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score the overlap of the face scores p and those of the uncompressed network q for each of images 1, 3, 5.

    The overlap is sum min(p, q) / sum max(p, q) over the anchors that either gives at least SEEN: 1 means the same.
    """
    from safetensors.torch import load_file

    x = _scaled(_images()[1::2])
    reference = ultraface().eval()
    reference.load_state_dict(load_file(_data().folder() / CHECKPOINT))
    p, q = _first(model(x))[:, :, 1].double(), reference(x)[0][:, :, 1].double()
    seen = torch.maximum(p, q) >= SEEN
    return ((torch.minimum(p, q) * seen).sum(1) / (torch.maximum(p, q) * seen).sum(1)).numpy()


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), pointwise, nn.BatchNorm2d(outputs), nn.ReLU())


def _heads(values: int) -> list[nn.Module]:
    """Return a separable head for each of the first three features and a plain 3x3 one for the last."""
    heads: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.ReLU(),
            nn.Conv2d(channels, anchors * values, 1),
        )
        for channels, anchors in HEADS[:3]
    ]
    return [*heads, nn.Conv2d(HEADS[3][0], HEADS[3][1] * values, 3, padding=1)]


def _read(heads: nn.ModuleList, features: list[Tensor], values: int) -> Tensor:
    """Lay the heads' outputs out as [batch, anchors, values], row by row of each feature."""
    maps = (head(feature) for head, feature in zip(heads, features, strict=True))
    return torch.cat([part.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, values)) for part in maps], dim=1)


def _images() -> Tensor:
    return torch.from_numpy(_data().arrays(IMAGES)["x"]).permute(0, 3, 1, 2).float()


def _scaled(images: Tensor) -> Tensor:
    return ((images - 127) / 128).contiguous()


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
