"""Find and read the real data folder (`PAREDOWN_DATA`, default `../shared/data` beside the repository).

The entry files load this one by its path (`runpy`), so that they work wherever a recipe names them.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

VARIABLE = "PAREDOWN_DATA"


def folder() -> Path:
    """Return the data folder; raise FileNotFoundError that says how to name it."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    found = Path(os.environ.get(VARIABLE, default))
    if not found.is_dir():
        raise FileNotFoundError(
            f"{found}: no folder of real checkpoints; set {VARIABLE} to the folder that holds cifar10/"
        )
    return found


def arrays(name: str) -> dict[str, npt.NDArray[np.generic]]:
    """Read every array of the .npz file `name`, a path inside the data folder."""
    with np.load(folder() / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def images(name: str) -> list[npt.NDArray[np.uint8]]:
    """Decode the encoded images (`bytes` cut at `offset`) of the .npz file `name`: H x W x 3, or H x W when gray."""
    from PIL import Image

    file = arrays(name)
    raw, cuts = file["bytes"].tobytes(), file["offset"].tolist()
    return [np.asarray(Image.open(io.BytesIO(raw[a:b]))) for a, b in itertools.pairwise(cuts)]


def draw(population: int, samples: int, seed: int) -> torch.Tensor:
    """Draw `samples` different positions below `population` with the seed."""
    if samples > population:
        raise ValueError(f"{samples} calibration samples asked, {population} exist; ask for at most {population}")
    return torch.randperm(population, generator=torch.Generator().manual_seed(seed))[:samples]


def batches(count: int, size: int) -> Iterator[slice]:
    """Cut range(count) into slices of `size`, the last one possibly shorter."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
