"""The norm of gradients against float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.training.gradients.slice_norm import square_sum


@pytest.mark.parametrize(
    ("numbers", "tolerance"),
    [
        # Rounding differs from row to row, and cancels.
        (torch.randn(5_000_001, generator=torch.Generator().manual_seed(0)) * 1e-4, 1e-9),
        (torch.randn(300_000, generator=torch.Generator().manual_seed(1)) ** 7, 1e-7),
        # Rows are all alike, and so is their rounding.
        (torch.full((1_000_003,), 0.1), 2e-7),
        (torch.full((255,), 3.0), 1e-7),
        (torch.full((256,), 3.0), 0.0),
        (torch.tensor([-2.0]), 0.0),
        (torch.zeros(1000), 0.0),
        (torch.tensor([1e18, 1.0]), 1e-7),
    ],
    ids=["normal", "heavy-tailed", "constant", "less than a row", "a row", "one", "zero", "large"],
)
def test_it_agrees_with_float64(numbers: torch.Tensor, tolerance: float) -> None:
    norm = math.sqrt(float(square_sum(numbers)))
    assert norm == pytest.approx(float(numbers.double().norm()), rel=tolerance, abs=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 300, 1023, 1030])
def test_it_is_not_finite_where_an_element_is_not(bad: float, place: int) -> None:
    numbers = torch.ones(1031)
    numbers[place] = bad
    assert not math.isfinite(float(square_sum(numbers)))
    assert not all(torch.isfinite(extreme) for extreme in torch.aminmax(numbers)), "as the look at a bucket relies on"
