"""Samples text from a model: one token at a time, by temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron.config.generation import GenerationConfig

Logits = Callable[[Tensor], Tensor]
"""Token ids [B, S] -> logits [B, S, V]."""


def generate(
    model: Logits,
    prompt: list[int],
    sampling: GenerationConfig,
    *,
    num_samples: int,
    eod: int,
    vocab_size: int,
    context_length: int,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[list[int]]:
    """Continue `prompt` `num_samples` times, by at most `sampling.maximum_tokens` tokens each.

    Yields only the new tokens, up to and without the end-of-document token. The model sees the last `context_length`
    tokens; padding rows of the vocabulary, ids from `vocab_size` on, are never chosen. An empty prompt continues an
    end of document, as the first token of a document does in training.
    """
    tokens = torch.tensor([prompt or [eod]] * num_samples, dtype=torch.long, device=device)
    start = tokens.shape[1]
    finished = torch.zeros(num_samples, dtype=torch.bool, device=device)
    with torch.no_grad():
        for _ in range(sampling.maximum_tokens):
            logits = model(tokens[:, -context_length:])[:, -1, :vocab_size].float()
            chosen = choose(logits, sampling, generator).masked_fill(finished, eod)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            finished |= chosen == eod
            if bool(finished.all()):
                break
    for row in tokens[:, start:].tolist():
        yield row[: row.index(eod)] if eod in row else row


def choose(logits: Tensor, sampling: GenerationConfig, generator: torch.Generator) -> Tensor:
    """One token id per row of `logits` [B, V]; greedy at temperature 0. Returns [B]."""
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p > 0.0:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)


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
