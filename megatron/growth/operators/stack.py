"""Growth by copies of the stack of layers."""

from __future__ import annotations

from megatron.checkpointing.states.layer_state import LayerState
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, LayerOperator


class Stack(LayerOperator):
    """Puts g copies of the whole stack of layers on top of each other, with the moments of each.

    G_stack (Du et al. 2024, arXiv:2405.15319), for every architecture. Preserves no function: upper copies read what
    the lower ones have made of the residual stream. All weights have gradients from the first step. Copies differ in
    their place, so they do not stay equal. Under scale_attn_by_inverse_layer_idx a copy divides its attention scores by
    its own place, which is more than the layer below does.
    """

    def is_exact(self, theta: str | None) -> bool:
        """Tells that no function is preserved."""
        return False

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Requires a whole multiple."""
        old, new = before.num_layers, after.num_layers
        if new % old == 0:
            return None
        below = new // old * old
        return (
            f"num_layers: {new} is no whole multiple of the checkpoint's {old}, and stack copies the whole stack. "
            f"Nearest valid values: {below} and {below + old}; or use insert."
        )

    def source_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns the stack, over and over."""
        return tuple(layer % before for layer in range(after))

    def new_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns the layers above the first stack."""
        return tuple(range(before, after))

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer as it is."""
        return layer


GROWTH_OPERATORS.register("stack")(Stack())
