"""Theta's passes over rows by its formulas in plain torch, one operation after the other.

Shape letters: see megatron/README.md; k counts the numbers of a row statistic.
"""

from __future__ import annotations

from torch import Tensor

from megatron.kernels.pattention.theta import THETAS, RowReduction


class EagerPasses:
    """The row passes of one Theta, as its module in `thetas/` has them; they take no memory over."""

    def __init__(self, theta: str) -> None:
        self.theta = THETAS[theta]

    def weigh(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> tuple[Tensor, Tensor]:
        """Computes h [R, J, p] and the row statistic [R, J, k]."""
        statistic_RJk = self.theta.statistic(a_RJp, scale_base, rows)
        return self.theta.weights(a_RJp, statistic_RJk, scale_base).to(a_RJp.dtype), statistic_RJk

    def differentiate(
        self,
        g_RJp: Tensor,
        a_RJp: Tensor,
        statistic_RJk: Tensor,
        *,
        scale_base: int,
        rows: RowReduction,
        scores_are_spent: bool,
    ) -> tuple[Tensor, Tensor]:
        """Computes h and da [R, J, p]."""
        h_RJp, da_RJp = self.theta.gradient(g_RJp, a_RJp, statistic_RJk, scale_base=scale_base, rows=rows)
        return h_RJp.to(a_RJp.dtype), da_RJp.to(a_RJp.dtype)
