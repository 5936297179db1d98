"""Growth by parameter tokens whose scores open over time."""

from __future__ import annotations

from megatron.checkpointing.states.layer_state import LayerState
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.growth.added_tokens import with_new_rows
from megatron.growth.growth_operator import GROWTH_OPERATORS, ZERO_SCORES_WEIGH_NOTHING, Growth, TokenOperator


class MaskRamp(TokenOperator):
    """Appends freshly drawn parameter tokens, whose scores are multiplied before Theta by a number that opens.

    The number goes from 0 to 1 in `ramp_iters` steps; it follows from the growth's record and the step, so that nothing
    else is saved (GrowthRecord.score_multiplier). Preserves the function of both GeLU forms at the start, while the
    scale stays pinned: a multiplied score is 0, and GeLU(0) = 0. New keys and values have gradients from the second
    step on, which grow with the number. What knows no ramp gets keys multiplied by the number of the moment, which is
    the same function for every Theta: exports, generation, evaluation, and a growth on top of an unfinished one.
    """

    uses = frozenset({"ramp_iters"})

    def is_exact(self, theta: str | None) -> bool:
        """Tells whether a zero score weighs nothing."""
        return theta in ZERO_SCORES_WEIGH_NOTHING

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Requires the length of the ramp."""
        if rules.ramp_iters is None:
            return "grow.ramp_iters: mask_ramp opens the scores of new tokens in so many steps. Set it, such as to 500."
        return None

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer with as many parameter tokens as the larger model has."""
        return with_new_rows(layer, growth, keys="initial", values="initial")


GROWTH_OPERATORS.register("mask_ramp")(MaskRamp())
