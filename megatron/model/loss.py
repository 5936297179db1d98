"""The training objective.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.data.micro_batch import Targets
from megatron.mpu.context import ParallelContext
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.linear_cross_entropy import vocab_parallel_linear_cross_entropy


class CausalLMLoss:
    """Weighted mean of the cross entropy over a micro batch's positions.

    The losses are float32 (float64 for float64 logits), their mean is float64: layouts sum them in different orders,
    over positions here and over micro batches and ranks in the engine, which must not show in the curve.

    `num_valid` vocabulary rows are part of the softmax; None means all, padding included, as published.
    """

    def __init__(self, num_valid: int | None, context: ParallelContext) -> None:
        self.num_valid = num_valid
        self.context = context

    def __call__(self, logits_BSv: Tensor, targets: Targets) -> Tensor:
        """Computes the loss of logits [B, S, V/tp].

        `targets` are labels [B, S], and weights [B, S] whose mean over the step is 1.
        """
        labels_BS, weights_BS = targets
        losses_BS = vocab_parallel_cross_entropy(logits_BSv, labels_BS, self.num_valid, self.context)
        return (losses_BS * weights_BS).mean(dtype=torch.float64)


class FusedCausalLMLoss:
    """The same mean from the head's input and matrix, without all logits at once."""

    def __init__(self, num_valid: int | None, context: ParallelContext) -> None:
        self.num_valid = num_valid
        self.context = context

    def __call__(self, head: tuple[Tensor, Tensor], targets: Targets) -> Tensor:
        """Computes the loss of x [B, S, D] and W [V/tp, D], whose product the logits are.

        `targets` are labels [B, S], and weights [B, S] whose mean over the step is 1.
        """
        x_BSD, weight_vD = head
        return vocab_parallel_linear_cross_entropy(x_BSD, weight_vD, *targets, self.num_valid, self.context)
