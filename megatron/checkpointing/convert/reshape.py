"""Rewrites a checkpoint for another layout and precision, in one process without an engine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, fit_vocabulary, layer_layouts
from megatron.checkpointing.states.read_states import StateReader
from megatron.checkpointing.states.same_model import described_model, model_differences, require_same_vocabulary
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import padded_vocab_size
from megatron.errors import CheckpointError
from megatron.io.lease import leased
from megatron.model.causal_lm import VocabSize

logger = logging.getLogger(__name__)


def reshape(source: Checkpoint, config: RunConfig, data_size: int, output: Path) -> Path:
    """Writes what `source` holds as a run of `config` on `data_size` data-parallel ranks would have; returns the path.

    That is `output`/global_stepN, and `latest`. Only parallel sizes, precision and padding of the vocabulary are taken
    from `config`. A layer is in memory at a time. Raises CheckpointError when the model is another, a file is missing,
    damaged or unsafe, or a run is writing `output`.
    """
    config = config.model_copy(update={"model": described_model(config, source)})
    differences = model_differences(source.config.model, config.model)
    if differences:
        raise CheckpointError(f"{source.path} holds another model than the configuration: {'; '.join(differences)}.")
    if source.holds_weights_alone:
        raise CheckpointError(f"{source.path} holds weights alone, which every layout loads as they are.")
    vocab = VocabSize(source.state.vocab_size, padded_vocab_size(config.model, source.state.vocab_size))
    require_same_vocabulary(source, vocab, padding_is_masked=config.model.mask_padded_vocab)
    reader = StateReader(source)
    header = RunHeader.of(reader)
    parallel = config.parallel
    sizes = ParallelSizes(parallel.model_parallel_size, parallel.pipe_parallel_size, data_size)
    states = with_vocabulary(_logged(reader), config.model, vocab)
    with leased(output, "reshape.py"):
        return write_states(states, _with_layout(source.config, config), sizes, output, header)


def with_vocabulary(states: Iterable[LayerState], model: ModelConfig, vocab: VocabSize) -> Iterator[LayerState]:
    """Yields the layers with the vocabulary rows of `vocab`: tokens' rows as they are, padding cut off or zero.

    Raises CheckpointError when a shape differs from the model's in anything else.
    """
    specs = {
        layout.global_name(local): spec
        for layout in layer_layouts(model, vocab)
        for local, spec in layout.parameters.items()
    }
    for layer in states:
        yield layer.map(lambda name, tensor: fit_vocabulary(tensor, specs[name], vocab.actual))


def _logged(reader: StateReader) -> Iterator[LayerState]:
    for number, layout in enumerate(reader.layouts, start=1):
        logger.info("writing layer %d of %d", number, len(reader.layouts))
        yield reader.read(layout)


def _with_layout(theirs: RunConfig, config: RunConfig) -> RunConfig:
    """Returns the configuration of the run that wrote the source, in the layout that it has now."""
    return theirs.model_copy(
        update={
            "parallel": config.parallel,
            "training": theirs.training.model_copy(update={"precision": config.training.precision}),
            "model": theirs.model.model_copy(update={"padded_vocab_size": config.model.padded_vocab_size}),
        }
    )
