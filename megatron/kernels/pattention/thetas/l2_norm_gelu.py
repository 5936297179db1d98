"""Theta of the published TokenFormers: scores scaled to a fixed length, then GeLU."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.pattention.theta import THETAS, RowReduction, gelu_gradient, norm_factor, scaled_to_norm


class L2NormGelu:
    """u = r a, h = gelu(u), r = sqrt(s) / ||a||;  with q = g gelu'(u):  da = r (q - u <q, u> / s).

    The statistic is r. The GeLU is the exact one.
    """

    def definition(self, scores: Tensor, scale_base: int) -> Tensor:
        """Computes gelu(sqrt(s) a / ||a||)."""
        return F.gelu(scaled_to_norm(scores, math.sqrt(scale_base)))

    def statistic(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        """Computes r [R, J, 1]."""
        return norm_factor(a_RJp, scale_base, rows)

    def weights(self, a_RJp: Tensor, statistic_RJk: Tensor, scale_base: int) -> Tensor:
        """Computes h [R, J, p]."""
        return F.gelu(a_RJp * statistic_RJk)

    def gradient(
        self, g_RJp: Tensor, a_RJp: Tensor, statistic_RJk: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        """Computes h and da [R, J, p]."""
        u_RJp = a_RJp * statistic_RJk
        q_RJp = gelu_gradient(g_RJp, u_RJp)
        projection = rows.sum((q_RJp * u_RJp).sum(-1, keepdim=True)) / scale_base
        return F.gelu(u_RJp), q_RJp.addcmul_(u_RJp, projection, value=-1).mul_(statistic_RJk)


THETAS.register("l2_norm_gelu")(L2NormGelu())
