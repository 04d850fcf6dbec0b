"""The fragments of `mma` in numpy, from the PTX ISA 9.7.14, and layout mma16 multiplied through them.

Written from the two definitions alone, without the kernels: which element of A, B and C each register of each lane
holds, and which code each bit of the layout is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Float64 = NDArray[np.float64]
LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def mma(a: Float64, b: Float64) -> Float64:
    """Return C = A B, 16 x 8, from fragments a (32, elements of a lane) and b; the elements as the ISA numbers them.

    m16n8k16 of 16 bits has 8 and 4 elements, m16n8k32 of 8 bits has 16 and 8.
    """
    each, k = a.shape[1] // 4, a.shape[1] * 2
    left, right = np.zeros((16, k)), np.zeros((k, 8))
    for i in range(a.shape[1]):
        first_rows = i < each or 2 * each <= i < 3 * each
        columns = T * each + i % each + (0 if i < 2 * each else k // 2)
        left[G + (0 if first_rows else 8), columns] = a[:, i]
    for i in range(b.shape[1]):
        right[T * each + i % each + (0 if i < each else k // 2), G] = b[:, i]
    return left @ right


def codes_of_lane(unit: Bytes, bits: int, lane: int, upper: int, step: int) -> NDArray[np.int64]:
    """Return the codes of inputs 8 t .. 8 t + 7 of a step, of row g (upper = 0) or g + 8 (1)."""
    found, start, below = np.zeros(8, np.int64), 0, 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        steps = 4 // width
        word, e = divmod(step, steps)
        if width == 4:
            at = word // 2 * 512 + lane * 16 + upper * 8 + word % 2 * 4
        else:
            at = lane * 8 * width + upper * 4 * width + word * 4
        value = int.from_bytes(unit[start + at : start + at + 4].tobytes(), "little")
        for i in range(8):
            f, b = divmod(i, 4)
            found[i] |= (value >> (8 * b + 4 * f + width * e) & (1 << width) - 1) << below
        start, below = start + 256 * width, below + width
    return found


def multiply(unit: Bytes, bits: int, table: Float64, x: Float64, size: int) -> Float64:
    """Return W x^T, 16 x 8, of one unit and x (8, 128), by mma of elements of `size` bytes: 2 of 16 inputs, 1 of 32.

    Of 8 inputs of a lane, 2-byte elements take 0 to 3 first and 4 to 7 next; bytes take 0 4 1 5 and 2 6 3 7.
    """
    orders = [[0, 1, 2, 3], [4, 5, 6, 7]] if size == 2 else [[0, 4, 1, 5, 2, 6, 3, 7]]
    total = np.zeros((16, 8))
    for step in range(4):
        rows = [np.stack([table[codes_of_lane(unit, bits, lane, u, step)] for lane in LANE]) for u in (0, 1)]
        inputs = np.stack([x[g, 32 * step + 8 * t : 32 * step + 8 * t + 8] for g, t in zip(G, T, strict=True)])
        for order in orders:
            half = len(order) // 2
            first, second = order[:half], order[half:]
            a = np.concatenate([rows[0][:, first], rows[1][:, first], rows[0][:, second], rows[1][:, second]], 1)
            total += mma(a, inputs[:, order])
    return total
