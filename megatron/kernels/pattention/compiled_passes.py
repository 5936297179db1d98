"""Theta's passes over rows by its formulas in plain torch, each made into one kernel by torch.compile.

Importing this loads torch's compiler, which takes seconds. Shape letters: see megatron/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.pattention.eager_passes import EagerPasses
from megatron.kernels.pattention.theta import RowReduction


class CompiledPasses:
    """Theta's eager passes, compiled once for all shapes."""

    def __init__(self, theta: str) -> None:
        eager = EagerPasses(theta)
        self._weigh = torch.compile(eager.weigh, dynamic=True)
        self._differentiate = torch.compile(eager.differentiate, dynamic=True)

    def weigh(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> tuple[Tensor, Tensor]:
        """Computes h [R, J, p] and the row statistic [R, J, k]."""
        h_RJp, statistic_RJk = self._weigh(a_RJp, scale_base, _uncompiled(rows))
        return h_RJp, statistic_RJk

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
        h_RJp, da_RJp = self._differentiate(
            g_RJp, a_RJp, statistic_RJk, scale_base=scale_base, rows=_uncompiled(rows), scores_are_spent=False
        )
        return h_RJp, da_RJp


class _Uncompiled:
    """A reduction over ranks that stays outside of what is compiled, whichever function it is."""

    def __init__(self, reduction: object) -> None:
        self.reduction = reduction

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, row_values: Tensor) -> Tensor:
        reduced: Tensor = self.reduction(row_values)  # type: ignore[operator]
        return reduced


def _uncompiled(rows: RowReduction) -> RowReduction:
    if rows == RowReduction():
        return rows
    return RowReduction(sum=_Uncompiled(rows.sum), max=_Uncompiled(rows.max))
