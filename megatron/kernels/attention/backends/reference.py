"""Causal attention spelled out, for comparison and for those who want to see the probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION
from megatron.kernels.backends import Backend


def causal_attention_reference(
    q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, dropout: float = 0.0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Computes softmax(scale q k^T) v over earlier and equal positions; a scale of None is 1 / sqrt(E).

    Returns the output [B, S, H, E] in the dtype of v and the probabilities [B, H, S, S], before dropout, in float32
    (float64 for float64); their rows are queries.
    """
    q_BHSE, k_BHSE, v_BHSE = (
        repeat(x, "B S G E -> B (G n) S E", n=q_BSHE.shape[2] // x.shape[2]).to(
            torch.promote_types(x.dtype, torch.float32)
        )
        for x in (q_BSHE, k_BSGE, v_BSGE)
    )
    products_BHSS = q_BHSE @ rearrange(k_BHSE, "B H S E -> B H E S")
    scores_BHSS = products_BHSS / q_BHSE.shape[-1] ** 0.5 if scale is None else products_BHSS * scale
    later_SS = torch.ones(scores_BHSS.shape[-2:], dtype=torch.bool, device=scores_BHSS.device).triu(1)
    probabilities_BHSS = scores_BHSS.masked_fill(later_SS, -torch.inf).softmax(-1)
    output_BHSE = F.dropout(probabilities_BHSS, dropout) @ v_BHSE
    return rearrange(output_BHSE, "B H S E -> B S H E").to(v_BSGE.dtype), probabilities_BHSS


def causal_attention(
    q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Computes causal attention [B, S, H, E]; `dropout` acts on the probabilities."""
    return causal_attention_reference(q_BSHE, k_BSGE, v_BSGE, dropout, scale)[0]


CAUSAL_ATTENTION.register("reference")(Backend(label="reference", rank=None, load=lambda: causal_attention))
