"""Causal attention by PyTorch's scaled_dot_product_attention, which picks a fused kernel for the device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION
from megatron.kernels.backends import Backend


def causal_attention(
    q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Computes causal attention [B, S, H, E]; `dropout` acts on the probabilities."""
    q_BHSE, k_BGSE, v_BGSE = (x.transpose(1, 2) for x in (q_BSHE, k_BSGE, v_BSGE))
    grouped = q_BSHE.shape[2] != k_BSGE.shape[2]
    output_BHSE = F.scaled_dot_product_attention(
        q_BHSE, k_BGSE, v_BGSE, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return output_BHSE.transpose(1, 2)


CAUSAL_ATTENTION.register("sdpa")(Backend(label="torch SDPA", rank=0, load=lambda: causal_attention))
