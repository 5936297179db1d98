"""Causal attention over the tokens of a sequence, and attention from new tokens to cached keys.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.backends import Operation

CausalAttention = Callable[[Tensor, Tensor, Tensor, float, float | None], Tensor]
"""(q, k, v [B, S, H, E], dropout on the probabilities, scale) -> softmax(scale q k^T) v over earlier and equal
positions, [B, S, H, E]; None scales by 1 / sqrt(E)."""

CAUSAL_ATTENTION: Operation[CausalAttention] = Operation("attention", package="megatron.kernels.attention.backends")


def cached_attention(
    q_BSHE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask_B1ST: Tensor | None, scale: float | None = None
) -> Tensor:
    """Computes softmax(scale q k^T) v over the T keys that the boolean mask lets in; None lets all in.

    Returns [B, S, H, E]. A scale of None is 1 / sqrt(E). Reference: the last S rows of causal attention.
    """
    output_BHSE = F.scaled_dot_product_attention(
        q_BSHE.transpose(1, 2), k_BHTE, v_BHTE, attn_mask=mask_B1ST, scale=scale
    )
    return output_BHSE.transpose(1, 2)
