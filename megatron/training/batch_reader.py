"""This rank's micro batches, as the engine takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron.config.sections.training import BatchConfig
from megatron.data.micro_batch import micro_batches, to_inputs_and_labels
from megatron.mpu.collectives import sum_over_data_ranks
from megatron.mpu.context import ParallelContext


@dataclass(frozen=True)
class BatchReader:
    """Reads any of a run's datasets for one data-parallel rank."""

    batch: BatchConfig
    context: ParallelContext
    num_workers: int
    masked_token: int | None
    """Input token whose position does not count in the loss (`eod_mask_loss`); None masks nothing."""

    def read(self, dataset: Dataset[Any], consumed_samples: int) -> Iterator[Any]:
        """Endless (inputs, (labels, loss weights)), from `consumed_samples` on, which counts all ranks' samples.

        Weights are 1 where nothing is masked. Otherwise they are 0 at masked positions, and at the others what makes
        their mean 1 over all micro batches and ranks of a step; reading is then collective over data-parallel ranks.
        """
        tokens = micro_batches(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=self.batch.micro_batch_size,
            data_rank=self.context.data_rank,
            data_size=self.context.data_size,
            num_workers=self.num_workers,
        )
        batches = map(partial(to_inputs_and_labels, eod_token=self.masked_token), tokens)
        return batches if self.masked_token is None else self._weighted(batches)

    def _weighted(self, batches: Iterator[Any]) -> Iterator[Any]:
        # A mean over each micro batch's own positions would weigh a position by how the step is cut up.
        num_batches = self.batch.gradient_accumulation_steps
        while True:
            step = [next(batches) for _ in range(num_batches)]
            masks = torch.stack([mask for _, (_, mask) in step]).double()
            counted = sum_over_data_ranks(masks.sum(), self.context)
            masks *= masks.numel() * self.context.data_size / counted.clamp(min=1)
            for (inputs, (labels, _)), weights in zip(step, masks, strict=True):
                yield inputs, (labels, weights)
