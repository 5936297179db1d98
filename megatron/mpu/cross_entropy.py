"""Cross entropy over a vocabulary that is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.mpu.collectives import max_over_ranks, sum_over_ranks
from megatron.mpu.context import ParallelContext


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, num_valid: int | None, context: ParallelContext
) -> Tensor:
    """-log softmax(logits)[label] per position, in float32 (float64 for float64 logits), replicated.

    logits [..., V/tp], this rank's contiguous share of the padded vocabulary; labels [...] global ids below
    `num_valid`. Rows from `num_valid` on stay out of the softmax; None lets all of them in. Saves the logits as they
    are and one number per position; the softmax is computed again in the backward pass.
    """
    losses: Tensor = _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, labels, num_valid, context
    )
    return losses


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, num_valid: int | None, context: ParallelContext) -> Tensor:
        ctx.first = context.tensor_rank * logits.shape[-1]
        ctx.num_valid = num_valid
        local, elsewhere = _local_labels(labels, ctx.first, logits.shape[-1])
        x = _softmax_inputs(logits, ctx.first, num_valid)
        largest = max_over_ranks(x.amax(-1), context)
        at_label = x.gather(-1, local.unsqueeze(-1)).squeeze(-1).sub_(largest).masked_fill_(elsewhere, 0.0)
        total = (x - largest.unsqueeze(-1)).exp_().sum(-1)
        total, at_label = sum_over_ranks(torch.stack((total, at_label)), context).unbind()
        log_total = total.log()
        ctx.save_for_backward(logits, labels, largest + log_total)
        return log_total - at_label

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, log_normalizer = ctx.saved_tensors
        local, elsewhere = _local_labels(labels, ctx.first, logits.shape[-1])
        softmax = (_softmax_inputs(logits, ctx.first, ctx.num_valid) - log_normalizer.unsqueeze(-1)).exp_()
        one_hot = (~elsewhere).to(softmax.dtype).unsqueeze(-1)
        softmax.scatter_add_(-1, local.unsqueeze(-1), -one_hot)
        return softmax.mul_(grad.unsqueeze(-1)).to(logits.dtype), None, None, None


def _local_labels(labels: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each label in this rank's share (0 where another rank holds it), and where another rank holds it."""
    local = labels - first
    elsewhere = (local < 0) | (local >= rows)
    return local.masked_fill(elsewhere, 0), elsewhere


def _softmax_inputs(logits: Tensor, first: int, num_valid: int | None) -> Tensor:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if num_valid is None or first + logits.shape[-1] <= num_valid:
        return x
    padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= num_valid
    return x.masked_fill(padding, -torch.inf)
