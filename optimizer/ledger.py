"""Channel numbers and which of them belong together: a union-find over whole arrays of numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

FROZEN = 0
"""Stands for every set of channels whose width cannot change."""
FREE = 1
"""The number of constants that look alike at every place (zeros, a mask of ones): they fit any width."""
COUPLED = "it is added to or multiplied by something of a fixed width"


class Ledger:
    """Numbers of channels; joining is transitive, and what is joined with something frozen is frozen."""

    def __init__(self) -> None:
        self._parents = np.arange(2, dtype=np.int64)
        self._frozen = np.array([True, False])
        self._reasons: dict[int, str] = {}

    def fresh(self, *shape: int) -> Int64[Tensor, "..."]:
        """Return new numbers, each a channel of its own."""
        start, count = len(self._parents), int(np.prod(shape, dtype=np.int64))
        self._parents = np.concatenate([self._parents, np.arange(start, start + count)])
        self._frozen = np.concatenate([self._frozen, np.zeros(count, dtype=bool)])
        return torch.arange(start, start + count).reshape(shape)

    def roots(self, ids: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """Return the number that stands for each channel's set, FROZEN for all that cannot change."""
        found = self._sets(ids)
        return torch.from_numpy(np.where(self._frozen[found], FROZEN, found)).reshape(ids.shape)

    def join(self, one: Int64[Tensor, "..."], other: Int64[Tensor, "..."], why: str = COUPLED) -> None:
        """Join channels place by place; FREE joins with nothing. `why`: what freezes one if the other is frozen."""
        one = one + torch.zeros_like(other)
        other = other.expand(one.shape)
        pairs = np.stack([self._sets(one), self._sets(other)], axis=1)
        pairs = pairs[(pairs != FREE).all(1) & (pairs[:, 0] != pairs[:, 1])]
        for a, b in np.unique(pairs, axis=0).tolist():
            self._join(a, b, why)

    def freeze(self, ids: Int64[Tensor, "..."], why: str) -> None:
        """Give channels a width that cannot change, and remember why for those that had none."""
        for number in np.unique(self._sets(ids)).tolist():
            if number > FREE and not self._frozen[number]:
                self._frozen[number] = True
                self._reasons[number] = why

    def is_live(self, ids: Int64[Tensor, "..."]) -> bool:
        """Return whether any of the channels could still be removed."""
        return bool((self.roots(ids) > FREE).any())

    def reason(self, ids: Int64[Tensor, "..."]) -> str:
        """Return why channels are frozen, "" if none of them is."""
        known = (self._reasons.get(number, "") for number in np.unique(self._sets(ids)).tolist())
        return next((text for text in known if text), "")

    def alone(self, ids: Int64[Tensor, "..."]) -> bool:
        """Return whether every one of the channels is live and joined with no other."""
        found = self._sets(ids)
        sizes = np.bincount(self._sets(torch.arange(len(self._parents))), minlength=len(self._parents))
        return bool((sizes[found] == 1).all() and not self._frozen[found].any())

    def _sets(self, ids: Tensor) -> npt.NDArray[np.int64]:
        flat, parents = ids.reshape(-1).numpy(), self._parents
        found: npt.NDArray[np.int64] = parents[flat]
        while not np.array_equal(above := parents[found], found):
            found = above
        parents[flat] = found
        return found

    def _join(self, a: int, b: int, why: str) -> None:
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        if FROZEN in (a, b):
            self.freeze(torch.tensor([max(a, b)]), why)
            return
        low, high = min(a, b), max(a, b)
        texts = [self._reasons.get(low, ""), self._reasons.get(high, "")]
        self._parents[high] = low
        self._frozen[low] |= self._frozen[high]
        if any(texts):
            self._reasons[low] = next(text for text in texts if text)

    def _root(self, number: int) -> int:
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = int(parents[number])
        return number
