"""Loss of a trained model on a fixed part of its validation data: the same samples for every model and layout.

During training each validation reads the next samples. Here they are the first `eval_iters` batches of the validation
data always, in an order that no number of training steps changes, so that models can be compared.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.data.data_fingerprint import data_fingerprint
from megatron.data.datasets import validation_dataset
from megatron.data.micro_batch import to_inputs_and_labels
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import ConfigError, NonFiniteError
from megatron.io.progress import PeriodicReport
from megatron.loaded_model.loaded_model import LoadedModel, load_model, require_tokenizer
from megatron.mpu.agreement import gather_objects
from megatron.mpu.context import ParallelContext

logger = logging.getLogger(__name__)

SEQUENCES_AT_A_TIME = 8
"""Sequences of a batch where neither eval_batch_size nor the micro batch says how many [sequences]."""


@dataclass(frozen=True)
class ValidationLoss:
    """A measured loss, and what it was measured on."""

    loss: float
    """Mean over all labels that count [nats per token]."""
    samples: int
    """Samples that were read [samples]."""
    data: str
    """SHA-256 of what decides these samples: datasets, tokenizer, split, seed, length and number."""
    value_reads: dict[str, float] | None = None
    """Where positions read the strongest tokens alone: the share of all values that were `chosen`, and of those that
    are `in_blocks` of 32 tokens with a chosen one."""

    @property
    def perplexity(self) -> float:
        """Returns exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def validation_loss(
    config: RunConfig, checkpoint: Checkpoint, samples: int, context: ParallelContext, device: torch.device
) -> ValidationLoss:
    """Measures a checkpoint on the first `samples` samples of the configured validation data. Collective.

    The model is the checkpoint's own; data, sequence length, seed, precision and layout are the configuration's. Every
    data-parallel rank takes a share of the samples; sums are exact, so that shares change nothing. Raises ConfigError
    without validation data, with another tokenizer than the checkpoint's, and for sequences that its model is not made
    for; DataError and CheckpointError for damaged files; NonFiniteError for a loss that is no number.
    """
    model, length = checkpoint.config.model, config.model.seq_length
    if length > model.max_position_embeddings:
        raise ConfigError(
            f"seq_length: {length}: {checkpoint.path} is made for {model.max_position_embeddings} tokens at most "
            "(max_position_embeddings). Configure a shorter sequence."
        )
    tokenizer = build_tokenizer(config.data.tokenizer)
    require_tokenizer(checkpoint, tokenizer)
    sizes = {"seq_length": length, "seed": config.training.seed}
    dataset = validation_dataset(config.data, samples, **sizes, vocab_size=checkpoint.vocab.padded)
    measured = config.model_copy(update={"model": model, "grow": None, "inherit": None})
    loaded = load_model(measured, checkpoint, context, device)
    own = range(context.data_rank, samples, context.data_size)
    eod = tokenizer.eod if config.data.eod_mask_loss else None
    sums = []
    report = PeriodicReport(logger.info)
    for items in _batches(own, _batch_size(config)):
        tokens = torch.stack([torch.from_numpy(dataset[item]) for item in items])
        sums += list(zip(items, *_sums(loaded, tokens, eod), strict=True))
        report("%s: %d of %d samples measured", checkpoint.path, len(sums), len(own))
    shares = gather_objects(sums if context.tensor_rank == 0 else [])
    found = sorted(chain.from_iterable(shares))
    counted = sum(count for _, _, count in found)
    loss = math.fsum(total for _, total, _ in found) / max(counted, 1)
    if not math.isfinite(loss):
        raise NonFiniteError(f"{checkpoint.path}: its validation loss is {loss}. Choose another checkpoint.")
    facts = data_fingerprint(config.data, **sizes) | {"samples": str(samples), "eod_mask_loss": str(eod)}
    data = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return ValidationLoss(loss, samples, data, _value_reads(loaded))


def _value_reads(model: LoadedModel) -> dict[str, float] | None:
    """Returns the shares of values that all ranks have read. Collective."""
    if model.reads is None:
        return None
    everywhere = gather_objects(model.reads)
    total = sum(reads.everything for reads in everywhere)
    return {
        "chosen": sum(reads.chosen for reads in everywhere) / total,
        "in_blocks": sum(reads.in_blocks for reads in everywhere) / total,
    }


def _batch_size(config: RunConfig) -> int:
    asked = config.evaluation.batch_size
    return asked if asked != "auto" else config.training.train_micro_batch_size_per_gpu or SEQUENCES_AT_A_TIME


def _batches(items: range, size: int) -> Iterator[range]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _sums(model: LoadedModel, tokens: Tensor, eod: int | None) -> tuple[list[float], list[int]]:
    """Returns the summed loss of each sample, in float64, and how many of its labels count."""
    inputs_BS, (labels_BS, mask_BS) = to_inputs_and_labels(tokens, eod_token=eod)
    places = torch.cartesian_prod(torch.arange(len(inputs_BS)), torch.arange(inputs_BS.shape[1]))
    wanted_W3 = torch.cat([places.reshape(-1, 2), labels_BS.reshape(-1, 1)], dim=1)
    losses_BS = -model.score_tokens(inputs_BS, wanted_W3).log_probs.double().view_as(inputs_BS)
    return (losses_BS * mask_BS).sum(1).tolist(), mask_BS.sum(1).long().tolist()
