"""Differentiable communication between tensor-parallel ranks.

A replicated tensor holds the same numbers on every rank, a split one a contiguous share of a dimension, a partial one a
summand of the true value. Each function names the kinds that it takes and returns; its backward pass takes the gradient
from the kind that it returned to the kind that it took. All are the identity when there is one tensor-parallel rank.

Shape letters: see megatron/README.md. A tensor without letters may have any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu.context import ParallelContext

# torch 2.13 renamed these two, and warns about the names that 2.11 has.
RENAMED = hasattr(dist, "all_gather_single")
ALL_GATHER = "all_gather_single" if RENAMED else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if RENAMED else "reduce_scatter_tensor"


def sum_over_ranks(x: Tensor, context: ParallelContext) -> Tensor:
    """Sums a partial tensor to a replicated one, outside autograd."""
    return _all_reduce(x, context, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor, context: ParallelContext) -> Tensor:
    """Takes the elementwise maximum over the ranks, outside autograd."""
    return _all_reduce(x, context, dist.ReduceOp.MAX)


def sum_over_data_ranks(x: Tensor, context: ParallelContext) -> Tensor:
    """Sums over the data-parallel ranks, outside autograd; `x` may be on the CPU."""
    if context.data_size == 1:
        return x
    total = x.cuda() if dist.get_backend(context.data_group) == dist.Backend.NCCL else x.clone()
    dist.all_reduce(total, group=context.data_group)
    return total.to(x.device)


def copy(x: Tensor, context: ParallelContext) -> Tensor:
    """Hands a replicated tensor to consumers that differ by rank: the gradient is partial, and is summed."""
    return _exchange(x, context, _same, partial(sum_over_ranks, context=context))


def reduce(x: Tensor, context: ParallelContext) -> Tensor:
    """Sums a partial tensor to a replicated one; the gradient is replicated, and passes through.

    The sum takes the memory of `x`, which nobody may read afterwards.
    """
    return _exchange(x, context, partial(_sum_in_place, context=context), _same)


def gather(x: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """Gathers a tensor split along `dim`, for consumers that differ by rank: the gradient is summed and scattered."""
    return _exchange(x, context, _along(all_gather, x, dim, context), _along(sum_and_scatter, x, dim, context))


def gather_output(x: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """Gathers a tensor split along `dim`, for consumers that are the same on every rank.

    Each rank keeps its share of the gradient.
    """
    return _exchange(x, context, _along(all_gather, x, dim, context), _along(_own_share, x, dim, context))


def reduce_scatter(x: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """Sums a partial tensor to one that is split along `dim`; the gradient is gathered."""
    return _exchange(x, context, _along(sum_and_scatter, x, dim, context), _along(all_gather, x, dim, context))


def from_residual(x_BSD: Tensor, context: ParallelContext) -> Tensor:
    """Returns the whole sequence [B, S, D], which split weights read, of the residual stream [B, S or S/tp, D]."""
    return gather(x_BSD, 1, context) if context.sequence_parallel else copy(x_BSD, context)


def to_residual(x_BSD: Tensor, context: ParallelContext) -> Tensor:
    """Sums the partial outputs [B, S, D] of split weights to the residual stream [B, S or S/tp, D]."""
    return reduce_scatter(x_BSD, 1, context) if context.sequence_parallel else reduce(x_BSD, context)


def residual_weight(weight: Tensor, context: ParallelContext) -> Tensor:
    """Returns a replicated weight as it acts on the residual stream.

    Under sequence parallelism each rank sees its gradient from its own positions only, so the gradients are summed.
    """
    return copy(weight, context) if context.sequence_parallel else weight


def _all_reduce(x: Tensor, context: ParallelContext, op: dist.ReduceOp.RedOpType) -> Tensor:
    if context.tensor_size == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=op, group=context.tensor_group)
    return total


def _sum_in_place(x: Tensor, context: ParallelContext) -> Tensor:
    if torch.compiler.is_compiling() or not x.is_contiguous():
        return sum_over_ranks(x, context)
    total = x.detach()
    dist.all_reduce(total, group=context.tensor_group)
    return total


def all_gather(x: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """Gathers a tensor split along `dim`, 0 or above, outside autograd."""
    parts = x.new_empty((context.tensor_size * x.shape[0], *x.shape[1:]))
    getattr(dist, ALL_GATHER)(parts, x.contiguous(), group=context.tensor_group)
    return parts.view(context.tensor_size, *x.shape).movedim(0, dim).flatten(dim, dim + 1)


def sum_and_scatter(x: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """Sums a partial tensor to this rank's share along `dim`, 0 or above, outside autograd."""
    parts = split_parts(x, dim, context)
    share = torch.empty_like(parts[0])
    getattr(dist, REDUCE_SCATTER)(share, parts.flatten(0, 1), group=context.tensor_group)
    return share


def split_parts(x: Tensor, dim: int, context: ParallelContext) -> Tensor:
    """Lays the ranks' shares along `dim`, 0 or above, one after the other in a new first dimension, contiguous."""
    split = (*x.shape[:dim], context.tensor_size, -1, *x.shape[dim + 1 :])
    return x.reshape(split).movedim(dim, 0).contiguous()


def _own_share(x: Tensor, dim: int, context: ParallelContext) -> Tensor:
    return x.tensor_split(context.tensor_size, dim=dim)[context.tensor_rank]


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


Communication = Callable[[Tensor], Tensor]


def _along(
    function: Callable[[Tensor, int, ParallelContext], Tensor], x: Tensor, dim: int, context: ParallelContext
) -> Communication:
    axis = dim % x.dim()
    return lambda y: function(y, axis, context)


def _exchange(x: Tensor, context: ParallelContext, forward: Communication, backward: Communication) -> Tensor:
    if context.tensor_size == 1:
        return x
    y: Tensor = _Exchange.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return y


class _Exchange(torch.autograd.Function):
    """One communication forward, its conjugate backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Communication, backward: Communication) -> Tensor:
        ctx.conjugate = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.conjugate(grad), None, None
