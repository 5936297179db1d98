"""Sampling: greedy, top-k, top-p, ends of documents, padding rows, long prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.config.generation import GenerationConfig
from megatron.inference.generate import choose, generate, keep_top_k, keep_top_p

EOD = 0


def counting_model(tokens: Tensor) -> Tensor:
    """Prefers the successor of the last token, among 8 rows of which only 6 are real tokens; row 7 scores highest."""
    successor = (tokens + 1) % 6
    return torch.nn.functional.one_hot(successor, 8).float() * 9 + torch.tensor([0, 0, 0, 0, 0, 0, 0, 99.0])


def sample(prompt: list[int], *, num_samples: int = 1, context_length: int = 4, **settings: object) -> list[list[int]]:
    return list(
        generate(
            counting_model,
            prompt,
            GenerationConfig(**settings),  # type: ignore[arg-type]
            num_samples=num_samples,
            eod=EOD,
            vocab_size=6,
            context_length=context_length,
            generator=torch.Generator().manual_seed(1),
            device=torch.device("cpu"),
        )
    )


def test_greedy_stops_before_the_end_of_document_and_skips_padding_rows() -> None:
    assert sample([2], maximum_tokens=10) == [[3, 4, 5]]


def test_maximum_tokens_limits_the_new_tokens_only() -> None:
    assert sample([1, 2], maximum_tokens=2) == [[3, 4]]


def test_an_empty_prompt_starts_a_document() -> None:
    assert sample([], maximum_tokens=2) == [[1, 2]]


def test_a_prompt_longer_than_the_context_keeps_its_end() -> None:
    assert sample([5, 4, 3, 2, 1, 2], context_length=2, maximum_tokens=2) == [[3, 4]]


def test_samples_are_reproducible_and_differ() -> None:
    first = sample([1], num_samples=16, temperature=30.0, maximum_tokens=8)
    assert first == sample([1], num_samples=16, temperature=30.0, maximum_tokens=8)
    assert len({tuple(tokens) for tokens in first}) > 1


def test_top_k_and_top_p_keep_what_they_say() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert keep_top_k(logits, 1).isfinite().tolist() == [[True, False, False, False]]
    assert keep_top_k(logits, 9).isfinite().all()
    assert keep_top_p(logits, 0.4).isfinite().tolist() == [[True, False, False, False]]
    assert int(keep_top_p(logits, 0.6).isfinite().sum()) == 2
    assert keep_top_p(logits, 1.0).isfinite().all()


def test_sampled_frequencies_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    logits = probabilities.log().repeat(20000, 1)
    sampling = GenerationConfig(temperature=1.0)
    counts = torch.bincount(choose(logits, sampling, torch.Generator().manual_seed(0)), minlength=3)
    torch.testing.assert_close(counts / 20000, probabilities, atol=0.015, rtol=0.0)
