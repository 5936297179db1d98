"""Cross entropy straight from the head's input: the logits of a few rows at a time, over a split vocabulary.

torch's own `F.linear_cross_entropy` does this for one rank. It has no place for sums over ranks, and returns bfloat16
losses in bfloat16, whose steps of 0.06 at a loss of 11 would be the curve; so it is what the tests compare with.

Shape letters: see megatron/README.md; v counts this rank's share V/tp of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.mpu.collectives import max_over_ranks, sum_over_ranks
from megatron.mpu.context import ParallelContext
from megatron.mpu.cross_entropy import local_labels, softmax_inputs

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Wide logits of one chunk, by device [bytes]: small enough for a CPU's cache to help, large enough to fill a GPU and
to add up the gradient of the head's matrix in a few rounds."""
FP16_SCALE = 2.0**-4
"""Keeps a chunk's sums for the head's matrix within fp16: 4,096 rows of 16 x 65,504 / 4,096 = 255 do not overflow."""


def vocab_parallel_linear_cross_entropy(
    x_BSD: Tensor,
    weight_vD: Tensor,
    labels_BS: Tensor,
    weights_BS: Tensor,
    num_valid: int | None,
    context: ParallelContext,
) -> Tensor:
    """Computes the mean over positions of weight * -log softmax(x W^T)[label], in float64, replicated.

    x [B, S, D] is replicated, and its gradient partial: `collectives.from_residual` comes before. weight [V/tp, D] are
    this rank's contiguous rows of the padded vocabulary; labels [B, S] are global ids below `num_valid`. Rows from
    `num_valid` on stay out of the softmax; None lets all of them in. Statistics and losses are float32 (float64 for
    float64). Both gradients are computed here, while the logits are there, and wait for the backward pass: x's in its
    dtype, the matrix's in float32 (float64).
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_BSD, weight_vD, labels_BS, weights_BS, num_valid, context, torch.is_grad_enabled()
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward and backward pass of `vocab_parallel_linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        weight_vD: Tensor,
        labels_BS: Tensor,
        weights_BS: Tensor,
        num_valid: int | None,
        context: ParallelContext,
        with_gradient: bool,
    ) -> Tensor:
        x_RD, labels_R, weights_R = x_BSD.flatten(0, 1), labels_BS.flatten(), weights_BS.flatten()
        wide = torch.promote_types(x_RD.dtype, torch.float32)
        first = context.tensor_rank * len(weight_vD)
        # The mean's divisor goes into the logits' gradient before that is rounded; in fp16, whose range is too small,
        # all of it but a power of two, by which the results can be multiplied without rounding them again.
        scale = 1.0 / len(x_RD)
        if x_RD.dtype == torch.float16:
            scale = math.frexp(scale)[0] * FP16_SCALE
        dx_RD = torch.empty_like(x_RD) if with_gradient else None
        dw_vD = torch.zeros_like(weight_vD, dtype=wide) if with_gradient else None
        loss = torch.zeros((), dtype=torch.float64, device=x_RD.device)
        rows = min(max(CHUNK_BYTES[x_RD.device.type] // (len(weight_vD) * wide.itemsize), 1), len(x_RD))
        # One for all chunks: fresh memory costs a CPU more than the arithmetic on it.
        buffer_Rv = x_RD.new_empty((rows, len(weight_vD)))
        for begin in range(0, len(x_RD), rows):
            chunk = slice(begin, begin + rows)
            part_RD, part_weights_R = x_RD[chunk], weights_R[chunk]
            logits_Rv = torch.mm(part_RD, weight_vD.T, out=buffer_Rv[: len(part_RD)])
            losses_R, dlogits_Rv = _losses_and_gradient(
                logits_Rv,
                local_labels(labels_R[chunk], first, len(weight_vD)),
                part_weights_R * scale if with_gradient else None,
                (first, num_valid),
                context,
            )
            loss += (losses_R * part_weights_R).sum(dtype=torch.float64)
            if dlogits_Rv is None or dx_RD is None or dw_vD is None:
                continue
            torch.mm(dlogits_Rv, weight_vD, out=dx_RD[chunk])
            if dlogits_Rv.dtype == wide:
                dw_vD.addmm_(dlogits_Rv.T, part_RD)
            elif dlogits_Rv.is_cuda:
                dw_vD += torch.mm(dlogits_Rv.T, part_RD, out_dtype=wide)
            else:  # torch has no such product on CPUs
                dw_vD += dlogits_Rv.T @ part_RD
        ctx.factor = 1.0 / (scale * len(x_RD))
        ctx.shape, ctx.weight_dtype = x_BSD.shape, weight_vD.dtype
        ctx.save_for_backward(dx_RD, dw_vD)
        return loss / len(x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_RD, dw_vD = ctx.saved_tensors
        factor = grad * ctx.factor
        # In place where the formats agree and nobody can ask for a second pass: this is the largest tensor of all.
        in_place = dw_vD.dtype == ctx.weight_dtype and not torch._C._autograd._get_current_graph_task_keep_graph()
        scaled_vD = dw_vD if in_place else torch.empty_like(dw_vD, dtype=ctx.weight_dtype)
        torch.mul(dw_vD, factor, out=scaled_vD)
        return (dx_RD * factor).view(ctx.shape), scaled_vD, None, None, None, None, None


def _losses_and_gradient(
    logits_Rv: Tensor,
    labels: tuple[Tensor, Tensor],
    factors_R: Tensor | None,
    valid: tuple[int, int | None],
    context: ParallelContext,
) -> tuple[Tensor, Tensor | None]:
    """Computes the loss of each row and, in the memory of the logits, its gradient times the row's factor.

    `labels` are those of `local_labels`; `valid` is this rank's first row of the vocabulary, and the number of rows in
    the softmax. Without factors there is no gradient.
    """
    local_R, elsewhere_R = labels
    z_Rv = softmax_inputs(logits_Rv, *valid)
    largest_R = max_over_ranks(z_Rv.amax(-1), context)
    z_Rv.sub_(largest_R.unsqueeze(-1))
    at_label_R = z_Rv.gather(-1, local_R.unsqueeze(-1)).squeeze(-1).masked_fill_(elsewhere_R, 0.0)
    total_R, at_label_R = sum_over_ranks(torch.stack((z_Rv.exp_().sum(-1), at_label_R)), context).unbind()
    losses_R = total_R.log() - at_label_R
    if factors_R is None:
        return losses_R, None
    # Exponentials become probabilities, and these the gradient of the logits.
    z_Rv.mul_((factors_R / total_R).to(z_Rv.dtype).unsqueeze(-1))
    at_label_R1 = factors_R.to(z_Rv.dtype).masked_fill(elsewhere_R, 0.0).unsqueeze(-1)
    z_Rv.scatter_add_(-1, local_R.unsqueeze(-1), -at_label_R1)
    return losses_R, z_Rv if z_Rv is logits_Rv else logits_Rv.copy_(z_Rv)
