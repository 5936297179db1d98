"""Grows a checkpoint: reads its layers, applies an operator, and writes the larger model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron.checkpointing.states.fold_ramp import fold_ramp
from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.read_states import StateReader
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.run_state import RunState
from megatron.config.build_config import require_consistent
from megatron.config.optimizer import facts_of
from megatron.config.sections.growth import GrowthRecord, GrowthRules, ModelSizes
from megatron.config.sections.run_config import RunConfig
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, grown_layers, require_growth


def grow_checkpoint(
    source: Checkpoint, config: RunConfig, rules: GrowthRules, sizes: ParallelSizes, output: Path
) -> Path:
    """Writes `output`/global_stepN and `latest`: the model of `config`, grown from `source`; returns the path.

    Model, parallel sizes, precision and the seed of what is new are taken from `config`, everything else from the
    checkpoint: steps go on as they were, schedule, data position and the optimizer's state as `rules` say, and the
    growth is noted in the run's state. A layer is in memory at a time. Raises ConfigError when the models differ in
    more than their sizes, the operator cannot do what it promises, or the larger model does not split over the ranks;
    CheckpointError for damaged files.
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
    return write_states(grown_layers(reader.read, growth), grown, sizes, output, _header(source, reader, growth.record))


def plan_growth(source: Checkpoint, config: RunConfig, rules: GrowthRules) -> Growth:
    """Returns what the operator has to do. Raises ConfigError when it cannot."""
    before, after = source.config.model, config.model
    operator = GROWTH_OPERATORS[rules.operator]
    rules = operator.rules(rules)
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
    return Growth(before, after, source.vocab, record, config.training.seed, squared_moments)


class LayerReader:
    """Reads a checkpoint's layers by name, each as a model without an unfinished ramp has it."""

    def __init__(self, source: Checkpoint) -> None:
        self._reader = StateReader(source)
        self._layouts = {layout.name: layout for layout in self._reader.layouts}
        self._squared_moments = facts_of(source.config.training.optimizer).squared_moments
        self.header = RunHeader.of(self._reader)

    def read(self, name: str) -> LayerState:
        """Returns the layer of a name, such as `layers.3`. Raises CheckpointError as `read_states` does."""
        return fold_ramp(self._reader.read(self._layouts[name]), self.header.state, self._squared_moments)


def tokens_read(state: RunState, seq_length: int) -> int:
    """Counts the training tokens that a run has read, also before a growth that restarted the data [tokens]."""
    restarts = [record.tokens for record in state.growth if record.rules.data == "restart"]
    return (restarts[-1] if restarts else 0) + state.consumed_train_samples * seq_length


def _header(source: Checkpoint, reader: LayerReader, record: GrowthRecord) -> RunHeader:
    header, rules = reader.header, record.rules
    state = replace(header.state, growth=(*source.state.growth, record))
    if rules.data == "restart":
        state = replace(state, consumed_train_samples=0)
    if rules.schedule == "continue":
        return replace(header, state=state)
    engine = header.engine
    if engine is not None:
        schedule = {**engine.counters["lr_scheduler"], "num_steps": 0}
        engine = replace(engine, counters={**engine.counters, "lr_scheduler": schedule})
    return replace(header, state=replace(state, schedule_steps=0), engine=engine)
