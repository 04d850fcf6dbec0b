"""Calibration data: every shape of return value, exact errors, micro-batches and the seeded split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from paredown.optimizer import data, entry
from paredown.optimizer.errors import InputError
from paredown.optimizer.model import InputSpec

X = InputSpec(name="x", shape=("batch", 3))
IDS = InputSpec(name="ids", shape=("batch", "seq"), dtype="int64")
MASK = InputSpec(name="mask", shape=("batch", "seq"), dtype="bool")
STATE = InputSpec(name="state", shape=(2, "batch", 3))
TABLE = InputSpec(name="table", shape=(4,))


def rows(count: int, first: int = 0) -> Tensor:
    """Return rows that say their own number."""
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, 3).contiguous()


def endless() -> Iterator[Tensor]:
    for index in range(10**9):
        yield rows(4, 4 * index)


def numbers(calibration: data.Calibration) -> list[int]:
    return [int(row[0]) for batch in calibration.batches for row in batch[0]]


LABELS = torch.zeros(10, dtype=torch.int64)
RETURNS: dict[str, Any] = {
    "tensor": lambda: rows(10),
    "array": lambda: rows(10).numpy(),
    "float64": lambda: rows(10).double().numpy(),
    "read only": lambda: np.broadcast_to(rows(10).numpy(), (10, 3)),
    "fortran": lambda: np.asfortranarray(rows(10).numpy())[:, ::-1],
    "dict": lambda: {"x": rows(10), "label": LABELS},
    "tuple": lambda: (rows(10), LABELS),
    "generator": endless,
    "list of tensors": lambda: [rows(4), rows(4, 4), rows(2, 8)],
    "tuple of pairs": lambda: ((rows(4), LABELS[:4]), (rows(6, 4), LABELS[:6])),
    "list of lists": lambda: [[rows(4)], [rows(6, 4)]],
    "list of dicts": lambda: [{"x": rows(10)}],
    "loader": lambda: DataLoader(TensorDataset(rows(10), LABELS), batch_size=4),
    "gradient": lambda: rows(10).requires_grad_(),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_a_data_function_may_return(name: str) -> None:
    found = data.batches(RETURNS[name](), (X,), 9)
    assert numbers(found) == list(range(9))
    assert found.samples == 9
    assert all(batch[0].dtype == torch.float32 and not batch[0].requires_grad for batch in found.batches)


def test_an_endless_iterator_is_left_as_soon_as_there_is_enough() -> None:
    source = endless()
    assert numbers(data.batches(source, (X,), 8)) == list(range(8))
    assert int(next(source)[0, 0]) == 8


def test_several_inputs_in_the_order_of_the_network() -> None:
    ids, mask = torch.arange(12, dtype=torch.int32).reshape(3, 4), torch.ones(3, 4, dtype=torch.bool)
    for result in ({"mask": mask, "ids": ids}, (ids, mask), [(ids, mask)], [{"mask": mask, "ids": ids}]):
        ((first, second),) = data.batches(result, (IDS, MASK), 2).batches
        assert torch.equal(first, ids[:2].long())
        assert torch.equal(second, mask[:2])


def test_the_sample_dimension_goes_by_its_name() -> None:
    found = data.batches([(rows(4), torch.zeros(2, 4, 3), torch.ones(4))], (X, STATE, TABLE), 3)
    assert found.axes == (0, 1, None)
    assert [tuple(x.shape) for x in found.batches[0]] == [(3, 3), (2, 3, 3), (4,)]
    parts = data.rebatch(found, 2).batches
    assert [[tuple(x.shape) for x in part] for part in parts] == [[(2, 3), (2, 2, 3), (4,)], [(1, 3), (2, 1, 3), (4,)]]


def test_sequences_may_differ_between_batches() -> None:
    found = data.batches([torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)], (IDS,), 4)
    assert [tuple(batch[0].shape) for batch in data.rebatch(found, 4).batches] == [(2, 5), (2, 7)]


def test_a_fixed_batch_size_cuts_and_keeps_batches() -> None:
    fixed = InputSpec(name="x", shape=(2, 3))
    found = data.batches([rows(4), rows(2, 4)], (fixed,), 6)
    assert [len(batch[0]) for batch in found.batches] == [2, 2, 2]
    assert data.rebatch(found, 5) is found
    fit, held = data.split(found, 0.34, 0)
    assert [len(batch[0]) for batch in (*fit.batches, *held.batches)] == [2, 2, 2]
    assert sorted(numbers(fit) + numbers(held)) == list(range(6))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_rebatch(sizes: list[int], size: int) -> None:
    total = sum(sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = data.batches([rows(count, first) for count, first in zip(sizes, starts, strict=True)], (X,), total)
    again = data.rebatch(found, size)
    assert numbers(again) == list(range(total))
    assert [len(batch[0]) for batch in again.batches[:-1]] == [size] * (len(again.batches) - 1)
    assert 1 <= len(again.batches[-1][0]) <= size


@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 3))
def test_split(total: int, fraction: float, seed: int) -> None:
    found = data.batches(list(rows(total).split(7)), (X,), total)
    held_count = max(1, round(total * fraction))
    if held_count >= total:
        with pytest.raises(InputError):
            data.split(found, fraction, seed)
        return
    fit, held = data.split(found, fraction, seed)
    assert held.samples == len(numbers(held)) == held_count
    assert fit.samples == len(numbers(fit)) == total - held_count
    assert sorted(numbers(fit) + numbers(held)) == list(range(total))
    assert numbers(data.split(found, fraction, seed)[1]) == numbers(held)


def test_split_depends_on_the_seed() -> None:
    found = data.batches(rows(100), (X,), 100)
    assert numbers(data.split(found, 0.5, 0)[1]) != numbers(data.split(found, 0.5, 1)[1])


def spoiled(value: float) -> Tensor:
    x = rows(4)
    x[1, 2] = value
    return x


MEND = "return batches of that shape, or mend inputs in the recipe"
BAD: dict[str, tuple[Any, tuple[InputSpec, ...], str]] = {
    "nothing": (None, (X,), "it returned NoneType; return a tensor, or an iterable of batches"),
    "text": ("abc", (X,), "it returned str; return a tensor, or an iterable of batches"),
    "no batches": ([], (X,), "it gave no samples; return at least one batch"),
    "no rows": ([rows(0)], (X,), "batch 0 is empty; return batches with samples"),
    "too few": ([rows(4), rows(4)], (X,), "asked for 9 samples, it gave 8; set samples: 8"),
    "nan": (
        [rows(4), spoiled(float("nan"))],
        (X,),
        'batch 1, input "x" has 1 of 12 values that are NaN or infinite; remove them in the entry',
    ),
    "overflow": (
        spoiled(1e6),
        (InputSpec(name="x", shape=("b", 3), dtype="float16"),),
        'batch 0, input "x" has 1 of 12 values that are NaN or infinite; remove them in the entry',
    ),
    "shape": (torch.ones(9, 4), (X,), f'batch 0, input "x" has shape [9, 4], the recipe says [batch, 3]; {MEND}'),
    "rank": (torch.ones(9), (X,), f'batch 0, input "x" has shape [9], the recipe says [batch, 3]; {MEND}'),
    "not a multiple": (
        torch.ones(4, 3),
        (InputSpec(name="x", shape=(3, 3)),),
        f'batch 0, input "x" has shape [4, 3], the recipe says [3, 3]; {MEND}',
    ),
    "uint8": (
        torch.ones(9, 3, dtype=torch.uint8),
        (X,),
        'batch 0, input "x" is uint8, the recipe says float32; convert it in the entry, or write dtype: uint8',
    ),
    "float ids": (
        torch.ones(9, 3),
        (IDS,),
        'batch 0, input "ids" is float32, the recipe says int64; convert it in the entry, or write dtype: float32',
    ),
    "does not fit": (
        torch.full((9, 3), 2**40),
        (InputSpec(name="x", shape=("batch", 3), dtype="int32"),),
        'batch 0, input "x" is int64, the recipe says int32; convert it in the entry, or write dtype: int64',
    ),
    "names": (
        [(torch.ones(9, 3, dtype=torch.int64), torch.ones(9, 4, dtype=torch.bool))],
        (IDS, MASK),
        'batch 0: "seq" is 3 in input "ids" and 4 in input "mask"; give both the same size',
    ),
    "one tensor": (
        [torch.ones(9, 3, dtype=torch.int64)],
        (IDS, MASK),
        "batch 0 holds 1 tensor, the network has 2 inputs; return one tensor per input: ids, mask",
    ),
    "key": ({"X": rows(9), "mas": 1}, (MASK,), 'batch 0 lacks the input "mask"; did you mean "mas"?'),
    "element": ([3], (X,), 'batch 0, input "x" is int; return tensors or numpy arrays'),
    "objects": (
        np.array([["a"] * 3] * 9),
        (X,),
        'batch 0, input "x" is an array of <U1; return tensors or numpy arrays',
    ),
    "no dimension": (rows(9), (InputSpec(name="x", shape=()),), "the first input has no dimension that counts samples"),
    "unit": (
        rows(9),
        (InputSpec(name="x", shape=(2, 3)),),
        "9 samples do not divide into batches of 2; ask for a multiple of 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data(name: str) -> None:
    result, inputs, text = BAD[name]
    with pytest.raises(InputError) as caught:
        data.batches(result, inputs, 9)
    assert str(caught.value) == f"the data entry: {text}"
    assert caught.value.exit_code == 3


def test_what_an_iterator_raises_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.py").write_text("def f(samples):\n    yield from ()\n    raise ValueError('no disk')\n")
    result = entry.call(entry.resolve("d.py:f", Path()).function, {"samples": 3}, "here")
    with pytest.raises(InputError) as caught:
        data.batches(result, (X,), 3)
    assert str(caught.value) == "the data entry: d.py:3 raised ValueError: no disk; mend the entry's code"


def test_bad_sizes() -> None:
    found = data.batches(rows(4), (X,), 4)
    with pytest.raises(InputError, match=r"^a batch of 0 samples is empty; use 1 or more$"):
        data.rebatch(found, 0)
    for fraction in (0.0, 1.0, 0.99, float("nan")):
        with pytest.raises(InputError) as caught:
            data.split(found, fraction, 0)
        assert str(caught.value) == (
            f"the data entry: 4 samples cannot be split with {fraction} of them held out; "
            "give more samples, or a fraction between 0 and 1"
        )
