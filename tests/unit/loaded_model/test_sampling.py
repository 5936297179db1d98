"""Temperature, top-k and top-p against transformers' filters, and drawing against the distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron.loaded_model.sampling import SamplingSettings, choose_tokens, keep_top_k, keep_top_p, uniform_numbers


def random_logits(rows: int = 64, vocabulary: int = 40) -> Tensor:
    return 3 * torch.randn((rows, vocabulary), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 5, 39, 40, 1000])
def test_top_k_is_that_of_transformers(k: int) -> None:
    want = TopKLogitsWarper(k)(None, random_logits())
    assert torch.equal(keep_top_k(random_logits(), k), want)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p: float) -> None:
    want = TopPLogitsWarper(p)(None, random_logits())
    assert torch.equal(keep_top_p(random_logits(), p), want)


def test_top_p_counts_exactly() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    kept = [int(keep_top_p(logits, p).isfinite().sum()) for p in (0.25, 0.51, 0.76, 1.0)]
    assert kept == [1, 2, 3, 4]


def test_draws_follow_the_filtered_distribution() -> None:
    """Every k-th part of [0, 1) in turn: the counts are exact up to one draw per token."""
    logits = random_logits(rows=1)
    sampling = SamplingSettings(temperature=1.7, top_k=12, top_p=0.8)
    draws = 4001
    numbers = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    counts = torch.bincount(choose_tokens(logits.repeat(draws, 1), sampling, numbers), minlength=40)
    filtered = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(12)(None, TemperatureLogitsWarper(1.7)(None, logits)))
    assert (counts - draws * filtered.double().softmax(-1)[0]).abs().max() <= 1.0 + 1e-3
    assert torch.equal(counts > 0, filtered[0].isfinite())


def test_the_ends_of_the_interval_choose_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
    numbers = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert choose_tokens(logits, SamplingSettings(temperature=1.0), numbers).tolist() == [1, 2]


def test_temperature_0_is_greedy() -> None:
    numbers = torch.full((64,), 0.99, dtype=torch.float64)
    assert torch.equal(choose_tokens(random_logits(), SamplingSettings(), numbers), random_logits().argmax(-1))


@pytest.mark.parametrize("temperature", [1e-7, 1e-30, 1e-300])
def test_temperatures_near_0_are_greedy(temperature: float) -> None:
    numbers = torch.linspace(0.0, 0.999, 64, dtype=torch.float64)
    chosen = choose_tokens(random_logits(), SamplingSettings(temperature=temperature), numbers)
    assert torch.equal(chosen, random_logits().argmax(-1))


def test_numbers_follow_from_the_seeds() -> None:
    assert torch.equal(uniform_numbers((1, 2, 3), 5), uniform_numbers((1, 2, 3), 5))
    assert torch.equal(uniform_numbers((1, 2, 3), 9)[:5], uniform_numbers((1, 2, 3), 5))
    drawn = torch.stack([uniform_numbers((seed, number), 4) for seed in range(3) for number in range(3)])
    assert drawn.unique().numel() == drawn.numel() and ((drawn >= 0) & (drawn < 1)).all()
