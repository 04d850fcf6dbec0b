"""DTLN speech enhancement, four LSTM layers (Westhausen & Meyer 2020, arXiv 2005.07551), its calibration and metrics.

Checkpoint `speech/dtln_base.safetensors`. There are 3 clips of 5 s: calibration mixes the speech and the noise of the
first anew, the metric is on the other two. torch.export (2.13) fixes the length of a recurrence and its cost grows
with it, so calibration and metric both use seconds (128 frames); the module itself takes any number of frames.
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

FRAME, HOP, BINS, WIDTH, CODES = 512, 128, 257, 128, 256
EDGE = FRAME - HOP  # zeros before and after a clip, so that every sample lies in four frames
CALIBRATION_BATCH = 16
SECOND = 16000
CLIPS = ("0015", "0072", "0523")


class Separator(nn.Module):
    """Two LSTM layers and a mask between 0 and 1, [batch, time, inputs] -> the same shape."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.lstm1 = nn.LSTM(inputs, WIDTH, batch_first=True)
        self.lstm2 = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.dense = nn.Linear(WIDTH, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.lstm2(self.lstm1(x)[0])[0]).sigmoid()


class Norm(nn.Module):
    """Normalise each frame over its values, with eps inside the root."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(values)), nn.Parameter(torch.zeros(values))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(2, keepdim=True)
        return centred / (centred.square().mean(2, keepdim=True) + 1e-7).sqrt() * self.gamma + self.beta


class DTLN(nn.Module):
    """Enhanced frames of the noisy `frames` [batch, time, 512]; the frames overlap by 384 samples and are to be added.

    The Fourier transforms are products with constant matrices, which every runtime has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sep1, self.sep2, self.norm1 = Separator(BINS), Separator(CODES), Norm(CODES)
        self.enc, self.dec = nn.Linear(FRAME, CODES, bias=False), nn.Linear(CODES, FRAME, bias=False)
        angle = 2 * torch.pi / FRAME * torch.outer(torch.arange(FRAME), torch.arange(BINS)).double()
        twice = torch.full((BINS, 1), 2.0).index_fill(0, torch.tensor([0, BINS - 1]), 1.0)  # both halves but the ends
        for name, basis in (("cosine", angle.cos()), ("sine", -angle.sin())):
            self.register_buffer(name, basis.float(), persistent=False)
            self.register_buffer(f"{name}_inverse", (basis.T * twice / FRAME).float(), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        real, imaginary = frames @ self.cosine, frames @ self.sine
        mask = self.sep1((real.square() + imaginary.square()).sqrt())
        x = self.enc((mask * real) @ self.cosine_inverse + (mask * imaginary) @ self.sine_inverse)
        return self.dec(x * self.sep2(self.norm1(x)))


def dtln() -> nn.Module:
    return DTLN()


def calibration(samples: int, seed: int) -> list[tuple[Tensor]]:
    """Mix seconds of the first clip's speech and noise anew: each from a place drawn, the noise at -10 to +5 dB."""
    generator = torch.Generator().manual_seed(seed)
    noisy, clean = _clips(CLIPS[:1])
    speech, noise = clean[0], noisy[0] - clean[0]
    mixed = []
    for _ in range(samples):
        a, b = torch.randint(len(speech) - SECOND, (2,), generator=generator).tolist()
        gain = 10 ** (float(-10 + 15 * torch.rand((), generator=generator)) / 20)
        mixed.append(speech[a : a + SECOND] + gain * noise[b : b + SECOND])
    return [(part,) for part in _frames(torch.stack(mixed)).split(CALIBRATION_BATCH)]


def si_sdr(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score the scale-invariant signal to distortion ratio in dB of each of the 10 seconds of the last two clips."""
    noisy, clean = (clips.reshape(-1, SECOND) for clips in _clips(CLIPS[1:]))
    return _si_sdr(model, noisy, clean)


def si_sdr_all(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score each of the 3 whole clips: the README's figure is their mean.

    It calls the model with more frames than calibration and metric do, so it is for the module, not for an export.
    """
    return _si_sdr(model, *_clips(CLIPS))


@torch.no_grad()
def _si_sdr(model: Callable[..., Tensor | tuple[Tensor, ...]], noisy: Tensor, clean: Tensor) -> npt.NDArray[np.float64]:
    enhanced, clean = _added(_first(model(_frames(noisy)))).double(), clean.double()
    target = (enhanced * clean).sum(1, keepdim=True) / clean.square().sum(1, keepdim=True) * clean
    ratio = target.square().sum(1) / (enhanced - target).square().sum(1)
    return 10 * ratio.log10().numpy()


def _frames(signal: Tensor) -> Tensor:
    return nn.functional.pad(signal, (EDGE, EDGE)).unfold(1, FRAME, HOP).contiguous()


def _added(frames: Tensor) -> Tensor:
    """Overlap-add, and cut the edges off."""
    signal = torch.zeros(len(frames), (frames.shape[1] - 1) * HOP + FRAME)
    for i in range(frames.shape[1]):
        signal[:, i * HOP : i * HOP + FRAME] += frames[:, i]
    return signal[:, EDGE:-EDGE]


def _clips(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    file = _data().arrays("speech/dns3_pairs_3.npz")
    noisy, clean = (np.stack([file[f"{name}_{kind}"] for name in names]) for kind in ("noisy", "clean"))
    return torch.from_numpy(noisy).float() / 32768, torch.from_numpy(clean).float() / 32768


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
