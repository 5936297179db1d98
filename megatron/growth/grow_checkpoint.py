"""Grows a checkpoint: reads its layers, applies an operator, and writes the larger model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.run_state import RunState
from megatron.config.build_config import require_consistent
from megatron.config.optimizer import facts_of
from megatron.config.sections.growth import GrowthRecord, GrowthRules, ModelSizes
from megatron.config.sections.run_config import RunConfig
from megatron.errors import ConfigError
from megatron.growth.engine_restart import restarted_engine
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, grown_layers
from megatron.growth.layer_reader import LayerReader
from megatron.growth.require_growth import require_growth
from megatron.io.lease import leased

logger = logging.getLogger(__name__)


def grow_checkpoint(
    source: Checkpoint,
    config: RunConfig,
    rules: GrowthRules,
    sizes: ParallelSizes,
    output: Path,
    *,
    has_lease: bool = False,
) -> Path:
    """Writes `output`/global_stepN and `latest`: the model of `config`, grown from `source`; returns the path.

    Model, parallel sizes, precision and the seed of what is new are taken from `config`, everything else from the
    checkpoint: steps go on as they were, schedule, data position and the optimizer's state as `rules` say, and the
    growth is noted in the run's state. A layer is in memory at a time. `has_lease` says that this process holds the
    lease of `output` already.

    Raises ConfigError when the models differ in more than their sizes, the operator cannot do what it promises, or the
    larger model does not split over the ranks; CheckpointError for damaged files, and when a run is writing `output`.
    """
    growth = plan_growth(source, config, rules)
    grown = source.config.model_copy(
        update={
            "model": growth.after.model_copy(update={"padded_vocab_size": source.state.padded_vocab_size}),
            "parallel": config.parallel,
            "training": source.config.training.model_copy(update={"precision": config.training.precision}),
        }
    )
    require_consistent(grown, source.config)
    reader = LayerReader(source)
    header = _header(source, reader, growth.record)
    with nullcontext() if has_lease else leased(output, "grow.py"):
        return write_states(_logged(grown_layers(reader.read, growth), growth), grown, sizes, output, header)


def plan_growth(source: Checkpoint, config: RunConfig, rules: GrowthRules) -> Growth:
    """Returns what the operator has to do. Raises ConfigError when it cannot."""
    before, after = source.config.model, config.model
    operator = GROWTH_OPERATORS[rules.operator]
    require_growth(before, after, rules)
    record = GrowthRecord(
        iteration=source.state.iteration,
        tokens=tokens_read(source.state, before.seq_length),
        before=ModelSizes.of(before),
        after=ModelSizes.of(after),
        new_layers=operator.new_layers(before.num_layers, after.num_layers, rules),
        rules=rules,
    )
    squared_moments = facts_of(source.config.training.optimizer).squared_moments
    growth = Growth(before, after, source.vocab, record, config.training.seed, squared_moments)
    refusal = operator.reference_refusal(growth)
    if refusal is not None:
        raise ConfigError(refusal)
    return growth


def tokens_read(state: RunState, seq_length: int) -> int:
    """Counts the training tokens that a run has read, also before a growth that restarted the data [tokens]."""
    restarts = [record.tokens for record in state.growth if record.rules.data == "restart"]
    return (restarts[-1] if restarts else 0) + state.consumed_train_samples * seq_length


def _logged(layers: Iterator[LayerState], growth: Growth) -> Iterator[LayerState]:
    for layer in layers:
        _, _, number = layer.name.partition(".")
        if number:
            logger.info("growing layer %d of %d", int(number) + 1, growth.after.num_layers)
        yield layer


def _header(source: Checkpoint, reader: LayerReader, record: GrowthRecord) -> RunHeader:
    header, rules = reader.header, record.rules
    state = replace(header.state, growth=(*source.state.growth, record))
    if rules.data == "restart":
        state = replace(state, consumed_train_samples=0)
    if rules.schedule == "restart":
        state = replace(state, schedule_steps=0)
    engine = header.engine
    if engine is not None:
        schedule, moments = rules.schedule == "restart", rules.moments == "reset_all"
        engine = restarted_engine(engine, source.config.training, schedule=schedule, moments=moments)
    return replace(header, state=state, engine=engine)
