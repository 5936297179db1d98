"""Dropout in training runs: replicas stay replicas, and recomputation draws the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.layout_runs import COVER, Case, LayoutRuns

STEPS = 4
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "train_iters": STEPS}
SPLIT_CASES = [
    Case("tokenformer", (2, 1, 1), tied=True, accumulation=2),
    Case("pythia", (2, 1, 1), tied=False, accumulation=2),
]
CASES = [
    Case("tokenformer", (1, 1, 1), tied=True),
    SPLIT_CASES[1],
    Case("tokenformer", (2, 1, 1), tied=True, sequence_parallel=True),
    Case("pythia", (1, 2, 1), tied=False),
    Case("pythia", (2, 2, 1), tied=False, sequence_parallel=True),
    Case("tokenformer", (1, 2, 2), tied=True),
]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_replicated_activations_are_alike(case: Case, recomputed: bool, layout_runs: LayoutRuns) -> None:
    first, second = (
        rank.dropped for rank in layout_runs.trained(replace(case, recomputed=recomputed), **DROPOUT).ranks
    )
    # One after the embedding and two in each of two layers, two micro batches, four steps. The layers' come again in
    # the backward pass when recomputed, but for the last of each, after which there is nothing to compute.
    assert len(first) == len(second) == 2 * STEPS * (5 + (2 if recomputed else 0))
    assert all((ours == 0).any() for ours in first)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recomputation_changes_no_number(case: Case, layout_runs: LayoutRuns) -> None:
    kept, recomputed = (
        layout_runs.trained(replace(case, recomputed=again), **DROPOUT).curve for again in (False, True)
    )
    assert len(kept) == STEPS
    assert kept == recomputed


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *((case, {}) for case in COVER if case.layout[2] > 1),
        (Case("pythia", (2, 2, 1), tied=False, sequence_parallel=True), DROPOUT),
        (Case("tokenformer", (1, 2, 2), tied=True), DROPOUT),
        (Case("tokenformer", (2, 2, 1), tied=True, sequence_parallel=True), DROPOUT | {"precision": "bfloat16"}),
        (Case("pythia", (1, 2, 2), tied=True), DROPOUT | {"precision": "bfloat16"}),
    ],
    ids=lambda value: "-".join(value) or "no dropout" if isinstance(value, dict) else str(value),
)
def test_replicas_stay_replicas(case: Case, changes: dict[str, Any], layout_runs: LayoutRuns) -> None:
    """Weights that several ranks hold are the same bits after the last step."""
    holders: dict[tuple[str, int | None], list[torch.Tensor]] = {}
    for rank in layout_runs.trained(case, **changes).ranks:
        for name, weight in rank.last_weights.items():
            is_split = rank.split_dims[name] is not None
            holders.setdefault((name, rank.tensor_rank if is_split else None), []).append(weight)
    assert sum(len(copies) > 1 for copies in holders.values()) >= 3
    for name, copies in holders.items():
        assert all(torch.equal(copy, copies[0]) for copy in copies), name
