"""Writes a checkpoint of a model with fewer parameter tokens, or of another order, and measures what it computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.token_rows import in_groups, with_tokens_of
from megatron.checkpointing.states.write_states import write_states
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.build_config import require_consistent
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.growth.layer_reader import LayerReader
from megatron.growth.measure_change import in_float32, logits_of_layers, next_token_loss
from megatron.io.lease import leased

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shrinking:
    """A smaller model, or one of the same size and another order, and what makes its layers."""

    source: Checkpoint
    model: ModelConfig
    """The model to write."""
    change: Callable[[LayerState], LayerState]
    """Makes a layer of it from that of the source's model."""

    def layers(self, *, exact: bool = False) -> Iterator[LayerState]:
        """Yields the model's layers in the order of the pipeline, a layer in memory at a time.

        `exact` yields the optimizer's weights in float32 alone, to compute with.
        """
        reader = LayerReader(self.source)
        for name in reader.names:
            layer = reader.read(name)
            yield self.change(in_float32(layer) if exact else layer)

    def loss(self, tokens_BS: Tensor) -> float:
        """Computes the mean cross entropy of the next token on tokens [B, S] in float32 [nat]."""
        return loss_of(self.model, self.source, self.layers(exact=True), tokens_BS)


def loss_of(model: ModelConfig, source: Checkpoint, layers: Iterable[LayerState], tokens_BS: Tensor) -> float:
    """Computes the mean cross entropy of the next token on tokens [B, S] of a model by its layers [nat]."""
    rows = source.vocab.actual if model.mask_padded_vocab else source.vocab.padded
    return next_token_loss(logits_of_layers(model, source.vocab, layers, tokens_BS)[..., :rows], tokens_BS)


def unchanged(source: Checkpoint) -> Shrinking:
    """Returns the model of a checkpoint as it is, to measure it beside others."""
    return Shrinking(source, source.config.model, lambda layer: layer)


def extraction(source: Checkpoint, smaller: ModelConfig, groups: int | None = None) -> Shrinking:
    """Returns what gathers a smaller model's tokens out of a checkpoint: the first ones of each group.

    With `groups` they are written in another number of groups, which keeps the tokens of every share. Raises
    ConfigError where the counts do not split into as many.
    """
    whole, tokens = source.config.model, param_tokens(smaller)
    wanted = groups or tokens.groups
    written = smaller.model_copy(update={"param_tokens": tokens.model_copy(update={"groups": wanted})})
    require_consistent(source.config.model_copy(update={"model": written, "elastic": None}), source.config)
    return Shrinking(source, written, lambda layer: in_groups(with_tokens_of(layer, whole, smaller), smaller, wanted))


def write_smaller(shrinking: Shrinking, config: RunConfig, sizes: ParallelSizes, output: Path, tool: str) -> Path:
    """Writes `output`/global_stepN and `latest`, as a run of the smaller model would have; returns the path.

    Parallel sizes and precision are taken from `config`, everything else from the checkpoint: steps, schedule, data
    position, and the optimizer's state with its rows. The section `elastic` and the rules of a growth are not the
    smaller model's, and end. A layer is in memory at a time.

    Raises ConfigError when the model does not split over the ranks; CheckpointError for damaged files, and when a run
    is writing `output`.
    """
    source = shrinking.source
    model = shrinking.model.model_copy(update={"padded_vocab_size": source.state.padded_vocab_size})
    training = source.config.training.model_copy(update={"precision": config.training.precision})
    written = source.config.model_copy(
        update={"model": model, "parallel": config.parallel, "training": training, "elastic": None, "grow": None}
    )
    require_consistent(written, source.config)
    header = LayerReader(source).header
    header = replace(header, state=replace(header.state, growth=()))
    with leased(output, tool):
        return write_states(_logged(shrinking), written, sizes, output, header)


def _logged(shrinking: Shrinking) -> Iterator[LayerState]:
    for layer in shrinking.layers():
        _, _, number = layer.name.partition(".")
        if number:
            logger.info("writing layer %d of %d", int(number) + 1, shrinking.model.num_layers)
        yield layer
