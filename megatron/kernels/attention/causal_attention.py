"""Causal attention over the tokens of a sequence, and attention from new tokens to cached keys.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.backends import Operation

CausalAttention = Callable[[Tensor, Tensor, Tensor, float, float | None], Tensor]
"""(q [B, S, H, E], k and v [B, S, G, E], dropout on the probabilities, scale) -> softmax(scale q k^T) v over earlier
and equal positions, [B, S, H, E]; None scales by 1 / sqrt(E). Each of the G heads of keys and values serves H/G query
heads, which are neighbours (Ainslie et al. 2023, arXiv:2305.13245)."""

CAUSAL_ATTENTION: Operation[CausalAttention] = Operation("attention", package="megatron.kernels.attention.backends")


def cached_attention(
    q_BSHE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, mask_B1ST: Tensor | None, scale: float | None = None
) -> Tensor:
    """Computes softmax(scale q k^T) v over the T keys that the boolean mask lets in; None lets all in.

    Returns [B, S, H, E]. A scale of None is 1 / sqrt(E). Reference: the last S rows of causal attention.
    """
    grouped = q_BSHE.shape[2] != k_BGTE.shape[1]
    output_BHSE = F.scaled_dot_product_attention(
        q_BSHE.transpose(1, 2), k_BGTE, v_BGTE, attn_mask=mask_B1ST, scale=scale, enable_gqa=grouped
    )
    return output_BHSE.transpose(1, 2)
