"""Tokens for comparing two models: a few sequences of a dataset or of a text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron.config.sections.run_config import RunConfig
from megatron.data.first_tokens import first_tokens_of_dataset, tokens_of_text
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import ConfigError, DataError
from megatron.model.causal_lm import VocabSize

SEQUENCES, LONGEST = 4, 256


def measured_tokens(
    data: Path | None, text: Path | None, config: RunConfig, vocab: VocabSize, sequences: int = SEQUENCES
) -> Tensor:
    """Returns token ids [B, S] from the beginning of a text, of a dataset, or of the configured one.

    They are at most `sequences` of LONGEST tokens. Raises ConfigError when no dataset is configured, DataError when
    there is none, or it holds too little or another vocabulary.
    """
    length = min(config.model.seq_length, LONGEST)
    if text is not None:
        source, tokens = text, tokens_of_text(text, build_tokenizer(config.data.tokenizer))
    else:
        source = data or _configured(config)
        tokens = first_tokens_of_dataset(source, config.data.impl, sequences * length)
    length = min(length, len(tokens))
    if length < 2:
        raise DataError(f"{source} holds {len(tokens)} tokens; two are the least to compute a loss from.")
    whole = torch.tensor(tokens[: min(len(tokens) // length, sequences) * length]).reshape(-1, length)
    if whole.min() < 0 or whole.max() >= vocab.padded:
        raise DataError(
            f"{source} holds the token id {int(whole.max())}, but the model's vocabulary ends at {vocab.padded - 1}. "
            "Name a dataset of the checkpoint's tokenizer."
        )
    return whole


def _configured(config: RunConfig) -> Path:
    paths = [config.data.data_path] if config.data.data_path else config.data.train_data_paths
    if not paths:
        raise ConfigError(
            "data_path: the change of the function is measured on real tokens, and no dataset is configured. Give "
            "--data_path PREFIX or --text FILE."
        )
    return Path(paths[0])
