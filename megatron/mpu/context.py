"""Place of this rank in the grid of tensor-, data- and pipeline-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron.errors import ConfigError


@dataclass(frozen=True)
class ParallelContext:
    """Sizes of the three parallel dimensions, this rank's place in each, and its tensor-parallel group.

    Passed down to whoever splits or communicates; nothing reads process-wide globals.
    """

    tensor_size: int = 1
    pipe_size: int = 1
    data_size: int = 1
    tensor_rank: int = 0
    pipe_rank: int = 0
    data_rank: int = 0
    tensor_group: dist.ProcessGroup | None = None
    """Ranks that share this rank's pipe and data coordinates; None when tensor_size is 1."""
    data_group: dist.ProcessGroup | None = None
    """Ranks that share this rank's pipe and tensor coordinates; None when data_size is 1."""
    sequence_parallel: bool = False
    """Whether the residual stream is split over the tensor-parallel ranks by sequence."""

    @staticmethod
    def single() -> ParallelContext:
        """Returns the context of one rank alone, which needs no process group."""
        return ParallelContext()

    @staticmethod
    def create(tensor: int, pipe: int, sequence_parallel: bool = False) -> ParallelContext:
        """Lays the ranks of the initialized default group out over pipe, data and tensor axes, tensor innermost.

        This is the order of DeepSpeed's PipeModelDataParallelTopology, so that groups agree with its grid. Collective:
        every rank of the default group must call it. Raises ConfigError when the ranks do not fill the grid.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size % (tensor * pipe):
            raise ConfigError(
                f"model_parallel_size={tensor} times pipe_parallel_size={pipe} is {tensor * pipe}, which does not "
                f"divide the {world_size} ranks of this run. Start a multiple of {tensor * pipe} ranks."
            )
        data = world_size // (tensor * pipe)
        stage = tensor * data
        return ParallelContext(
            tensor_size=tensor,
            pipe_size=pipe,
            data_size=data,
            tensor_rank=rank % tensor,
            data_rank=rank // tensor % data,
            pipe_rank=rank // stage,
            tensor_group=_own_group([range(first, first + tensor) for first in range(0, world_size, tensor)]),
            data_group=_own_group(
                [
                    range(first, first + stage, tensor)
                    for start in range(0, world_size, stage)
                    for first in range(start, start + tensor)
                ]
            ),
            sequence_parallel=sequence_parallel and tensor > 1,
        )


def stage_group(context: ParallelContext) -> dist.ProcessGroup | None:
    """Returns the group of this rank's pipeline stage, in which data-parallel rank d, tensor-parallel rank t has the
    number d tensor_size + t; None for one rank alone.

    Collective over all ranks of the default group. The data- or tensor-parallel group where that is all of the stage.
    """
    if context.tensor_size == 1:
        return context.data_group
    if context.data_size == 1:
        return context.tensor_group
    ranks = context.tensor_size * context.data_size
    return _own_group([range(first, first + ranks) for first in range(0, dist.get_world_size(), ranks)])


def _own_group(members: list[range]) -> dist.ProcessGroup | None:
    """Makes the groups `members`, all of one size, and returns the one of this rank; None for groups of one."""
    own = None
    for ranks in members:
        if len(ranks) > 1:
            # Collective over all ranks, also over those that are not in the group.
            group = dist.new_group(list(ranks))
            own = group if dist.get_rank() in ranks else own
    return own
