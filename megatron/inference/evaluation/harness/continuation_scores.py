"""Log-likelihoods of continuations. Requests with the same input share a row of a batch. B batch, S sequence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from megatron.errors import DataError
from megatron.loaded_model.loaded_model import LoadedModel


class ContinuationScore(NamedTuple):
    """Score of one continuation."""

    log_likelihood: float
    """[nats]."""
    greedy: bool
    """True if each of its tokens is the likeliest one."""


@dataclass(frozen=True)
class ScoringRow:
    """One input to the model, and the continuations that are scored at its last positions."""

    tokens: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


class TargetPlace(NamedTuple):
    """The row and the target of it that score a request's continuation."""

    row: int
    target: int


def plan_rows(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> tuple[list[ScoringRow], list[TargetPlace]]:
    """Plans rows for (context, continuation) pairs, longest first, and returns the place of each pair in them.

    As in lm-eval, a pair that is longer than the model's context loses tokens on the left. Raises DataError for an
    empty context or continuation, and for a continuation that is longer than `max_length` by itself.
    """
    targets: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    keys = []
    for context, continuation in requests:
        target = tuple(continuation)
        if not context or not target:
            raise DataError(
                "a task asks for the likelihood of an empty text, or of one without anything before it. Look for empty "
                "answers in its documents."
            )
        if len(target) > max_length:
            raise DataError(
                f"a task asks for the likelihood of a continuation of {len(target)} tokens, and this model reads "
                f"{max_length}. Only tasks that roll over a text (perplexity) take longer ones."
            )
        inputs = (*context, *target)[-(max_length + 1) :][:-1]
        found = targets.setdefault(inputs, {})
        found.setdefault(target, len(found))
        keys.append((inputs, target))
    ordered = sorted(targets, key=lambda inputs: (-len(inputs), inputs))
    position = {inputs: index for index, inputs in enumerate(ordered)}
    rows = [ScoringRow(inputs, tuple(targets[inputs])) for inputs in ordered]
    return rows, [TargetPlace(position[inputs], targets[inputs][target]) for inputs, target in keys]


def score_batch(model: LoadedModel, rows: Sequence[ScoringRow]) -> list[list[ContinuationScore]]:
    """Scores each row's targets; the first row is the longest."""
    tokens_BS = torch.zeros((len(rows), len(rows[0].tokens)), dtype=torch.long)
    places: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        tokens_BS[index, : len(row.tokens)] = torch.tensor(row.tokens)
        for target in row.targets:
            places += [index] * len(target)
            positions += range(len(row.tokens) - len(target), len(row.tokens))
            targets += target
    scores = model.score_tokens(tokens_BS, torch.tensor([places, positions, targets]).T)
    found = zip(scores.log_probs.tolist(), scores.greedy.tolist(), strict=True)
    return [[_sum_up(islice(found, len(target))) for target in row.targets] for row in rows]


def _sum_up(tokens: Iterable[tuple[float, bool]]) -> ContinuationScore:
    log_probs, greedy = zip(*tokens, strict=True)
    return ContinuationScore(math.fsum(log_probs), all(greedy))
