"""Makes a checkpoint of a model that inherits: reads a reference's layers, applies an operator, and writes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.build_config import require_consistent
from megatron.config.sections.inherit import InheritConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import ConfigError
from megatron.growth.engine_restart import restarted_engine
from megatron.growth.inheriting.inherit_operator import Inheritance, inherited_layers
from megatron.growth.inheriting.require_inheritance import require_inheritance
from megatron.growth.layer_reader import LayerReader
from megatron.io.lease import leased
from megatron.model.causal_lm import VocabSize


@dataclass(frozen=True)
class Reference:
    """A trained model that another inherits from, from whatever it is read."""

    name: str
    """Its path, for messages."""
    model: ModelConfig
    vocab: VocabSize
    read: Callable[[str], LayerState]
    """Returns its layer of a name, such as `layers.3`."""
    header: RunHeader
    """Its run; that of a new one for weights of another program."""
    optimizer: str | None = None
    """Type of the optimizer that the header's state is of; None for weights alone."""

    @staticmethod
    def of(source: Checkpoint, *, optimizer: bool = True) -> Reference:
        """Returns the model of a checkpoint, with the optimizer's state unless `optimizer` is false.

        Raises CheckpointError as `read_states` does.
        """
        reader, config = LayerReader(source, optimizer=optimizer), source.config
        kind = None if reader.header.engine is None else config.training.optimizer.type
        return Reference(str(source.path), config.model, source.vocab, reader.read, reader.header, kind)


def plan_inheritance(reference: Reference, config: RunConfig, rules: InheritConfig) -> Inheritance:
    """Returns what the operator has to do for the model of `config`. Raises ConfigError when it cannot."""
    rows = config.model.padded_vocab_size
    if rows not in (None, reference.vocab.padded):
        raise ConfigError(
            f"padded_vocab_size: {rows}: {reference.name} has an embedding of {reference.vocab.padded} rows, and "
            "embeddings are inherited whole. Use the reference's tokenizer and its padded_vocab_size."
        )
    after = config.model.model_copy(update={"padded_vocab_size": reference.vocab.padded})
    require_inheritance(reference.model, after, rules)
    return Inheritance(reference.model, after, reference.vocab, rules, config.training.seed)


def inherit_checkpoint(
    reference: Reference,
    config: RunConfig,
    rules: InheritConfig,
    sizes: ParallelSizes,
    output: Path,
    *,
    has_lease: bool = False,
) -> Path:
    """Writes `output`/global_stepN and `latest`: the model of `config`, made of the reference's; returns the path.

    It is the beginning of a new run of `config`. Where the reference brings the optimizer's state, that is written as
    `rules` say, so that the run goes on from it; otherwise weights alone. A layer is in memory at a time. `has_lease`
    says that this process holds the lease of `output` already.

    Raises ConfigError when the operator cannot make the model, or it does not split over the ranks; CheckpointError for
    damaged files, and when a run is writing `output`.
    """
    inheritance = plan_inheritance(reference, config, rules)
    _require_state(reference, config, rules)
    checkpoint = config.checkpoint.model_copy(update={"load": reference.name})
    inheriting = config.model_copy(update={"model": inheritance.after, "inherit": rules, "checkpoint": checkpoint})
    require_consistent(inheriting, config)
    layers = inherited_layers(reference.read, inheritance)
    with nullcontext() if has_lease else leased(output, "inherit.py"):
        return write_states(layers, inheriting, sizes, output, _header(reference.header, config, rules))


def require_tokenizer_of(reference: Reference, config: RunConfig) -> None:
    """Raises ConfigError when the configured tokenizer is not the reference's, DataError when it cannot be read."""
    ids = build_tokenizer(config.data.tokenizer).vocab_size
    if ids != reference.vocab.actual:
        raise ConfigError(
            f"tokenizer_type, vocab_file: the configured tokenizer has {ids:,} ids, and {reference.name} was trained "
            f"with {reference.vocab.actual:,}. Embeddings are inherited whole: use the reference's tokenizer."
        )


def _require_state(reference: Reference, config: RunConfig, rules: InheritConfig) -> None:
    """Requires the optimizer's state that is to be kept, and that it is of the configured optimizer."""
    ours = config.training.optimizer.type
    if reference.optimizer not in (None, ours):
        raise ConfigError(
            f"optimizer.type: {ours}: {reference.name} has the state of {reference.optimizer}. Use that, or start with "
            "the weights alone: `load` and `finetune: true`."
        )
    kept = {"moments": "reset_all", "schedule": "restart", "data": "restart"}
    for name, fresh in kept.items():
        if reference.optimizer is None and getattr(rules, name) != fresh:
            raise ConfigError(
                f"inherit.{name}: {getattr(rules, name)}: {reference.name} holds weights alone, and nothing of a run "
                f"to go on with. Use {fresh}."
            )


def _header(header: RunHeader, config: RunConfig, rules: InheritConfig) -> RunHeader:
    """Returns the header of the new run, which has the reference's past only as far as the rules say."""
    state = replace(header.state, growth=(), training_flops=0.0, consumed_valid_samples=0, non_finite_steps=0)
    if rules.data == "restart":
        state = replace(
            state, consumed_train_samples=0, train_index_samples=0, valid_index_samples=0, data_fingerprint={}
        )
    if rules.schedule == "restart":
        state = replace(state, iteration=0, schedule_steps=0)
    engine = None
    if header.engine is not None:
        engine = restarted_engine(
            header.engine,
            config.training,
            schedule=rules.schedule == "restart",
            moments=rules.moments == "reset_all",
            steps=rules.schedule == "restart",
        )
    return replace(header, state=state, run_id=secrets.token_hex(8), engine=engine)
