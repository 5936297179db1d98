"""Decides whether the model of a checkpoint is to grow before a run starts from it, and how."""

from __future__ import annotations

from dataclasses import replace

from megatron.checkpointing.states.same_model import described_model, model_differences
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.growth import GrowthRules, ModelSizes
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.growth.grow_checkpoint import plan_growth, tokens_read
from megatron.growth.growth_operator import Growth
from megatron.growth.target_model import grown_model

PUBLISHED = {"operator": "published", "moments": "reset_all", "schedule": "restart", "data": "restart"}
"""The rules by which `pretrain_partial_init` grows."""


def due_growth(config: RunConfig, checkpoint: Checkpoint, *, continues: bool) -> Growth | None:
    """Returns the growth that comes before the next step of a run from `checkpoint`; None when there is none.

    `continues` tells whether the run goes on from it, rather than start with its weights. Raises CheckpointError when
    it holds another model than the configuration describes, and nothing asks for growth; ConfigError when it cannot
    grow into that.
    """
    described = described_model(config, checkpoint) if continues else config.model
    theirs = checkpoint.config.model
    differences = model_differences(theirs, described)
    if not differences:
        has_grown = described is not config.model
        return None if has_grown or not continues else _growth_of_this_step(config, checkpoint)
    rules = _rules_at_start(config, continues=continues)
    if rules is None:
        raise CheckpointError(
            f"{checkpoint.path} holds another model than the configuration describes: {'; '.join(differences)}. "
            f"Make the configuration agree with the checkpoint, or load another one{_hint(theirs, described)}."
        )
    growth = plan_growth(checkpoint, config, rules)
    if continues:
        return growth
    return replace(growth, record=growth.record.model_copy(update={"iteration": 0, "tokens": 0}))


def _growth_of_this_step(config: RunConfig, checkpoint: Checkpoint) -> Growth | None:
    grow, state = config.grow, checkpoint.state
    if grow is None or not grow.is_due(state.iteration, tokens_read(state, config.model.seq_length)):
        return None
    last = state.growth[-1] if state.growth else None
    if last is not None and grow.is_due(last.iteration, last.tokens):
        raise CheckpointError(
            f"{checkpoint.path} has grown after step {last.iteration} already, and `grow` would make it grow once "
            "more. Describe the model as it was before that growth, as the run's own configuration does, or "
            "remove `grow`."
        )
    larger = grown_model(config.model, grow.rules, **grow.sizes)
    return plan_growth(checkpoint, config.model_copy(update={"model": larger}), grow.rules)


def _rules_at_start(config: RunConfig, *, continues: bool) -> GrowthRules | None:
    """Returns the rules by which a smaller checkpoint grows when the run starts; None when it is not to grow."""
    if config.checkpoint.pretrain_partial_init is not None and not continues:
        return GrowthRules.model_validate(PUBLISHED)
    return None if config.grow is None or config.grow.happens_in_training else config.grow.rules


def _hint(theirs: ModelConfig, ours: ModelConfig) -> str:
    old, new = ModelSizes.of(theirs).model_dump(), ModelSizes.of(ours).model_dump()
    counted = all((old[name] is None) == (new[name] is None) for name in old)
    if not counted or any(old[name] is not None and new[name] < old[name] for name in old) or old == new:
        return ""
    return "; it is smaller, and `grow.operator` says how to grow it, if that is what you want"
