"""Log-likelihoods of token sequences. Requests with the same input share a row of a batch.

R rows, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch

from megatron.errors import DataError
from megatron.loaded_model.loaded_model import InferenceModel


class Scored(NamedTuple):
    """What is asked of a continuation."""

    log_likelihood: float
    """[nats]."""
    greedy: bool
    """Whether each of its tokens is the likeliest one."""


@dataclass(frozen=True)
class Row:
    """One input to the model, and the continuations that are scored with its last positions."""

    tokens: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


class Placed(NamedTuple):
    """Where a request's continuation went."""

    row: int
    target: int


def plan_rows(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> tuple[list[Row], list[Placed]]:
    """Rows for (context, continuation) pairs, longest first, and where each pair is found in them.

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
    rows = [Row(inputs, tuple(targets[inputs])) for inputs in ordered]
    return rows, [Placed(position[inputs], targets[inputs][target]) for inputs, target in keys]


def score_batch(model: InferenceModel, rows: Sequence[Row]) -> list[list[Scored]]:
    """The scores of each row's targets; the first row is the longest."""
    tokens_RS = torch.zeros((len(rows), len(rows[0].tokens)), dtype=torch.long)
    places: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        tokens_RS[index, : len(row.tokens)] = torch.tensor(row.tokens)
        for target in row.targets:
            places += [index] * len(target)
            positions += range(len(row.tokens) - len(target), len(row.tokens))
            targets += target
    scores = model.score_tokens(tokens_RS, torch.tensor([places, positions, targets]).T)
    found = zip(scores.log_probs.tolist(), scores.greedy.tolist(), strict=True)
    return [[_sum_up(islice(found, len(target))) for target in row.targets] for row in rows]


def _sum_up(tokens: Iterable[tuple[float, bool]]) -> Scored:
    log_probs, greedy = zip(*tokens, strict=True)
    return Scored(math.fsum(log_probs), all(greedy))
