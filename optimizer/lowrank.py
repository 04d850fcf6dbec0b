"""Low ranks by whitened SVD: what each rank costs in output error, and the factors.

With G = sum of x x^T of the inputs and T T^T = G, the W' of rank r nearest to W in ||(W' - W) T|| is [W T]_r T^-1; its
squared error is the sum of the discarded squared singular values of W T, whatever the T (Chen et al. 2021, "DRONE";
Wang et al. 2024, "SVD-LLM", section 3). It is computed without an inverse, as W' = U_r U_r^T W with the leading left
singular vectors U_r of W T, so that inputs which never occurred do no harm. All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

FLOOR = 1e-14
"""Of the largest eigenvalue of a gram: a smaller one counts as this, so that the root keeps all directions of W."""
ROUNDING = 1e-12
"""Of the energy: a rank may miss the asked part by this, the rounding of its sum."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    """A weight taken apart: `energies` are the squared singular values of W T, falling, `vectors` the left ones."""

    weight: Float64[Tensor, "out in"]
    energies: Float64[Tensor, " k"]
    vectors: Float64[Tensor, "out k"]

    @property
    def total(self) -> float:
        return float(self.energies.sum())

    def loss(self, rank: int) -> float:
        """Return the squared output error of a rank: the energies that it discards."""
        return float(self.energies[rank:].sum())

    def rank_of_energy(self, part: float) -> int:
        """Return the smallest rank that keeps a part (0 to 1) of the energy, at least 1."""
        kept = self.energies.cumsum(0)
        short = int((kept < (part - ROUNDING) * self.total).sum())
        return min(short + 1, len(self.energies))

    def factors(self, rank: int) -> tuple[Float64[Tensor, "out r"], Float64[Tensor, "r in"]]:
        """Return U_r and U_r^T W, whose product is the best matrix of this rank; the columns of U_r are orthonormal."""
        left = self.vectors[:, :rank]
        return left, left.T @ self.weight


def spectrum(weight: Float[Tensor, "out in"], gram: Float64[Tensor, "in in"] | None = None) -> Spectrum:
    """Take a weight apart by what its outputs show; without a gram every input counts alike.

    By the eigenvectors of W G W^T or the SVD of W T, whichever is smaller.
    """
    wide = weight.detach().double()
    if wide.shape[0] <= wide.shape[1]:
        image = wide @ wide.T if gram is None else wide @ gram @ wide.T
        energies, vectors = torch.linalg.eigh((image + image.T) / 2)
        return Spectrum(weight=wide, energies=energies.flip(0).clamp(min=0), vectors=vectors.flip(1))
    dark = gram is not None and not bool(gram.any())
    vectors, values, _ = torch.linalg.svd(wide if gram is None or dark else wide @ _root(gram), full_matrices=False)
    return Spectrum(weight=wide, energies=values.square() * (not dark), vectors=vectors)


def refit_left(
    weight: Float[Tensor, "out in"], right: Float64[Tensor, "r in"], gram: Float64[Tensor, "in in"] | None = None
) -> Float64[Tensor, "out r"]:
    """Return the left factor of least output error for a right one: W G R^T (R G R^T)^+.

    (Saha et al. 2024, "CALDERA", section 4, the inner loop.)
    """
    seen = right if gram is None else right @ gram
    inverse: Tensor = torch.linalg.pinv(seen @ right.T, hermitian=True)
    return weight.double() @ seen.T @ inverse


def break_even(rows: int, columns: int) -> int:
    """Return the largest rank whose two factors hold fewer weights than the matrix, 0 if none does."""
    return (rows * columns - 1) // (rows + columns)


def rank_of_ratio(rows: int, columns: int, removed: float) -> int:
    """Return the largest rank that removes this part of a matrix's weights, 0 if none does."""
    return math.floor((1 - removed) * rows * columns / (rows + columns) + ROUNDING)


def _root(gram: Float64[Tensor, "in in"]) -> Float64[Tensor, "in in"]:
    """Return a T with T T^T = G, all of whose columns are there even where G is singular."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp(min=max(FLOOR * float(values[-1]), 0.0)).sqrt()
    return root
