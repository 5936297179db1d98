"""The three normalizations of Pattention scores, forward and backward in closed form, over tokens that may be split.

Each needs one row statistic forward and one row sum backward. Both run over all parameter tokens: where these are
split over ranks, a RowReduction completes them. Dropping the backward one gives right outputs and wrong gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.registry import Registry


def _already_complete(row_values: Tensor) -> Tensor:
    return row_values


@dataclass(frozen=True)
class RowReduction:
    """Completes row statistics over the parameter tokens that other ranks hold; by default there are none."""

    sum: Callable[[Tensor], Tensor] = _already_complete
    max: Callable[[Tensor], Tensor] = _already_complete


class Theta(Protocol):
    """A normalization. a [..., p] scores of the tokens on this rank; statistic [..., k] in float32 or float64;
    results in the statistic's dtype. `scale_base` is called s below; <., .> is a row's inner product."""

    def statistic(self, a: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        """The row statistic that both other methods need."""

    def weights(self, a: Tensor, statistic: Tensor, scale_base: int) -> Tensor:
        """h = Theta(a)."""

    def gradient(
        self, g: Tensor, a: Tensor, statistic: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        """h once more, and da = dL/da from g = dL/dh."""


THETAS: Registry[Theta] = Registry("normalization of Pattention scores")


class _L2NormGelu:
    """u = r a, h = gelu(u), r = sqrt(s) / ||a||;  with p = g gelu'(u):  da = r (p - u <p, u> / s)."""

    def statistic(self, a: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        return _norm_factor(a, scale_base, rows)

    def weights(self, a: Tensor, statistic: Tensor, scale_base: int) -> Tensor:
        return F.gelu(a * statistic)

    def gradient(
        self, g: Tensor, a: Tensor, statistic: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        u = a * statistic
        p = _gelu_backward(g, u)
        projection = rows.sum((p * u).sum(-1, keepdim=True)) / scale_base
        return F.gelu(u), p.addcmul_(u, projection, value=-1).mul_(statistic)


class _GeluL2Norm:
    """w = gelu(a), h = r w, r = sqrt(s) / ||w||;  da = r (g - h <g, h> / s) gelu'(a)."""

    def statistic(self, a: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        return _norm_factor(F.gelu(a.to(_wide(a))), scale_base, rows)

    def weights(self, a: Tensor, statistic: Tensor, scale_base: int) -> Tensor:
        return F.gelu(a.to(statistic.dtype)) * statistic

    def gradient(
        self, g: Tensor, a: Tensor, statistic: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        h = self.weights(a, statistic, scale_base)
        projection = rows.sum((g * h).sum(-1, keepdim=True)) / scale_base
        return h, _gelu_backward((g - h * projection).mul_(statistic), a.to(statistic.dtype))


class _Softmax:
    """h = s exp(a - m) / z, with m the row's maximum and z = sum(exp(a - m));  da = h (g - <g, h> / s).

    The statistic is (m, z).
    """

    def statistic(self, a: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        largest = rows.max(a.amax(-1, keepdim=True).to(_wide(a)))
        total = rows.sum((a - largest).exp_().sum(-1, keepdim=True))
        return torch.cat((largest, total), dim=-1)

    def weights(self, a: Tensor, statistic: Tensor, scale_base: int) -> Tensor:
        largest, total = statistic.chunk(2, dim=-1)
        return (a - largest).exp_().mul_(scale_base / total)

    def gradient(
        self, g: Tensor, a: Tensor, statistic: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        h = self.weights(a, statistic, scale_base)
        projection = rows.sum((g * h).sum(-1, keepdim=True)) / scale_base
        return h, (g - projection).mul_(h)


THETAS.register("l2_norm_gelu")(_L2NormGelu())
THETAS.register("gelu_l2_norm")(_GeluL2Norm())
THETAS.register("softmax")(_Softmax())


def _wide(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def _norm_factor(values: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
    """sqrt(s) / ||values||, and 0 where the squares sum to zero or to less than the smallest normal number."""
    local = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=_wide(values)).square()
    sum_of_squares = rows.sum(local)
    vanishing = sum_of_squares < torch.finfo(sum_of_squares.dtype).tiny
    factor = math.sqrt(scale_base) * sum_of_squares.rsqrt()
    return factor.masked_fill_(vanishing, 0.0)


def _gelu_backward(g: Tensor, u: Tensor) -> Tensor:
    """g gelu'(u), a new tensor in u's dtype."""
    gradient: Tensor = torch.ops.aten.gelu_backward(g.to(u.dtype), u)
    return gradient
