"""The grid of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megatron.errors import ConfigError
from megatron.mpu.context import ParallelContext
from tests.helpers.distributed import run_distributed


def place(tensor: int, pipe: int) -> tuple[ParallelContext, dict[str, list[int]]]:
    context = ParallelContext.create(tensor, pipe, sequence_parallel=True)
    groups = {axis: getattr(context, f"{axis}_group") for axis in ("tensor", "data")}
    ranks = {axis: [] if group is None else dist.get_process_group_ranks(group) for axis, group in groups.items()}
    return replace(context, tensor_group=None, data_group=None), ranks


@pytest.mark.parametrize(("tensor", "pipe"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_stand_where_deepspeed_puts_them(tensor: int, pipe: int) -> None:
    data = 4 // (tensor * pipe)
    topology = PipeModelDataParallelTopology(num_pp=pipe, num_mp=tensor, num_dp=data)
    for rank, (context, groups) in enumerate(run_distributed(place, 4, tensor, pipe)):
        assert (context.tensor_size, context.pipe_size, context.data_size) == (tensor, pipe, data)
        coordinates = topology.get_coord(rank)
        assert (context.pipe_rank, context.data_rank, context.tensor_rank) == (
            coordinates.pipe,
            coordinates.data,
            coordinates.model,
        )
        for axis, size, theirs in (("tensor", tensor, "model"), ("data", data, "data")):
            together = [] if size == 1 else next(g for g in topology.get_axis_comm_lists(theirs) if rank in g)
            assert groups[axis] == together
        assert context.sequence_parallel == (tensor > 1)


def create_too_large() -> str:
    with pytest.raises(ConfigError) as error:
        ParallelContext.create(3, 2)
    return str(error.value)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    for message in run_distributed(create_too_large, 4):
        assert "does not divide the 4 ranks" in message
