"""Grows a checkpoint: reads its layers, applies an operator, and writes the larger model."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.read_states import StateReader, read_states
from megatron.checkpointing.states.same_model import model_differences
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.errors import ConfigError
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth
from megatron.io.lease import leased


def grow_checkpoint(source: Checkpoint, config: RunConfig, operator: str, sizes: ParallelSizes, output: Path) -> Path:
    """Writes `output`/global_stepN and `latest`: the model of `config`, grown from `source`; returns the path.

    Steps, schedule, data position and the optimizer's state of old rows go on as they were. New values are drawn from
    the configured seed. A layer is in memory at a time. Raises ConfigError when the models differ in more than their
    parameter tokens, or the operator cannot do what it promises; CheckpointError for damaged files, and when a run is
    writing `output`.
    """
    before, after = source.config.model, config.model
    comparable = after.model_copy(update={"param_tokens": before.param_tokens})
    differences = model_differences(before, comparable)
    if differences:
        raise ConfigError(
            f"{source.path} cannot grow into the configured model, which differs in more than parameter tokens: "
            f"{'; '.join(differences)}."
        )
    growth = Growth.between(before, after, source.vocab, config.training.seed)
    chosen = GROWTH_OPERATORS[operator]
    chosen.require(growth)
    states = (chosen.grow(layer, growth) for layer in read_states(source))
    grown = source.config.model_copy(
        update={
            "model": after.model_copy(update={"padded_vocab_size": source.state.padded_vocab_size}),
            "parallel": config.parallel,
            "training": source.config.training.model_copy(update={"precision": config.training.precision}),
        }
    )
    with leased(output, "grow.py"):
        return write_states(states, grown, sizes, output, RunHeader.of(StateReader(source)))
