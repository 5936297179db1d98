"""Records the tokens that every step trained on, as one hash per step (`log_batch_hashes`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed

from megatron.data.micro_batch import MicroBatch, batch_hash, sample_digests
from megatron.monitor.step_records import StepRecords
from megatron.mpu.agreement import on_first_rank
from megatron.training.callback import Callback
from megatron.training.progress import Step
from megatron.training.training_context import TrainingContext

HASHES_FILE = "batch_hashes.jsonl"


class BatchHashes(Callback):
    """Hashes the samples that the engine reads and writes a hash of every global batch to batch_hashes.jsonl.

    The hash is the same for every layout with the same global batch: samples are taken in the order of the data,
    micro batch by micro batch, and in each by data-parallel rank. tools/datasets/batch_viewer.py shows the tokens.
    """

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.file = context.run.folder / HASHES_FILE
        self.micro_batches: list[list[bytes]] = []

    def wrap_batches(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Hashes the samples of every micro batch as it is read."""
        for inputs, (labels, mask) in batches:
            self.micro_batches.append(sample_digests(torch.cat([inputs, labels[:, -1:]], dim=1).numpy()))
            yield inputs, (labels, mask)

    def start(self) -> None:
        """Drops the records of steps that will be taken again. Collective."""
        on_first_rank(self._open)

    def _open(self) -> None:
        self.records = StepRecords(self.file, self.context.progress.iteration)

    def after_step(self, step: Step) -> None:
        """Gathers the data-parallel ranks' hashes on rank 0 and appends a line. Collective."""
        parallel = self.context.run.parallel
        reads_for_others = parallel.tensor_rank == 0 and parallel.pipe_rank == 0
        mine = (parallel.data_rank, self.micro_batches) if reads_for_others else None
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, mine)
        self.micro_batches = []
        if distributed.get_rank() != 0:
            return
        by_rank = [micro_batches for _, micro_batches in sorted(found for found in gathered if found is not None)]
        digests = [digest for step_batches in zip(*by_rank, strict=True) for batch in step_batches for digest in batch]
        self.records.append({"iteration": step.iteration, "sha256": batch_hash(digests)})
