"""How far an exported file's values are from torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def difference(want: np.ndarray, have: np.ndarray) -> tuple[float, float]:
    """Return (max |a - b|, the same over max |a|), in float64; infinite where shapes or non-finite entries differ."""
    if want.shape != have.shape:
        return math.inf, math.inf
    a, b = want.astype(np.float64), have.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0, 0.0
    with np.errstate(invalid="ignore"):
        worst = float(np.nan_to_num(np.abs(a - b)[~same], nan=math.inf, posinf=math.inf).max())
    finite = np.abs(a[np.isfinite(a)])
    return worst, worst / max(float(finite.max(initial=0.0)), np.finfo(np.float64).tiny)


def argmax_agreement(want: Sequence[np.ndarray], have: Sequence[np.ndarray]) -> float | None:
    """Return the part of rows whose largest entry stands in the same place, of the worst floating output."""
    shares = []
    for a, b in zip(want, have, strict=True):
        if a.ndim >= 2 and a.size and np.issubdtype(a.dtype, np.floating) and a.shape == b.shape:
            shares.append(float((a.argmax(-1) == b.argmax(-1)).mean()))
    return min(shares, default=None)
