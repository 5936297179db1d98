"""Exchanges the input of split weights so that its gradient travels while those of the weights are computed.

`collectives.from_residual` and `gather` begin the exchange of a gradient when the backward pass comes to them, after
every gradient of whoever has read the input. Here the reader begins it: it computes the input's gradient first, hands
it to `begin`, and goes on to its weights. Sums and numbers are the same.

Shape letters: see megatron/README.md. A tensor without letters may have any shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.mpu import collectives
from megatron.mpu.context import ParallelContext


@dataclass(frozen=True)
class _Begun:
    """A gradient on its way."""

    partial: Tensor
    """The gradient as it was handed over."""
    summed: Tensor
    """What it becomes: itself, or this rank's share of it."""
    work: Any


class InputExchange:
    """The exchange of one input, which has a single reader."""

    def __init__(self, context: ParallelContext, dim: int | None) -> None:
        """Takes the dimension along which the input is split; None for one that is replicated."""
        self._context, self._dim = context, dim
        self._begun: _Begun | None = None
        self._shape = torch.Size()

    def whole(self, x: Tensor) -> Tensor:
        """Returns the whole input. Its gradient is the sum over the ranks, or this rank's share of that."""
        if self._context.tensor_size == 1:
            return x
        if torch.compiler.is_compiling():
            # A compiler finds its own order, and knows no object that remembers.
            return self._at_once(x)
        y: Tensor = _Whole.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def begin(self, gradient: Tensor) -> None:
        """Sends this rank's gradient of the whole input, a contiguous tensor that nobody else keeps. Collective.

        Its first dimensions may be joined.
        """
        # Where a compiler has taken the way of `_at_once` in the forward pass, the input has no shape here.
        if not self._shape or torch.compiler.is_compiling():
            return
        group, gradient = self._context.tensor_group, gradient.view(self._shape)
        if self._dim is None:
            self._begun = _Begun(gradient, gradient, dist.all_reduce(gradient, group=group, async_op=True))
            return
        parts = collectives.split_parts(gradient, self._dim, self._context)
        share = torch.empty_like(parts[0])
        work = getattr(dist, collectives.REDUCE_SCATTER)(share, parts.flatten(0, 1), group=group, async_op=True)
        self._begun = _Begun(gradient, share, work)

    def _at_once(self, x: Tensor) -> Tensor:
        if self._dim is None:
            return collectives.copy(x, self._context)
        return collectives.gather(x, self._dim, self._context)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the whole input, outside autograd."""
        y = x.view_as(x) if self._dim is None else collectives.all_gather(x, self._dim, self._context)
        self._shape = y.shape
        return y

    def backward(self, gradient: Tensor) -> Tensor:
        """Returns the gradient of the input once it is there; exchanges it where its reader has not begun."""
        begun, self._begun = self._begun, None
        if begun is None:
            if self._dim is None:
                return collectives.sum_over_ranks(gradient, self._context)
            return collectives.sum_and_scatter(gradient, self._dim, self._context)
        begun.work.wait()
        if begun.partial.data_ptr() != gradient.data_ptr():
            raise RuntimeError("an input whose gradient is sent by its reader has a second reader")
        return begun.summed


def residual_exchange(context: ParallelContext) -> InputExchange:
    """Returns the exchange of the residual stream [B, S or S/tp, D]; see `collectives.from_residual`."""
    return InputExchange(context, 1 if context.sequence_parallel else None)


class _Whole(torch.autograd.Function):
    """The input, and its gradient where that arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: InputExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.backward(grad), None
