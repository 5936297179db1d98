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
        rows = max(CHUNK_BYTES[x_RD.device.type] // (len(weight_vD) * wide.itemsize), 1)
        for begin in range(0, len(x_RD), rows):
            chunk = slice(begin, begin + rows)
            z_Rv = softmax_inputs(x_RD[chunk] @ weight_vD.T, first, num_valid)
            local_R, elsewhere_R = local_labels(labels_R[chunk], first, len(weight_vD))
            losses_R, total_R = _losses(z_Rv, local_R, elsewhere_R, context)
            loss += (losses_R * weights_R[chunk]).sum(dtype=torch.float64)
            if dx_RD is None or dw_vD is None:
                continue
            # Now the exponentials become the gradient of the logits.
            z_Rv.mul_((weights_R[chunk] * scale / total_R).to(wide).unsqueeze(-1))
            one_R1 = (weights_R[chunk] * scale).to(wide).masked_fill(elsewhere_R, 0.0).unsqueeze(-1)
            z_Rv.scatter_add_(-1, local_R.unsqueeze(-1), -one_R1)
            dz_Rv = z_Rv.to(x_RD.dtype)
            torch.mm(dz_Rv, weight_vD, out=dx_RD[chunk])
            if dz_Rv.dtype == wide:
                dw_vD.addmm_(dz_Rv.T, x_RD[chunk])
            elif dz_Rv.is_cuda:
                dw_vD += torch.mm(dz_Rv.T, x_RD[chunk], out_dtype=wide)
            else:  # torch has no such product on CPUs
                dw_vD += dz_Rv.T @ x_RD[chunk]
        ctx.factor = 1.0 / (scale * len(x_RD))
        ctx.shape, ctx.weight_dtype = x_BSD.shape, weight_vD.dtype
        ctx.save_for_backward(dx_RD, dw_vD)
        return loss / len(x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx_RD, dw_vD = ctx.saved_tensors
        factor = grad * ctx.factor
        scaled_vD = torch.empty_like(dw_vD, dtype=ctx.weight_dtype)
        torch.mul(dw_vD, factor, out=scaled_vD)
        return (dx_RD * factor).view(ctx.shape), scaled_vD, None, None, None, None, None


def _losses(z_Rv: Tensor, local_R: Tensor, elsewhere_R: Tensor, context: ParallelContext) -> tuple[Tensor, Tensor]:
    """Computes the loss of each row and the sum of its exponentials, over all ranks; z becomes the exponentials.

    These are relative to the largest logit of the row.
    """
    largest_R = max_over_ranks(z_Rv.amax(-1), context)
    z_Rv.sub_(largest_R.unsqueeze(-1))
    at_label_R = z_Rv.gather(-1, local_R.unsqueeze(-1)).squeeze(-1).masked_fill_(elsewhere_R, 0.0)
    total_R, at_label_R = sum_over_ranks(torch.stack((z_Rv.exp_().sum(-1), at_label_R)), context).unbind()
    return total_R.log() - at_label_R, total_R
