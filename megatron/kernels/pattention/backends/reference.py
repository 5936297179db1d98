"""The definition of Pattention in plain torch; every faster path is compared with it.

Wang et al. 2024, arXiv:2410.23168, equations 4 and 16; the normalizations are those of the published code, but for rows
that it turns into NaN or infinity: see megatron/kernels/pattention/theta.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.kernels.backends import Backend
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.pattention.theta import THETAS, RowReduction, wide_dtype


def pattention_reference(x: Tensor, key_PD: Tensor, value_PN: Tensor, theta: str, scale_base: int) -> Tensor:
    """Computes Theta(X K^T) V from x [..., D] to [..., N].

    `scale_base` is the token count that sets the scale: P unless growth has pinned it. Scores have the dtype of x, the
    normalization is computed in float32, or float64 for float64.
    """
    scores = x @ key_PD.T
    weights = THETAS[theta].definition(scores.to(wide_dtype(scores)), scale_base)
    return weights.to(x.dtype) @ value_PN


def pattention(
    x_BSD: Tensor,
    key_tokens: Sequence[Tensor],
    value_tokens: Sequence[Tensor],
    *,
    theta: str,
    scale_base: int,
    rows: RowReduction,
    recompute_scores: bool = False,
) -> Tensor:
    """Computes each projection by its definition [J, B, S, N].

    Raises ValueError where other ranks hold further parameter tokens, for the definition is one of whole rows, and for
    `recompute_scores`: what is saved is autograd's choice here.
    """
    if recompute_scores:
        raise ValueError("the reference of Pattention saves whatever autograd does")
    if rows != RowReduction():
        raise ValueError("the reference of Pattention needs all parameter tokens on one rank")
    pairs = zip(key_tokens, value_tokens, strict=True)
    return torch.stack([pattention_reference(x_BSD, key, value, theta, scale_base) for key, value in pairs])


PATTENTION.register("reference")(Backend(label="reference", rank=None, load=lambda: pattention))
