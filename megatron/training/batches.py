"""This rank's micro batches, as the engine takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from megatron.config.training import BatchConfig
from megatron.data.batch import to_inputs_and_labels
from megatron.data.loader import micro_batches
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
        """Endless (inputs, (labels, loss mask)), from `consumed_samples` on, which counts all ranks' samples."""
        tokens = micro_batches(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=self.batch.micro_batch_size,
            data_rank=self.context.data_rank,
            data_size=self.context.data_size,
            num_workers=self.num_workers,
        )
        return map(partial(to_inputs_and_labels, eod_token=self.masked_token), tokens)
