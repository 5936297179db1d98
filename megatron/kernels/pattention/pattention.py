"""Pattention: attention from the tokens of a sequence to parameter tokens (Wang et al. 2024, arXiv:2410.23168, eq. 4).

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron.kernels.backends import Operation
from megatron.kernels.pattention.theta import RowReduction


class PattentionFunction(Protocol):
    """Several Pattentions of one input, which share Theta and scale."""

    def __call__(
        self,
        x_BSD: Tensor,
        key_tokens: Sequence[Tensor],
        value_tokens: Sequence[Tensor],
        *,
        theta: str,
        scale_base: int,
        rows: RowReduction,
        recompute_scores: bool = False,
    ) -> Tensor:
        """Computes Theta(X K_j^T) V_j for each projection j: x [B, S, D], K_j [p, D], V_j [p, N] to [J, B, S, N].

        Scores have the dtype of x, row statistics and the normalization are float32, or float64 for float64. Where
        other ranks hold further parameter tokens, `rows` completes the statistics, and the result is this rank's
        summand of the output. `recompute_scores` keeps no scores for the backward pass, which multiplies X K_j^T once
        more.
        """


PATTENTION: Operation[PattentionFunction] = Operation(
    "pattention", package="megatron.kernels.pattention.backends", key="pattention"
)
