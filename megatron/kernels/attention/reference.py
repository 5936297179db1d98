"""Causal attention spelled out, for comparison and for those who want to see the probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_attention_reference(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E)) v over earlier and equal positions.

    B batch, S sequence, H heads, E features of a head. Returns the output [B, S, H, E] in the dtype of v and the
    probabilities [B, H, S, S] in float32 (float64 for float64); rows are queries.
    """
    q, k, v = (x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)) for x in (q_BSHE, k_BSHE, v_BSHE))
    scores_BHSS = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later_SS = torch.ones(scores_BHSS.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    probabilities_BHSS = scores_BHSS.masked_fill(later_SS, -torch.inf).softmax(-1)
    return (probabilities_BHSS @ v).transpose(1, 2).to(v_BSHE.dtype), probabilities_BHSS
