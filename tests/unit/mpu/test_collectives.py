"""Collectives of one rank do nothing."""

from __future__ import annotations

import torch

from megatron.mpu import collectives
from megatron.mpu.context import ParallelContext


def test_one_rank_communicates_with_nobody() -> None:
    x = torch.ones(2, 2, 2)
    single = ParallelContext.single()
    for function in (collectives.copy, collectives.reduce, collectives.sum_over_ranks, collectives.max_over_ranks):
        assert function(x, single) is x
    for function in (collectives.gather, collectives.gather_output, collectives.reduce_scatter):
        assert function(x, 1, single) is x
