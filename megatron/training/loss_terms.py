"""Terms of a step's loss, summed over its micro batches where the loss is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from megatron.mpu.context import ParallelContext


class LossTerms:
    """Sums of several terms of a loss; the last pipeline stage adds to them, all ranks learn their means."""

    def __init__(self, count: int, micro_batches: int, device: torch.device, context: ParallelContext) -> None:
        """Makes room for `count` terms, each of which `micro_batches` micro batches of a step add to."""
        self.micro_batches = micro_batches
        self.context = context
        self._sums = torch.zeros(count, dtype=torch.float64, device=device)

    def begin_step(self) -> None:
        """Drops the sums of the step before."""
        self._sums.zero_()

    def add(self, first: int, terms: Sequence[Tensor]) -> None:
        """Adds a micro batch's values to the terms from number `first` on."""
        self._sums[first : first + len(terms)] += torch.stack(list(terms)).detach()

    def means(self) -> list[Tensor]:
        """Returns the means of the terms over the step, in float32, on every rank. Collective."""
        is_counted = self.context.pipe_rank == self.context.pipe_size - 1 and self.context.tensor_rank == 0
        means = self._sums * float(is_counted) / (self.micro_batches * self.context.data_size)
        if distributed.get_world_size() > 1:
            distributed.all_reduce(means)
        return [mean.float() for mean in means.unbind()]
