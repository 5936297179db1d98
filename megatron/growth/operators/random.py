"""Growth by parameter tokens as a new model has them."""

from __future__ import annotations

from megatron.checkpointing.states.layer_state import LayerState
from megatron.growth.added_tokens import with_new_rows
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, TokenOperator


class Random(TokenOperator):
    """Appends freshly drawn parameter tokens, keys and values, under the scale of before; their moments are zero.

    Preserves what the model knows, not its function: new scores enter each norm, and new values each output. The
    control of the operators that do better or claim to. All new keys and values have gradients from the first step.
    """

    def is_exact(self, theta: str | None) -> bool:
        """Tells that no function is preserved."""
        return False

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer with as many parameter tokens as the larger model has."""
        return with_new_rows(layer, growth, keys="initial", values="initial")


GROWTH_OPERATORS.register("random")(Random())
