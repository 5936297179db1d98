"""Measures the attention of a model over fixed sequences: a checkpoint of ours, or a causal model of Hugging Face.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.analysis.attention_statistics import STATISTICS, HeadStatistics, head_statistics
from megatron.analysis.capture_attention import captured_attention
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.speedups import SpeedupsConfig
from megatron.config.sections.training import PrecisionConfig
from megatron.errors import CheckpointError, DataError
from megatron.loaded_model.loaded_model import load_model
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import local_device

PROBABILITIES_AT_A_TIME = 2**25
"""Probabilities in memory at a time: of one layer, or of all layers of a model of Hugging Face."""

Advance = Callable[[int], None]
"""Told how many sequences of how many layers are done, as a number of both."""


class _Sums:
    """Sums the statistics of each layer and head over sequences, of a model that errors call `name`."""

    def __init__(self, name: str, tau: float, advance: Advance) -> None:
        self.name, self.tau, self.advance = name, tau, advance
        self.totals: dict[int, dict[str, Tensor]] = {}

    def add(self, layer: int, probabilities_BHSS: Tensor) -> None:
        if not torch.isfinite(probabilities_BHSS).all():
            raise CheckpointError(
                f"{self.name}: the attention probabilities of layer {layer + 1} are not finite: its weights are "
                "damaged or too large. Choose another checkpoint."
            )
        found = {name: value.sum(0) for name, value in head_statistics(probabilities_BHSS, self.tau).items()}
        so_far = self.totals.get(layer)
        self.totals[layer] = found if so_far is None else {name: so_far[name] + found[name] for name in found}
        self.advance(len(probabilities_BHSS))

    def means(self, sequences: int) -> HeadStatistics:
        layers = [self.totals[layer] for layer in sorted(self.totals)]
        counts = {len(of_layer["rank"]) for of_layer in layers}
        if len(counts) > 1:
            heads = " and ".join(map(str, sorted(counts)))
            raise CheckpointError(f"{self.name}: its layers have {heads} heads, and only equal numbers are known here.")
        return {
            each.name: torch.stack([of_layer[each.name] for of_layer in layers]).cpu() / sequences
            for each in STATISTICS
        }


@torch.no_grad()
def measure_checkpoint(checkpoint: Checkpoint, tokens_BS: Tensor, tau: float, advance: Advance) -> HeadStatistics:
    """Measures a checkpoint of any layout on token ids [B, S], in float32 and without dropout.

    One layer's probabilities are in memory at a time. Raises DataError for tokens that the model does not know, or
    more of them than it has positions; CheckpointError for weights that are damaged, not finite, or too large.
    """
    config = checkpoint.config
    config = config.model_copy(
        update={
            "grow": None,
            "speedups": SpeedupsConfig(),
            "training": config.training.model_copy(update={"precision": PrecisionConfig()}),
        }
    )
    require_tokens(tokens_BS, str(checkpoint.path), checkpoint.state.vocab_size, config.model.max_position_embeddings)
    model = load_model(config, checkpoint, ParallelContext.single(), local_device())
    sums = _Sums(str(checkpoint.path), tau, advance)
    with captured_attention(model.module, sums.add):
        step = sequences_at_a_time(config.model.num_attention_heads, tokens_BS.shape[1])
        for part_BS in torch.split(tokens_BS, step):
            model.module.hidden_states(part_BS.to(model.device))
    return sums.means(len(tokens_BS))


@torch.no_grad()
def measure_huggingface(model: Any, name: str, tokens_BS: Tensor, tau: float, advance: Advance) -> HeadStatistics:
    """Measures a causal model of transformers, loaded by `load_huggingface`, on token ids [B, S].

    Its library gives the probabilities of all layers at once, so that fewer sequences are read at a time. Raises
    DataError for tokens that the model does not know, or more of them than it has positions; CheckpointError for a
    model without attention probabilities, or with some that are not finite.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or tokens_BS.shape[1]
    require_tokens(tokens_BS, name, config.vocab_size, longest)
    sums = _Sums(name, tau, advance)
    step = sequences_at_a_time(config.num_hidden_layers * config.num_attention_heads, tokens_BS.shape[1])
    for part_BS in torch.split(tokens_BS, step):
        attentions = model(part_BS.to(model.device), output_attentions=True, use_cache=False).attentions
        if not attentions or any(layer is None for layer in attentions):
            raise CheckpointError(
                f"{name}: the model gives no attention probabilities, so there is nothing to measure."
            )
        for layer, probabilities_BHSS in enumerate(attentions):
            sums.add(layer, probabilities_BHSS)
    return sums.means(len(tokens_BS))


def sequences_at_a_time(heads: int, length: int) -> int:
    """Returns how many sequences of `length` tokens keep the probabilities of `heads` heads within memory."""
    return max(PROBABILITIES_AT_A_TIME // (heads * length**2), 1)


def require_tokens(tokens_BS: Tensor, name: str, vocab_size: int, longest: int) -> None:
    """Raises DataError for sequences that are longer than a model's positions, or hold ids beyond its vocabulary."""
    if tokens_BS.shape[1] > longest:
        raise DataError(f"{name} knows {longest} positions, and the sequences have {tokens_BS.shape[1]} tokens. Use "
                        "--length with fewer.")  # fmt: skip
    if int(tokens_BS.max()) >= vocab_size:
        raise DataError(
            f"{name} has a vocabulary of {vocab_size:,} tokens, and the text holds the id {int(tokens_BS.max()):,}. "
            "Give text, or a dataset of the model's own tokenizer."
        )
