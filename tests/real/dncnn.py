"""DnCNN-S for Gaussian noise of sigma 25 (Zhang et al. 2017, arXiv 1608.03981), its calibration crops and metrics.

Checkpoint `denoise/dncnn_s_25.safetensors`. The network predicts the noise. Calibration: crops of 8 BSD68 images;
metric: the 12 images of Set12.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

SIGMA = 25 / 255
CROP = 64
CALIBRATION_BATCH = 16
CHANNELS, MIDDLE_LAYERS = 64, 15


class DnCNN(nn.Module):
    """The noise in gray images [batch, 1, height, width] with values 0..1."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False), nn.ReLU()]
        for _ in range(MIDDLE_LAYERS):
            convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(CHANNELS), nn.ReLU()]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(CHANNELS, 1, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.dncnn(x)


def dncnn() -> nn.Module:
    return DnCNN()


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Draw noisy 64x64 crops of the 8 calibration images, in batches of 16."""
    generator = torch.Generator().manual_seed(seed)
    pool = [torch.from_numpy(image.copy()).float() / 255 for image in _data().images("denoise/bsd68_calib_8.npz")]
    crops = torch.stack([_crop(pool, generator) for _ in range(samples)]).unsqueeze(1)
    noisy = crops + SIGMA * torch.randn(crops.shape, generator=generator)
    return [(part,) for part in noisy.split(CALIBRATION_BATCH)]


def psnr(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score the PSNR in dB of each of the 12 images of Set12, one image (256x256 or 512x512) a call."""
    return _psnr(model, range(12))


def psnr_256(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score the PSNR in dB of the first 7 images of Set12, those of 256x256: a quarter of the cost of `psnr`."""
    return _psnr(model, range(7))


@torch.no_grad()
def _psnr(model: Callable[..., Tensor | tuple[Tensor, ...]], picks: Iterable[int]) -> npt.NDArray[np.float64]:
    images = _data().images("denoise/set12.npz")
    scores = []
    for i in picks:
        clean = torch.from_numpy(images[i].copy()).float()[None, None] / 255
        noisy = clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(i))
        error = (noisy - _first(model(noisy))).clamp(0, 1).double() - clean
        scores.append(-10 * float(error.square().mean().log10()))
    return np.array(scores)


def _crop(pool: list[Tensor], generator: torch.Generator) -> Tensor:
    image = pool[int(torch.randint(len(pool), (), generator=generator))]
    top, left = (int(torch.randint(size - CROP + 1, (), generator=generator)) for size in image.shape)
    return image[top : top + CROP, left : left + CROP]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
