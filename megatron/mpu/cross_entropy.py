"""Cross entropy over a vocabulary that is split over tensor-parallel ranks.

Shape letters: see megatron/README.md; v counts this rank's share V/tp of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.mpu.collectives import max_over_ranks, sum_over_ranks
from megatron.mpu.context import ParallelContext


def vocab_parallel_cross_entropy(
    logits_BSv: Tensor, labels_BS: Tensor, num_valid: int | None, context: ParallelContext
) -> Tensor:
    """Computes -log softmax(logits)[label] per position [B, S], in float32 (float64 for float64 logits), replicated.

    logits [B, S, V/tp] are this rank's contiguous share of the padded vocabulary; labels [B, S] are global ids below
    `num_valid`. Rows from `num_valid` on stay out of the softmax; None lets all of them in. Saves the logits as they
    are and one number per position; the softmax is computed again in the backward pass.
    """
    losses_BS: Tensor = _VocabParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_BSv, labels_BS, num_valid, context
    )
    return losses_BS


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Forward and backward pass of `vocab_parallel_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, logits_BSv: Tensor, labels_BS: Tensor, num_valid: int | None, context: ParallelContext
    ) -> Tensor:
        ctx.first = context.tensor_rank * logits_BSv.shape[-1]
        ctx.num_valid = num_valid
        local_BS, elsewhere_BS = local_labels(labels_BS, ctx.first, logits_BSv.shape[-1])
        x_BSv = softmax_inputs(logits_BSv, ctx.first, num_valid)
        largest_BS = max_over_ranks(x_BSv.amax(-1), context)
        at_label_BS = x_BSv.gather(-1, local_BS.unsqueeze(-1)).squeeze(-1).sub_(largest_BS)
        at_label_BS.masked_fill_(elsewhere_BS, 0.0)
        total_BS = (x_BSv - largest_BS.unsqueeze(-1)).exp_().sum(-1)
        total_BS, at_label_BS = sum_over_ranks(torch.stack((total_BS, at_label_BS)), context).unbind()
        log_total_BS = total_BS.log()
        ctx.save_for_backward(logits_BSv, labels_BS, largest_BS + log_total_BS)
        return log_total_BS - at_label_BS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, None, None]:
        logits_BSv, labels_BS, log_normalizer_BS = ctx.saved_tensors
        local_BS, elsewhere_BS = local_labels(labels_BS, ctx.first, logits_BSv.shape[-1])
        x_BSv = softmax_inputs(logits_BSv, ctx.first, ctx.num_valid)
        softmax_BSv = (x_BSv - log_normalizer_BS.unsqueeze(-1)).exp_()
        one_BS1 = (~elsewhere_BS).to(softmax_BSv.dtype).unsqueeze(-1)
        softmax_BSv.scatter_add_(-1, local_BS.unsqueeze(-1), -one_BS1)
        return softmax_BSv.mul_(grad_BS.unsqueeze(-1)).to(logits_BSv.dtype), None, None, None


def local_labels(labels_BS: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the row of each label in this rank's share, 0 where another rank holds it, and a mask of those."""
    local_BS = labels_BS - first
    elsewhere_BS = (local_BS < 0) | (local_BS >= rows)
    return local_BS.masked_fill(elsewhere_BS, 0), elsewhere_BS


def softmax_inputs(logits_BSv: Tensor, first: int, num_valid: int | None) -> Tensor:
    """Returns the logits in float32 or float64, with -inf where a row is padding that stays out of the softmax."""
    x_BSv = logits_BSv.to(torch.promote_types(logits_BSv.dtype, torch.float32))
    last = first + x_BSv.shape[-1]
    if num_valid is None or last <= num_valid:
        return x_BSv
    padding_v = torch.arange(first, last, device=x_BSv.device) >= num_valid
    return x_BSv.masked_fill(padding_v, -torch.inf)
