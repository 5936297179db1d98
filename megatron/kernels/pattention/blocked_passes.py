"""Theta's eager passes on CPUs, over blocks of rows that stay in the processor's cache from one operation to the next.

The scores of a micro batch are megabytes: every operation of Theta takes them through memory, and new memory for its
result, whose pages the kernel has to clear. In blocks, intermediate results are small and lie where the block before
had them. The numbers are those of whole passes. Shape letters: see megatron/README.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.kernels.pattention.eager_passes import EagerPasses
from megatron.kernels.pattention.theta import RowReduction

BLOCK = 2**17
"""Scores of a block for each of torch's threads: 512 KiB in float32."""
VECTOR = 64
"""Elements that torch computes at once, at most. It computes a rest by other instructions, which may round otherwise:
blocks of whole vectors leave the rest where it is in a whole pass."""


class BlockedPasses(EagerPasses):
    """The row passes of one Theta a block of rows at a time, da over g, and h over scores that are spent.

    Whole where a block has all rows, where other ranks have part of each row, on GPUs, and under a compiler.
    """

    def weigh(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> tuple[Tensor, Tensor]:
        """Computes h [R, J, p] and the row statistic [R, J, k]."""
        size = _rows_of_a_block(a_RJp, rows)
        if size is None:
            return super().weigh(a_RJp, scale_base, rows)
        h_RJp, statistics = torch.empty_like(a_RJp), []
        for a, h in zip(torch.split(a_RJp, size), torch.split(h_RJp, size), strict=True):
            statistic = self.theta.statistic(a, scale_base, rows)
            h.copy_(self.theta.weights(a, statistic, scale_base))
            statistics.append(statistic)
        return h_RJp, torch.cat(statistics)

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
        size = _rows_of_a_block(a_RJp, rows)
        if size is None:
            return super().differentiate(
                g_RJp, a_RJp, statistic_RJk, scale_base=scale_base, rows=rows, scores_are_spent=scores_are_spent
            )
        h_RJp = a_RJp if scores_are_spent else torch.empty_like(a_RJp)
        blocks = (torch.split(whole, size) for whole in (g_RJp, a_RJp, statistic_RJk, h_RJp))
        for g, a, statistic, h in zip(*blocks, strict=True):
            weights, gradient = self.theta.gradient(g, a, statistic, scale_base=scale_base, rows=rows)
            h.copy_(weights)
            g.copy_(gradient)
        return h_RJp, g_RJp


def _rows_of_a_block(a_RJp: Tensor, rows: RowReduction) -> int | None:
    """Returns the rows of a block of scores; None for a whole pass."""
    if torch.compiler.is_compiling() or a_RJp.device.type != "cpu" or rows != RowReduction():
        return None
    scores = a_RJp[0].numel() if len(a_RJp) else 1
    step = VECTOR // math.gcd(VECTOR, scores)
    size = max(BLOCK * torch.get_num_threads() // scores // step, 1) * step
    return size if size < len(a_RJp) else None
