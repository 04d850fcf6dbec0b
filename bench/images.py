"""A pipeline for image classifiers by Pillow: decode, resize, normalise, and the best classes of the answer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..optimizer.errors import RecipeError, RuntimeMissingError
from .pipeline import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """resize: the short side in pixels; crop: the square that is cut from its centre. Values are (x / 255 - mean) / std
    by channel, in float32 [1, 3, crop, crop]. top: how many classes the answer names."""

    resize: int = 256
    crop: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    top: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            what = f"crop={self.crop} and resize={self.resize}"
            raise RecipeError(what, where="images", fix="a crop lies within the resized image")


def pipeline(items: Sequence[bytes], spec: Spec | None = None) -> Pipeline:
    """Return the pipeline of encoded images, of any format that Pillow reads."""
    chosen = spec or Spec()
    scale = (1 / (255 * np.array(chosen.std))).astype(np.float32)[:, None, None]
    offset = (np.array(chosen.mean) / np.array(chosen.std)).astype(np.float32)[:, None, None]

    def normalise(image: Image) -> np.ndarray:
        planes = np.asarray(image, np.float32).transpose(2, 0, 1)
        return np.ascontiguousarray((planes * scale - offset)[None])

    return Pipeline(
        items=list(items),
        before={"decode": decode, "resize": lambda image: resize(image, chosen), "normalise": normalise},
        after={"post": lambda scores: best(scores, chosen.top)},
    )


def decode(encoded: bytes) -> Image:
    """Return an RGB image, decoded in full."""
    try:
        from PIL import Image as Opener
    except ImportError as error:
        raise RuntimeMissingError("Pillow is not installed", where="images", fix="pip install pillow") from error
    return Opener.open(io.BytesIO(encoded)).convert("RGB")


def resize(image: Image, spec: Spec) -> Image:
    """Return the centre of an image whose short side was brought to `resize` pixels, bilinear with antialiasing."""
    factor = spec.resize / min(image.size)
    width, height = (max(spec.crop, round(side * factor)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), 2)  # 2: Pillow's BILINEAR
    left, top = (width - spec.crop) // 2, (height - spec.crop) // 2
    return image.crop((left, top, left + spec.crop, top + spec.crop))


def best(scores: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Return the best classes of scores [1, classes] with their probabilities, by a softmax, best first."""
    row = scores[0].astype(np.float64)
    probabilities = np.exp(row - row.max())
    probabilities /= probabilities.sum()
    first = np.argsort(-row)[:top]
    return [(int(index), float(probabilities[index])) for index in first]
