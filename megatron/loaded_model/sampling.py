"""Which token comes next: greedy, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron.config.sections.generation import GenerationConfig


def uniform_numbers(seeds: tuple[int, ...], count: int) -> Tensor:
    """`count` float64 numbers in [0, 1) that follow from `seeds` alone: one for each token of a sample."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def choose(logits_BV: Tensor, sampling: GenerationConfig, uniform_B: Tensor) -> Tensor:
    """One token id per row of float32 logits; greedy at temperature 0, where `uniform_B` is not looked at.

    Otherwise it is the first whose cumulative probability exceeds the row's number, so that what else is in the batch
    makes no difference.
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    # The largest becomes 0, which no temperature, however low, divides to infinity.
    logits_BV = (logits_BV.double() - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k > 0:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p > 0.0:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
    # The total is 1 only up to rounding; a multiple of it never lies beyond the last token that has any probability.
    threshold_B1 = uniform_B.to(cumulative_BV.device).unsqueeze(-1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest of each row to -inf."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Set all but the smallest set of tokens that reaches probability p to -inf (Holtzman et al. 2020, nucleus)."""
    ordered, indices = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return logits.scatter(-1, indices, ordered.masked_fill(before >= p, float("-inf")))
