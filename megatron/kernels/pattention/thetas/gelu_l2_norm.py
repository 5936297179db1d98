"""Theta that scales GeLU activations to a fixed length."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.pattention.theta import (
    THETAS,
    RowReduction,
    gelu_gradient,
    norm_factor,
    scaled_to_norm,
    wide_dtype,
)


class GeluL2Norm:
    """w = gelu(a), h = r w, r = sqrt(s) / ||w||;  da = r (g - h <g, h> / s) gelu'(a).

    The statistic is r. The GeLU is the exact one.
    """

    def definition(self, scores: Tensor, scale_base: int) -> Tensor:
        """Computes sqrt(s) gelu(a) / ||gelu(a)||."""
        return scaled_to_norm(F.gelu(scores), math.sqrt(scale_base))

    def statistic(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        """Computes r [R, J, 1]."""
        return norm_factor(F.gelu(a_RJp.to(wide_dtype(a_RJp))), scale_base, rows)

    def weights(self, a_RJp: Tensor, statistic_RJk: Tensor, scale_base: int) -> Tensor:
        """Computes h [R, J, p]."""
        return F.gelu(a_RJp.to(statistic_RJk.dtype)) * statistic_RJk

    def gradient(
        self, g_RJp: Tensor, a_RJp: Tensor, statistic_RJk: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        """Computes h and da [R, J, p]."""
        h_RJp = self.weights(a_RJp, statistic_RJk, scale_base)
        projection = rows.sum((g_RJp * h_RJp).sum(-1, keepdim=True)) / scale_base
        dw_RJp = (g_RJp - h_RJp * projection).mul_(statistic_RJk)
        return h_RJp, gelu_gradient(dw_RJp, a_RJp.to(statistic_RJk.dtype))


THETAS.register("gelu_l2_norm")(GeluL2Norm())
