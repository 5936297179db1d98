"""Divergences between two distributions over a vocabulary that is split over tensor-parallel ranks.

Shape letters: see megatron/README.md; v counts this rank's share V/tp of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.config.sections.distillation import Divergence
from megatron.mpu.collectives import max_over_ranks, sum_over_ranks
from megatron.mpu.context import ParallelContext
from megatron.mpu.cross_entropy import softmax_inputs


def vocab_parallel_divergence(
    student_BSv: Tensor,
    teacher_BSv: Tensor,
    divergence: Divergence,
    temperature: float,
    num_valid: int,
    context: ParallelContext,
) -> Tensor:
    """Computes T^2 D(p, q) per position [B, S], in float32 (float64 for float64 logits), replicated.

    p and q are the teacher's and the student's softmax(logits / T) over the first `num_valid` rows of the vocabulary;
    other rows take no part, and their logits get no gradient. D is KL(p || q) for forward_kl, KL(q || p) for
    reverse_kl, and (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 for jensen_shannon. The gradient goes to the
    student alone. Logits [B, S, V/tp] are this rank's contiguous share. Saves them as they are and two numbers per
    position; the distributions are computed again in the backward pass.
    """
    divergences_BS: Tensor = _VocabParallelDivergence.apply(  # type: ignore[no-untyped-call]
        student_BSv, teacher_BSv, divergence, temperature, num_valid, context
    )
    return divergences_BS


class _VocabParallelDivergence(torch.autograd.Function):
    """Forward and backward pass of `vocab_parallel_divergence`."""

    @staticmethod
    def forward(
        ctx: Any,
        student_BSv: Tensor,
        teacher_BSv: Tensor,
        divergence: Divergence,
        temperature: float,
        num_valid: int,
        context: ParallelContext,
    ) -> Tensor:
        ctx.divergence, ctx.temperature, ctx.num_valid, ctx.context = divergence, temperature, num_valid, context
        inputs = [_scaled(x_BSv, temperature, num_valid, context) for x_BSv in (student_BSv, teacher_BSv)]
        largest_2BS = max_over_ranks(torch.stack([x_BSv.amax(-1) for x_BSv in inputs]), context)
        totals = [
            (x_BSv - top_BS.unsqueeze(-1)).exp_().sum(-1) for x_BSv, top_BS in zip(inputs, largest_2BS, strict=True)
        ]
        normalizers_2BS = largest_2BS + sum_over_ranks(torch.stack(totals), context).log_()
        ctx.save_for_backward(student_BSv, teacher_BSv, normalizers_2BS)
        log_q_BSv, log_p_BSv = (
            x_BSv - log_total_BS.unsqueeze(-1) for x_BSv, log_total_BS in zip(inputs, normalizers_2BS, strict=True)
        )
        return temperature**2 * sum_over_ranks(_local_divergence(log_q_BSv, log_p_BSv, divergence), context)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        student_BSv, teacher_BSv, normalizers_2BS = ctx.saved_tensors
        log_q_BSv, log_p_BSv = (
            _scaled(x_BSv, ctx.temperature, ctx.num_valid, ctx.context) - log_total_BS.unsqueeze(-1)
            for x_BSv, log_total_BS in zip((student_BSv, teacher_BSv), normalizers_2BS, strict=True)
        )
        q_BSv = log_q_BSv.exp()
        if ctx.divergence == "forward_kl":
            gradient_BSv = q_BSv - log_p_BSv.exp()
        else:
            # The gradient of D by the student's scaled logits is q (g - sum q g), where g is that of D by q.
            by_q_BSv = _gradient_by_q(log_q_BSv, log_p_BSv, ctx.divergence)
            mean_BS1 = sum_over_ranks((q_BSv * by_q_BSv).sum(-1), ctx.context).unsqueeze(-1)
            gradient_BSv = q_BSv * (by_q_BSv - mean_BS1)
        gradient_BSv *= ctx.temperature * grad_BS.unsqueeze(-1)
        return gradient_BSv.to(student_BSv.dtype), None, None, None, None, None


def _scaled(logits_BSv: Tensor, temperature: float, num_valid: int, context: ParallelContext) -> Tensor:
    """Returns the softmax's inputs in float32 or float64, with -inf in the rows that take no part."""
    return softmax_inputs(logits_BSv, context.tensor_rank * logits_BSv.shape[-1], num_valid) / temperature


def _local_divergence(log_q_BSv: Tensor, log_p_BSv: Tensor, divergence: Divergence) -> Tensor:
    """Sums this rank's terms of the divergence per position."""
    if divergence == "forward_kl":
        return _kl(log_p_BSv, log_q_BSv)
    if divergence == "reverse_kl":
        return _kl(log_q_BSv, log_p_BSv)
    log_m_BSv = _log_mean(log_q_BSv, log_p_BSv)
    return (_kl(log_p_BSv, log_m_BSv) + _kl(log_q_BSv, log_m_BSv)) / 2


def _kl(log_a_BSv: Tensor, log_b_BSv: Tensor) -> Tensor:
    return (log_a_BSv.exp() * _difference(log_a_BSv, log_b_BSv)).sum(-1)


def _gradient_by_q(log_q_BSv: Tensor, log_p_BSv: Tensor, divergence: Divergence) -> Tensor:
    """Returns the derivative of the divergence by each q, without constants, which drop out."""
    if divergence == "reverse_kl":
        return _difference(log_q_BSv, log_p_BSv)
    return _difference(log_q_BSv, _log_mean(log_q_BSv, log_p_BSv)) / 2


def _log_mean(log_q_BSv: Tensor, log_p_BSv: Tensor) -> Tensor:
    return torch.logaddexp(log_q_BSv, log_p_BSv) - math.log(2)


def _difference(log_a_BSv: Tensor, log_b_BSv: Tensor) -> Tensor:
    """Subtracts logarithms, and returns 0 in the rows that take no part, where both are -inf."""
    return (log_a_BSv - log_b_BSv).masked_fill(log_a_BSv == -torch.inf, 0.0)
