"""The part of a checkpoint's parameter tokens that a loaded model reads, as the section `reading` says."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.token_rows import with_tokens_of
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.reading import ReadingConfig
from megatron.config.token_share import model_of_share
from megatron.errors import ConfigError
from megatron.kernels.pattention.top_k import TopKPattention, ValueReads
from megatron.model.pattention import Pattention


def model_that_is_read(model: ModelConfig, reading: ReadingConfig | None) -> ModelConfig:
    """Returns the model that is read of a checkpoint's: the one of `param_token_share`, or itself.

    Raises ConfigError for a share that is no whole number of tokens, or of a model without parameter tokens.
    """
    if reading is None or reading.share == 1.0:
        return model
    try:
        return model_of_share(model, reading.share)
    except ConfigError as error:
        raise ConfigError(f"param_token_{error}") from error


def layers_that_are_read(model: ModelConfig, read: ModelConfig) -> Callable[[LayerState], LayerState] | None:
    """Returns what makes layers of the model that is read from the checkpoint's; None where they are the same."""
    return None if read is model else lambda layer: with_tokens_of(layer, model, read)


def choose_tokens(module: nn.Module, reading: ReadingConfig | None) -> ValueReads | None:
    """Lets every position read its strongest tokens alone, as `param_token_top_k` says; returns what counts them.

    None where all are read. Raises ConfigError where there are no tokens, or no whole blocks of them on a rank.
    """
    if reading is None or reading.top_k is None:
        return None
    reads = ValueReads()
    layers = [layer for layer in module.modules() if isinstance(layer, Pattention)]
    if not layers:
        raise ConfigError("param_token_top_k: the model has no parameter tokens to choose from.")
    for layer in layers:
        if len(layer.key_tokens) % reading.block:
            raise ConfigError(
                f"param_token_block: {reading.block}: a rank holds {len(layer.key_tokens)} tokens of a Pattention, "
                "which is no whole number of such blocks. Choose a divisor."
            )
        layer.kernel = TopKPattention(reading.top_k, reading.block, reads)
    return reads
