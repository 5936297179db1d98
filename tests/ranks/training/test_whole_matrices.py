"""Matrices that lie in pieces on the ranks of a stage: brought together, changed and taken apart, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpointing.engine.flat_partitions import Fragment
from megatron.mpu.context import ParallelContext, stage_group
from megatron.mpu.parameters import local_shard, new_parameter, parameter_spec, zeros
from megatron.training.optimizers.whole_matrices import WholeMatrices
from tests.helpers.distributed import run_distributed

MATRICES = [((8, 8), 0), ((4, 12), 1), ((6, 6), None), ((4, 2), 0), ((12, 8), 1), ((2, 4), None)]
"""Shapes, and the dimension that tensor-parallel ranks split."""


def mixed(matrix: Tensor) -> Tensor:
    """Something of which every element depends on all others and on its place."""
    return matrix.cumsum(0).cumsum(1) * matrix.norm()


def changed_partition(tensor_size: int) -> tuple[int, Tensor, list[Tensor]]:
    """Changes the matrices on this rank; returns its place, its partition, and the whole matrices it began with."""
    context = ParallelContext.create(tensor_size, 1)
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape, _ in MATRICES]
    parameters = [new_parameter(shape, zeros, context, what="it", shard_dim=dim) for shape, dim in MATRICES]
    flat, fragments = partition(wholes, parameters, context)
    matrices = WholeMatrices(fragments, context, stage_group(context))
    matrices.change(flat, mixed)
    wanted, _ = partition([mixed(whole) for whole in wholes], parameters, context)
    torch.testing.assert_close(flat, wanted, rtol=0, atol=0)
    return dist.get_rank(), flat, wholes


def partition(
    wholes: list[Tensor], parameters: list[torch.nn.Parameter], context: ParallelContext
) -> tuple[Tensor, list[Fragment]]:
    """This rank's partition of the shares of the matrices, padded at its end, and what lies where in it."""
    shares = [
        local_shard(whole, parameter_spec(parameter).shard_dim, context).flatten()
        for whole, parameter in zip(wholes, parameters, strict=True)
    ]
    total = torch.cat(shares)
    size = -(-total.numel() // context.data_size) + 1
    first = context.data_rank * size
    padded = torch.cat([total, total.new_zeros(size * context.data_size - total.numel())])
    fragments, start = [], 0
    for parameter, share in zip(parameters, shares, strict=True):
        begin, end = max(start, first), min(start + share.numel(), first + size)
        held = begin < end
        own = slice(begin - start, end - start) if held else slice(0, 0)
        fragments.append(Fragment(parameter, own, slice(begin - first, end - first) if held else slice(0, 0)))
        start += share.numel()
    return padded[first : first + size].clone(), fragments


@pytest.mark.parametrize(
    ("tensor", "data"),
    [(1, 2), (2, 1), *(pytest.param(*sizes, marks=pytest.mark.full) for sizes in [(2, 2), (1, 4), (4, 1)])],
)
def test_every_rank_gets_its_pieces_of_the_changed_matrices(tensor: int, data: int) -> None:
    results = run_distributed(changed_partition, tensor * data, tensor)
    assert [rank for rank, _, _ in results] == list(range(tensor * data))
    assert all(flat.any() for _, flat, _ in results)
