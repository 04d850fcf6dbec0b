"""The canonical packing, against a reference that reads single bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paredown.kernels.pack import pack, packed_bytes, unpack, word

BITS = range(1, 9)


def slow_unpack(packed: np.ndarray, bits: int, count: int) -> list[int]:
    stream = [byte >> bit & 1 for byte in packed.tolist() for bit in range(8)]
    return [sum(stream[bits * i + j] << j for j in range(bits)) for i in range(count)]


@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), columns=st.integers(1, 19), seed=st.integers(0, 99))
def test_pack_is_one_little_endian_bit_stream(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(codes.numel(), bits)
    assert slow_unpack(packed.numpy(), bits, codes.numel()) == codes.flatten().tolist()
    assert torch.equal(unpack(packed, bits, (rows, columns)), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_word_is_the_fewest_bytes_that_hold_whole_codes(bits: int) -> None:
    size, codes = word(bits)
    assert size * 8 == codes * bits
    assert all((smaller * 8) % bits for smaller in range(1, size))


@pytest.mark.parametrize("bits", BITS)
def test_the_last_word_is_filled_with_zeros(bits: int) -> None:
    packed = pack(torch.full((1,), 2**bits - 1, dtype=torch.uint8), bits)
    assert int.from_bytes(bytes(packed.tolist()), "little") == 2**bits - 1
