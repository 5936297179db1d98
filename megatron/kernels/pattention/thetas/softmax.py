"""Theta of attention proper: softmax over the parameter tokens, times their number."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.pattention.theta import THETAS, RowReduction, wide_dtype


class Softmax:
    """h = s exp(a - m) / z, with m the row's maximum and z = sum(exp(a - m));  da = h (g - <g, h> / s).

    The statistic is (m, z). The published code does not subtract the maximum, and overflows.
    """

    def definition(self, scores: Tensor, scale_base: int) -> Tensor:
        """Computes s exp(a) / sum(exp(a))."""
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
        return scale_base * exponentials / exponentials.sum(-1, keepdim=True)

    def statistic(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        """Computes the maximum and the sum of exponentials [R, J, 2]."""
        largest = rows.max(a_RJp.amax(-1, keepdim=True).to(wide_dtype(a_RJp)))
        total = rows.sum((a_RJp - largest).exp_().sum(-1, keepdim=True))
        return torch.cat((largest, total), dim=-1)

    def weights(self, a_RJp: Tensor, statistic_RJk: Tensor, scale_base: int) -> Tensor:
        """Computes h [R, J, p]."""
        largest, total = statistic_RJk.chunk(2, dim=-1)
        return (a_RJp - largest).exp_().mul_(scale_base / total)

    def gradient(
        self, g_RJp: Tensor, a_RJp: Tensor, statistic_RJk: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        """Computes h and da [R, J, p]."""
        h_RJp = self.weights(a_RJp, statistic_RJk, scale_base)
        projection = rows.sum((g_RJp * h_RJp).sum(-1, keepdim=True)) / scale_base
        return h_RJp, (g_RJp - projection).mul_(h_RJp)


THETAS.register("softmax")(Softmax())
