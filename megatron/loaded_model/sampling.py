"""Chooses the next token: greedily, or drawn after temperature, top-k and top-p."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of generated text. Raises ValueError for values outside their ranges."""

    temperature: float = 0.0
    """Divides the logits before sampling; 0 decodes greedily."""

    top_k: int = 0
    """Sample among this many likeliest tokens; 0 means all."""

    top_p: float = 0.0
    """Sample among the likeliest tokens that together reach this probability; 0 means all."""

    maximum_tokens: int = 64
    """Most tokens to generate after each prompt [tokens]."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0.0 and self.top_k >= 0 and 0.0 <= self.top_p <= 1.0 and self.maximum_tokens > 0):
            raise ValueError(f"{self}: temperature and top_k are at least 0, top_p is 0 to 1, maximum_tokens above 0")


def uniform_numbers(seeds: tuple[int, ...], count: int) -> Tensor:
    """Draws `count` float64 numbers in [0, 1) that follow from `seeds` alone: one for each token of a sample."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def choose_tokens(logits_BV: Tensor, sampling: SamplingSettings, uniform_B: Tensor) -> Tensor:
    """Chooses one token id per row of float32 logits [B, V]; returns [B]. Temperature 0 ignores `uniform_B`.

    Otherwise a row's token is the first whose cumulative probability exceeds the row's number, so that the rest of the
    batch makes no difference.
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


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Sets all but the k largest logits of each row to -inf."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Sets all but the smallest set of tokens that reaches probability p to -inf (Holtzman et al. 2020, nucleus)."""
    ordered_BV, indices_BV = logits_BV.sort(dim=-1, descending=True)
    probabilities_BV = ordered_BV.softmax(dim=-1)
    before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    return logits_BV.scatter(-1, indices_BV, ordered_BV.masked_fill(before_BV >= p, float("-inf")))
