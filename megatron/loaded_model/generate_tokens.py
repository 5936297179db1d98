"""Continues prompts of any lengths, a batch at a time. B batch, S sequence, V vocabulary without padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron.loaded_model.sampling import SamplingSettings, choose_tokens, uniform_numbers
from megatron.model.kv_cache import KeyValueCache
from megatron.mpu.collectives import max_over_ranks
from megatron.mpu.context import ParallelContext

Ending = Literal["stop_token", "stopped", "maximum_tokens", "context_full"]


class NextTokenModel(Protocol):
    """Model that text is generated with: of LoadedModel, or of a run while it trains."""

    context: ParallelContext
    device: torch.device
    context_length: int
    """Longest sequence to give it [tokens]."""

    def new_cache(self, batch: int, capacity: int, padding_B: Tensor | None = None) -> KeyValueCache:
        """Makes an empty cache for `batch` sequences of up to `capacity` columns; `padding_B` as in KeyValueCache."""

    def next_logits(
        self, tokens_BS: Tensor, cache: KeyValueCache | None = None, *, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Computes float32 logits [B, V] of the token after the last one, or after the first `lengths_B`."""


@dataclass(frozen=True)
class Continuation:
    """The text generated after one prompt, as tokens."""

    tokens: list[int]
    """New tokens, without the stop token."""
    ending: Ending
    """Reason of the end: a stop token, `should_stop`, `maximum_tokens`, or a sequence as long as the context."""
    prompt_tokens: int
    """Tokens of the prompt that the model has seen: the last ones of a prompt that was too long."""
    logits: Tensor | None = None
    """float32 logits [tokens, V] that each new token was chosen from, on the CPU, if asked for."""


@dataclass
class _Sample:
    """A sequence that is being generated."""

    index: int
    prompt: Sequence[int]
    budget: int
    """Most tokens to generate."""
    numbers: Tensor
    """A random number for each of them [budget]."""
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    ended_by: Ending | None = None

    @property
    def runs(self) -> bool:
        """Tells whether another token is to be generated."""
        return self.ended_by is None and len(self.tokens) < self.budget

    def ending(self, maximum_tokens: int) -> Ending:
        """Returns the reason of the end."""
        return self.ended_by or ("maximum_tokens" if self.budget == maximum_tokens else "context_full")


def generate_tokens(
    model: NextTokenModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    *,
    start_token: int,
    stop_tokens: Collection[int],
    seeds: Sequence[tuple[int, ...]] | None = None,
    should_stop: Callable[[int, list[int]], bool] | None = None,
    use_cache: bool = True,
    return_logits: bool = False,
) -> list[Continuation]:
    """Continues each prompt by at most `sampling.maximum_tokens` tokens, in one batch. Collective over tensor ranks.

    An empty prompt is continued from `start_token`, as the first token of a document is in training. Sequences end
    where the model's context does; `fit_to_context` shortens prompts that leave no room. Padding rows of the vocabulary
    are never chosen. A sample follows from its prompt and its seed, the prompt's index unless given, and not from the
    rest of the batch. `should_stop(i, new tokens)` is asked after each token of prompt i; true on any tensor-parallel
    rank ends it, that token included. Without the cache, every token costs a pass over the sequence.
    """
    samples = []
    for index, prompt in enumerate(prompts):
        kept, budget = fit_to_context(prompt or [start_token], sampling.maximum_tokens, model.context_length)
        numbers = uniform_numbers((index,) if seeds is None else seeds[index], budget)
        samples.append(_Sample(index, kept, budget, numbers))
    running = [sample for sample in samples if sample.runs]
    cache = _cache_for(model, running) if use_cache and running else None
    while running:
        logits_BV = _next_logits(model, running, cache)
        numbers_B = torch.stack([sample.numbers[len(sample.tokens)] for sample in running])
        # All ranks have the same logits up to rounding, and must go on with the same tokens.
        chosen_B = max_over_ranks(choose_tokens(logits_BV, sampling, numbers_B), model.context).tolist()
        for sample, token, logits_V in zip(running, chosen_B, logits_BV, strict=True):
            if token in stop_tokens:
                sample.ended_by = "stop_token"
                continue
            sample.tokens.append(token)
            if return_logits:
                sample.logits.append(logits_V.cpu())
        if should_stop is not None:
            _end_stopped(running, should_stop, model)
        going_on = [row for row, sample in enumerate(running) if sample.runs]
        if cache is not None and 0 < len(going_on) < len(running):
            cache.keep(going_on)
        running = [running[row] for row in going_on]
    return [
        Continuation(
            sample.tokens,
            sample.ending(sampling.maximum_tokens),
            len(sample.prompt) if prompt else 0,
            torch.stack(sample.logits) if sample.logits else None,
        )
        for sample, prompt in zip(samples, prompts, strict=True)
    ]


def fit_to_context(prompt: Sequence[int], maximum_tokens: int, context_length: int) -> tuple[Sequence[int], int]:
    """Returns the part of a prompt that is used and the number of tokens that may follow it, within the context.

    A prompt loses tokens on the left to make room for `maximum_tokens`, but no more than to free half of the context.
    """
    room = min(maximum_tokens, max(context_length // 2, 1))
    kept = prompt[-max(context_length - room, 1) :]
    return kept, min(maximum_tokens, context_length - len(kept))


def _cache_for(model: NextTokenModel, samples: list[_Sample]) -> KeyValueCache:
    lengths = torch.tensor([len(sample.prompt) for sample in samples])
    longest = int(lengths.max())
    capacity = longest + max(sample.budget for sample in samples)
    return model.new_cache(len(samples), capacity, longest - lengths)


def _next_logits(model: NextTokenModel, samples: list[_Sample], cache: KeyValueCache | None) -> Tensor:
    """Computes float32 logits [B, V] of the next token of each sample."""
    if cache is None:
        sequences = [[*sample.prompt, *sample.tokens] for sample in samples]
        lengths = [len(sequence) for sequence in sequences]
        padded = [sequence + [0] * (max(lengths) - len(sequence)) for sequence in sequences]
        return model.next_logits(torch.tensor(padded), lengths_B=torch.tensor(lengths))
    if cache.seen:
        return model.next_logits(torch.tensor([sample.tokens[-1:] for sample in samples]), cache)
    longest = max(len(sample.prompt) for sample in samples)
    return model.next_logits(torch.tensor([[0] * (longest - len(s.prompt)) + [*s.prompt] for s in samples]), cache)


def _end_stopped(samples: list[_Sample], should_stop: Callable[[int, list[int]], bool], model: NextTokenModel) -> None:
    """Ends the samples that any tensor-parallel rank wants to stop."""
    running = [sample for sample in samples if sample.runs]
    if not running:
        return
    wishes = [should_stop(sample.index, sample.tokens) for sample in running]
    agreed = max_over_ranks(torch.tensor(wishes, dtype=torch.long, device=model.device), model.context).tolist()
    for sample, stop in zip(running, agreed, strict=True):
        if stop:
            sample.ended_by = "stopped"
