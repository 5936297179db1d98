"""Records which tokens every step trained on, as one hash per step (`log_batch_hashes`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from megatron.data.micro_batch import batch_hash, sample_digests
from megatron.monitor.metrics_file import read_records
from megatron.mpu.context import ParallelContext
from megatron.training.step import Step

HASHES_FILE = "batch_hashes.jsonl"


class LogBatchHashes:
    """Passes micro batches on, and after each step writes the hash of the global batch to batch_hashes.jsonl.

    The hash is the same for every layout with the same global batch: samples are taken in the order of the data,
    micro batch by micro batch, and in each by data-parallel rank. tools/datasets/batch_viewer.py shows the tokens.
    """

    def __init__(self, batches: Iterator[Any], context: ParallelContext, folder: Path, iteration: int) -> None:
        """`iteration` is where the run starts: what an interrupted run recorded after it is dropped."""
        self.batches = batches
        self.context = context
        self.iteration = iteration
        self.file = folder / HASHES_FILE
        self.micro_batches: list[list[bytes]] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        inputs, (labels, mask) = next(self.batches)
        self.micro_batches.append(sample_digests(torch.cat([inputs, labels[:, -1:]], dim=1).numpy()))
        return inputs, (labels, mask)

    def before_training(self) -> None:
        """Drop the records of steps that will be taken again."""
        if distributed.get_rank() == 0:
            done = read_records(self.file) if self.iteration and self.file.exists() else []
            lines = [json.dumps(record) for record in done if record["iteration"] <= self.iteration]
            self.file.write_text("".join(f"{line}\n" for line in lines))

    def after_step(self, step: Step) -> None:
        """Gather the data-parallel ranks' samples on rank 0 and append a line. Collective."""
        reads_for_others = self.context.tensor_rank == 0 and self.context.pipe_rank == 0
        mine = (self.context.data_rank, self.micro_batches) if reads_for_others else None
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, mine)
        self.micro_batches = []
        if distributed.get_rank() != 0:
            return
        by_rank = [micro_batches for _, micro_batches in sorted(found for found in gathered if found is not None)]
        digests = [digest for step_batches in zip(*by_rank, strict=True) for batch in step_batches for digest in batch]
        with self.file.open("a") as file:
            file.write(json.dumps({"iteration": step.iteration, "sha256": batch_hash(digests)}) + "\n")
