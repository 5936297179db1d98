"""Checks the sections `grow` and `inherit` of a configuration against their operators, before any rank starts."""

from __future__ import annotations

from megatron.config.build_config import require_consistent
from megatron.config.load_config import LoadedConfig
from megatron.config.model_size import count_parameters
from megatron.config.sections.growth import ModelSizes
from megatron.errors import ConfigError


def require_growable(loaded: LoadedConfig) -> list[str]:
    """Returns what a run is to grow to, in a line for its user, if it grows while it trains.

    Raises ConfigError, naming the line of the YAML, when the model cannot grow as configured. The larger model is held
    to every check that the small one has passed. A growth at the start of a run needs its checkpoint and is checked
    with it, and so is what a run inherits, apart from rules without effect.
    """
    run = loaded.run
    grow, inherit = run.grow, run.inherit
    inherits = []
    if inherit is not None:
        from megatron.growth.inheriting.require_inheritance import require_rules_with_effect

        try:
            require_rules_with_effect(inherit)
        except ConfigError as error:
            raise ConfigError(f"{loaded.origins['inherit.operator']} {error}") from error
        inherits = [f"inherits by {inherit.operator}, from {run.checkpoint.load}: {run.model.num_layers} layers"]
    if grow is None or not grow.happens_in_training:
        return inherits
    # An operator needs torch, which a configuration without growth is checked without.
    from megatron.growth.target_model import grown_model

    try:
        larger = grown_model(run.model, grow.rules, **grow.sizes)
        require_consistent(run.model_copy(update={"model": larger}), run)
    except ConfigError as error:
        raise ConfigError(f"{loaded.origins['grow.operator']} grow: the larger model: {error}") from error
    when = f"step {grow.at_step:,}" if grow.at_step is not None else f"{grow.at_tokens:,} tokens"
    rows = run.model.padded_vocab_size
    size = "" if rows is None else f"; {count_parameters(larger, rows):,} parameters"
    grows = f"grows by {grow.operator} after {when}: {ModelSizes.of(run.model).change_to(ModelSizes.of(larger))}{size}"
    return [*inherits, grows]
