"""The tests check the shapes that annotations name, in arguments, results and fields."""

from __future__ import annotations

import sys

import jaxtyping
import pytest
import torch
from torch import Tensor

from paredown.optimizer.weight import Dense, expand_scale

from . import shapes


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)


@pytest.mark.usefixtures("checked")
def test_the_product_is_checked() -> None:
    assert sys.modules["paredown_shapes"].check.__module__ == shapes.__name__
    with pytest.raises(jaxtyping.TypeCheckError, match="scale"):
        expand_scale(torch.ones(3), 4, 0)
    with pytest.raises(jaxtyping.TypeCheckError, match="values"):
        Dense(values=torch.ones(2, 3, 4))


@pytest.mark.usefixtures("checked")
def test_one_name_is_one_size_and_what_is_no_tensor_is_left_alone() -> None:
    @shapes.sampled(typechecker=shapes.check)
    def product(a: jaxtyping.Float[Tensor, "n k"], b: jaxtyping.Float[Tensor, "k m"], note: int) -> Tensor:
        return a @ b

    assert product(torch.ones(2, 3), torch.ones(3, 4), "not an int").shape == (2, 4)  # type: ignore[arg-type]
    with pytest.raises(jaxtyping.TypeCheckError, match="b"):
        product(torch.ones(2, 3), torch.ones(4, 4), 0)
