"""Theta, the normalization of Pattention scores: its definition, and its gradient in closed form.

A Theta is one module in `thetas/`. Each needs one row statistic forward and one row sum backward. Both run over all
parameter tokens: where these are split over ranks, a RowReduction completes them. Dropping the backward one gives right
outputs and wrong gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron.registry import Registry


def _already_complete(row_values: Tensor) -> Tensor:
    return row_values


def _stays_here(gradient: Tensor) -> None:
    pass


@dataclass(frozen=True)
class RowReduction:
    """Completes sums over the parameter tokens that other ranks hold; by default there are none."""

    sum: Callable[[Tensor], Tensor] = _already_complete
    max: Callable[[Tensor], Tensor] = _already_complete
    gather: Callable[[Tensor], Tensor] = _already_complete
    """Puts all ranks' values beside each other, along the last dimension."""
    begin_gradient: Callable[[Tensor], None] = _stays_here
    """Hears the gradient of the rows' input as soon as it is computed, which other ranks have to be told; the tensor
    is new, contiguous, and given back as it is."""


class Theta(Protocol):
    """A normalization of scores over the last dimension, which is a row's parameter tokens.

    `scale_base` is the token count that sets the scale: the current count unless growth has pinned it. The formulas
    call it s, and the inner product of two rows <., .>. A row whose norm is zero, or too small to square, gives zero
    and no gradient, where the published code divides by zero.
    """

    def definition(self, scores: Tensor, scale_base: int) -> Tensor:
        """Computes Theta(a) in plain torch over whole rows [..., P], for comparison; the gradient is autograd's."""

    def statistic(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        """Computes the row statistic [R, J, k] that the other two methods need, in float32 (float64 for float64)."""

    def weights(self, a_RJp: Tensor, statistic_RJk: Tensor, scale_base: int) -> Tensor:
        """Computes h = Theta(a) [R, J, p], in the statistic's dtype."""

    def gradient(
        self, g_RJp: Tensor, a_RJp: Tensor, statistic_RJk: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        """Computes h once more, and da = dL/da from g = dL/dh, both in the statistic's dtype."""


THETAS: Registry[Theta] = Registry("normalization of Pattention scores", package="megatron.kernels.pattention.thetas")


def scaled_to_norm(rows: Tensor, norm: float) -> Tensor:
    """Scales whole rows to the Euclidean length `norm`; rows that vanish become zero."""
    sum_of_squares = rows.square().sum(-1, keepdim=True)
    vanishing = sum_of_squares < torch.finfo(rows.dtype).tiny
    factor = norm / sum_of_squares.masked_fill(vanishing, 1.0).sqrt()
    return rows * factor.masked_fill(vanishing, 0.0)


def norm_factor(values_RJp: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
    """Computes sqrt(s) / ||values|| [R, J, 1] over all ranks' tokens.

    It is 0 where the squares sum to zero or to less than the smallest normal number.
    """
    local = torch.linalg.vector_norm(values_RJp, dim=-1, keepdim=True, dtype=wide_dtype(values_RJp)).square()
    sum_of_squares = rows.sum(local)
    vanishing = sum_of_squares < torch.finfo(sum_of_squares.dtype).tiny
    factor = math.sqrt(scale_base) * sum_of_squares.rsqrt()
    return factor.masked_fill_(vanishing, 0.0)


def wide_dtype(scores: Tensor) -> torch.dtype:
    """Returns the number format of the normalization: float64 for float64, else float32."""
    return torch.promote_types(scores.dtype, torch.float32)


def gelu_gradient(g: Tensor, u: Tensor) -> Tensor:
    """Computes g gelu'(u) for the exact erf GeLU: a new tensor in u's dtype."""
    gradient: Tensor = torch.ops.aten.gelu_backward(g.to(u.dtype), u)
    return gradient
