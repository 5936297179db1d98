"""Reads the tokens of a run: datasets, their order, and this rank's micro batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.data.data_fingerprint import data_fingerprint
from megatron.data.dataset_manifest import require_manifests, tokenizer_facts
from megatron.data.datasets import Datasets, SampleCounts, build_datasets, sample_counts
from megatron.data.micro_batch import MicroBatch, micro_batches, to_inputs_and_labels
from megatron.data.tokenizer import Tokenizer
from megatron.model.causal_lm import VocabSize
from megatron.mpu.agreement import on_first_rank, on_first_rank_of_each_node
from megatron.mpu.collectives import sum_over_data_ranks
from megatron.mpu.context import ParallelContext
from megatron.training.run_start import RunStart, require_same_data
from megatron.training.shared_folders import same_data_everywhere

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """Datasets of a run, read by one data-parallel rank."""

    datasets: Datasets
    counts: SampleCounts
    """Samples that the datasets' indices are built for."""
    fingerprint: dict[str, str]
    """Decides the tokens of every step, by configuration key (megatron/data/data_fingerprint.py)."""
    batch: BatchConfig
    context: ParallelContext
    num_workers: int
    labelled: frozenset[str]
    """Splits whose datasets have labels of their own."""
    masked_token: int | None
    """Input token whose position does not count in the loss (`eod_mask_loss`); None masks nothing."""

    def read(self, split: Literal["train", "valid", "test"], consumed_samples: int) -> Iterator[MicroBatch]:
        """Yields micro batches without end, from `consumed_samples` on, which counts all ranks' samples.

        Their loss weights are 1 where nothing is masked. Otherwise they are 0 at masked positions, and at the others
        scaled so that their mean is 1 over all micro batches and ranks of a step; reading is then collective over
        data-parallel ranks.
        """
        dataset: Dataset[Any] = getattr(self.datasets, split)
        tokens = micro_batches(
            dataset,
            consumed_samples=consumed_samples,
            micro_batch_size=self.batch.micro_batch_size,
            data_rank=self.context.data_rank,
            data_size=self.context.data_size,
            num_workers=self.num_workers,
        )
        batches = map(partial(to_inputs_and_labels, eod_token=self.masked_token), tokens)
        return self._weighted(batches) if self.masked_token is not None or split in self.labelled else batches

    def _weighted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        # A mean over each micro batch's own positions would weigh a position by how the step is cut up.
        num_batches = self.batch.gradient_accumulation_steps
        while True:
            step = [next(batches) for _ in range(num_batches)]
            masks = torch.stack([mask for _, (_, mask) in step]).double()
            counted = sum_over_data_ranks(masks.sum(), self.context)
            masks *= masks.numel() * self.context.data_size / counted.clamp(min=1)
            for (inputs, (labels, _)), weights in zip(step, masks, strict=True):
                yield inputs, (labels, weights)


def build_training_data(
    config: RunConfig,
    batch: BatchConfig,
    start: RunStart,
    tokenizer: Tokenizer,
    vocab: VocabSize,
    context: ParallelContext,
) -> TrainingData:
    """Builds the datasets of a run. Collective.

    Raises what `build_datasets` raises, DataError where machines have different data, and CheckpointError when the run
    continues one that was trained on other data.
    """
    counts = _index_counts(config, batch, start)
    seq_length, seed = config.model.seq_length, config.training.seed
    build = partial(build_datasets, config.data, counts, seq_length=seq_length, seed=seed, vocab_size=vocab.padded)
    # Reading whole indices takes a while, and the first rank of a machine does it for all of them.
    mine = on_first_rank_of_each_node(build, int(os.environ.get("LOCAL_RANK", "0")))
    fingerprint = same_data_everywhere(lambda: data_fingerprint(config.data, seq_length=seq_length, seed=seed))
    index_keys = on_first_rank(lambda: None if mine is None else mine.index_keys)
    datasets = mine or build(index_keys=index_keys)
    on_first_rank(
        lambda: require_manifests(config.data, tokenizer_facts(config.data.tokenizer, tokenizer), fingerprint)
    )
    require_same_data(start, fingerprint, config.checkpoint)
    masked_token = tokenizer.eod if config.data.eod_mask_loss else None
    labelled = frozenset(
        part for part in ("train", "valid", "test") if getattr(config.data, f"{part}_label_data_paths") is not None
    )
    return TrainingData(datasets, counts, fingerprint, batch, context, config.data.num_workers, labelled, masked_token)


def _index_counts(config: RunConfig, batch: BatchConfig, start: RunStart) -> SampleCounts:
    """Returns the samples that indices are built for: those of the resumed run, whatever train_iters is now."""
    counts = sample_counts(config.training, batch.global_batch_size)
    if start.checkpoint is None or not start.continues:
        return counts
    saved = start.checkpoint.state
    if counts.train > saved.train_index_samples:
        logger.warning(
            "train_iters asks for %d samples, and the data order of this run was made for %d: after those it starts "
            "over from its beginning",
            counts.train,
            saved.train_index_samples,
        )
    return SampleCounts(saved.train_index_samples, saved.valid_index_samples, counts.test)
