"""Holds every import of another program's weights to the same rules: a vocabulary that fits, and finite numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpointing.states.parameter_layout import fit_vocabulary
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import CheckpointError, ConfigError
from megatron.model.causal_lm import VocabSize
from megatron.mpu.parameters import ParameterSpec

VOCABULARY = ("embedding.word_embeddings.weight", "head.weight")
"""Parameters with a row per token, by global name."""


def imported_vocabulary(rows: int, run: RunConfig, where: str) -> VocabSize:
    """Returns the vocabulary of the configured run, for weights of `where` that have `rows` rows.

    Padding rows may be left out or added only where the configuration keeps them out of the softmax. Raises ConfigError
    when they may not, or tokens would be lost; DataError without the configured tokenizer.
    """
    tokenizer = build_tokenizer(run.data.tokenizer)
    vocab = VocabSize(tokenizer.vocab_size, padded_vocab_size(run.model, tokenizer.vocab_size))
    if rows < vocab.actual:
        raise ConfigError(
            f"{where} has a vocabulary of {rows} rows, and the configured tokenizer {vocab.actual} ids. Configure the "
            "tokenizer that it was trained with (`vocab_file`, `tokenizer_type`)."
        )
    if rows != vocab.padded and not run.model.mask_padded_vocab:
        raise ConfigError(
            f"padded_vocab_size: {where} has a vocabulary of {rows} rows, the configured model {vocab.padded}, and "
            f"padding rows take part in the softmax. Set `padded_vocab_size: {rows}` to keep them as they are, or "
            "`mask_padded_vocab: true`, with which they do not count and may be left out or added."
        )
    return vocab


def with_configured_rows(name: str, tensor: Tensor, spec: ParameterSpec, vocab: VocabSize) -> Tensor:
    """Returns the parameter `name` with the rows of the configured vocabulary; other parameters as they are.

    Raises CheckpointError when a vocabulary's shape differs in more than its padding.
    """
    if name not in VOCABULARY:
        return tensor
    try:
        return fit_vocabulary(tensor, spec, vocab.actual)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def require_finite(tensor: Tensor, what: str) -> None:
    """Raises CheckpointError, naming `what`, when a tensor holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{what} holds NaN or infinity.")
