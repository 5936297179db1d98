"""Seeds of dropout by step and rank."""

from __future__ import annotations

import torch

from megatron.mpu.context import ParallelContext
from megatron.mpu.random import seed_dropout, split_activations


def test_seeds_differ_by_step_pipe_and_data_rank_but_not_by_tensor_rank() -> None:
    drawn = []
    for step, tensor_rank, pipe_rank, data_rank in [
        (3, 0, 0, 0),
        (3, 1, 0, 0),
        (3, 0, 1, 0),
        (3, 0, 0, 1),
        (4, 0, 0, 0),
    ]:
        seed_dropout(7, step, ParallelContext(2, 2, 2, tensor_rank, pipe_rank, data_rank))
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 4


def test_one_rank_draws_from_the_default_generator() -> None:
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    with split_activations(ParallelContext.single()):
        assert torch.equal(torch.rand(3), want)
