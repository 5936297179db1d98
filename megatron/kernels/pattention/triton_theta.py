"""Theta in Triton: the formulas of a module in `thetas/`, once more, on blocks of one row.

A Theta without a module in `triton_thetas/` runs eagerly. This one, and those in that folder, import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.pattention.theta import RowReduction
from megatron.registry import Registry


@dataclass(frozen=True, kw_only=True)
class TritonTheta:
    """One Theta as functions of Triton, which a kernel is compiled with.

    They are given blocks of one row in float32 (float64 for float64) and return the same. Where a block reaches beyond
    the row, scores and gradients are 0 and `inside` is false. A row's sums are two numbers; a Theta that needs one
    leaves the other as it is.
    """

    start: float
    """The first sum of a row of which nothing has been seen; the second is 0."""
    accumulate: Any
    """(first, second, a, inside) -> the two sums with another block of scores."""
    complete: Callable[[Tensor, RowReduction], Tensor]
    """Makes the sums [..., 2] of this rank's tokens those of all ranks' tokens, in torch."""
    factors: Any
    """(first, second, scale_base) -> two numbers that the following three are given in place of the sums."""
    weights: Any
    """(a, factor, other_factor) -> h."""
    product: Any
    """(g, a, factor, other_factor) -> summands of the row sum that the gradient needs; it is divided by scale_base."""
    gradient: Any
    """(g, a, projection, factor, other_factor) -> da, where the projection is that row sum divided by scale_base."""


TRITON_THETAS: Registry[TritonTheta] = Registry("Theta in Triton", package="megatron.kernels.pattention.triton_thetas")


def sum_over_ranks(sums: Tensor, rows: RowReduction) -> Tensor:
    """Completes sums that ranks add up."""
    return rows.sum(sums)


@triton.jit
def length_factors(sum_of_squares, other, scale_base):
    """Computes sqrt(scale_base / sum_of_squares), and 0 for a row whose sum is below the smallest normal number."""
    if sum_of_squares.dtype == tl.float64:
        vanishes = sum_of_squares < 2.2250738585072014e-308
    else:
        vanishes = sum_of_squares < 1.1754943508222875e-38
    length = tl.sqrt(tl.where(vanishes, 1.0, sum_of_squares))
    return tl.where(vanishes, 0.0, tl.sqrt(scale_base) / length), other


@triton.jit
def gelu(u):
    """Computes the exact GeLU, u Phi(u)."""
    return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def gelu_derivative(u):
    """Computes Phi(u) + u phi(u)."""
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
