"""Causal attention through PyTorch's fused kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over earlier and equal positions; `dropout` on the probabilities.

    B batch, S sequence, H heads, E features of a head; all tensors [B, S, H, E].
    Reference: megatron/kernels/attention/reference.py
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BSHE, v_BSHE))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)
