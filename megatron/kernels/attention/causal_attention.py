"""Causal attention over the tokens of a sequence, and attention from new tokens to cached keys.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.backends import Operation

CausalAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v [B, S, H, E], dropout on the probabilities) -> softmax(q k^T / sqrt(E)) v over earlier and equal positions,
[B, S, H, E]."""

CAUSAL_ATTENTION: Operation[CausalAttention] = Operation("attention", package="megatron.kernels.attention.backends")


def cached_attention(q_BSHE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask_B1ST: Tensor | None) -> Tensor:
    """Computes softmax(q k^T / sqrt(E)) v over the T keys that the boolean mask lets in; None lets all in.

    Returns [B, S, H, E]. Reference: the last S rows of causal attention.
    """
    output_BHSE = F.scaled_dot_product_attention(q_BSHE.transpose(1, 2), k_BHTE, v_BHTE, attn_mask=mask_B1ST)
    return output_BHSE.transpose(1, 2)
