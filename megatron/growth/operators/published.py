"""Growth as the release of TokenFormer does it."""

from __future__ import annotations

from megatron.checkpointing.states.layer_state import LayerState
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.growth.added_tokens import with_new_rows
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, TokenOperator


class Published(TokenOperator):
    """Appends freshly drawn parameter tokens and scales the scores by the new count, as the release does.

    Its custom_load_fn_incremental fills the first rows of every parameter token tensor from the smaller checkpoint and
    leaves the other rows as initialized; the scale follows the count, and optimizer and schedule start anew. Preserves
    no function, not even with zero keys: the release's scale alone changes it. All new keys and values have gradients
    from the first step.
    """

    def is_exact(self, theta: str | None) -> bool:
        """Tells that no function is preserved."""
        return False

    def scale_base(self, base: int, before: int, after: int) -> int:
        """Returns the count itself."""
        return after

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Requires what the release does with optimizer and schedule."""
        needed = (("moments", "reset_all"), ("schedule", "restart"))
        wrong = [f"grow.{rule}: {getattr(rules, rule)}" for rule, value in needed if getattr(rules, rule) != value]
        if not wrong:
            return None
        return (
            f"{', '.join(wrong)}: published starts optimizer and schedule anew, as the release does. Set moments to "
            "reset_all and schedule to restart, or use random, which leaves the choice."
        )

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer with as many parameter tokens as the larger model has."""
        return with_new_rows(layer, growth, keys="initial", values="initial")


GROWTH_OPERATORS.register("published")(Published())
