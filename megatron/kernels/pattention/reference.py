"""The definition of Pattention in plain torch; what every faster path is compared with.

Wang et al. 2024, arXiv:2410.23168, equations 4 and 16; the three normalizations are those of the published code.
Two differences on purpose. A row of scores whose norm is zero, or too small to square, gives zero output and zero
gradient, where the published code divides by zero. softmax subtracts the row's maximum, where the published code
overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pattention_reference(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, theta: str, scale_base: int) -> Tensor:
    """Theta(X K^T) V: x [..., D], key_tokens [n, D], value_tokens [n, N] to [..., N].

    `scale_base` is the token count that sets the scale: n unless growth has pinned it. Scores are computed in the
    dtype of x; normalization in float32, or float64 for float64.
    """
    scores = x @ key_tokens.T
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return WEIGHTS[theta](wide, scale_base).to(x.dtype) @ value_tokens


def softmax(scores: Tensor, scale_base: int) -> Tensor:
    """scale_base * exp(a) / sum(exp(a)) over the last dimension."""
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    return scale_base * exponentials / exponentials.sum(-1, keepdim=True)


def gelu_l2_norm(scores: Tensor, scale_base: int) -> Tensor:
    """sqrt(scale_base) * gelu(a) / ||gelu(a)||_2 over the last dimension; exact erf GeLU."""
    return _scaled_to_norm(F.gelu(scores), math.sqrt(scale_base))


def l2_norm_gelu(scores: Tensor, scale_base: int) -> Tensor:
    """gelu(sqrt(scale_base) * a / ||a||_2) over the last dimension; exact erf GeLU."""
    return F.gelu(_scaled_to_norm(scores, math.sqrt(scale_base)))


def _scaled_to_norm(rows: Tensor, norm: float) -> Tensor:
    sum_of_squares = rows.square().sum(-1, keepdim=True)
    vanishing = sum_of_squares < torch.finfo(rows.dtype).tiny
    factor = norm / sum_of_squares.masked_fill(vanishing, 1.0).sqrt()
    return rows * factor.masked_fill(vanishing, 0.0)


WEIGHTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": softmax,
    "gelu_l2_norm": gelu_l2_norm,
    "l2_norm_gelu": l2_norm_gelu,
}
