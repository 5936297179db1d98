"""Growth by parameter tokens whose keys are zero."""

from __future__ import annotations

from megatron.checkpointing.states.layer_state import LayerState
from megatron.growth.added_tokens import with_new_rows
from megatron.growth.growth_operator import GROWTH_OPERATORS, ZERO_SCORES_WEIGH_NOTHING, Growth, TokenOperator


class ZeroKey(TokenOperator):
    """Appends parameter tokens with zero keys and freshly drawn values; moments of the new rows are zero.

    Preserves the function of both GeLU forms of Theta while the scale stays pinned to the old token count: a zero key
    scores 0, GeLU(0) = 0, and zero scores add nothing to a norm. New keys have a gradient from the first step, new
    values from the second. Softmax has no such operator: zero scores add exp(0) to its denominator.
    """

    def is_exact(self, theta: str | None) -> bool:
        """Tells whether a zero score weighs nothing."""
        return theta in ZERO_SCORES_WEIGH_NOTHING

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer with as many parameter tokens as the larger model has."""
        return with_new_rows(layer, growth, keys="zero", values="initial")


GROWTH_OPERATORS.register("zero_key")(ZeroKey())
