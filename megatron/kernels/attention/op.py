"""Causal attention through fused kernels: PyTorch's own, or flash-attn's.

B batch, S sequence, H heads, E features of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from megatron.registry import require

CausalAttention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q, k, v [B, S, H, E], dropout on the probabilities) -> [B, S, H, E]."""


def causal_attention(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over earlier and equal positions; `dropout` on the probabilities.

    Reference: megatron/kernels/attention/reference.py
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BSHE, v_BSHE))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)


def cached_attention(q_BSHE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask_B1ST: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the T keys that the boolean mask lets in; None lets all in. Returns [B, S, H, E].

    Reference: the last S rows of megatron/kernels/attention/reference.py
    """
    output_BHSE = F.scaled_dot_product_attention(q_BSHE.transpose(1, 2), k_BHTE, v_BHTE, attn_mask=mask_B1ST)
    return output_BHSE.transpose(1, 2)


def flash_attention() -> CausalAttention:
    """The same function through flash-attn: on NVIDIA GPUs, in bf16 or fp16.

    Raises EnvironmentSetupError when the package is not installed.
    """
    flash_attn = require("flash_attn", "flash_attention: on", "Install it with `pip install -r requirements/gpu.txt`.")

    def attend(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, dropout: float) -> Tensor:
        output_BSHE: Tensor = flash_attn.flash_attn_func(q_BSHE, k_BSHE, v_BSHE, dropout_p=dropout, causal=True)
        return output_BSHE

    return attend
