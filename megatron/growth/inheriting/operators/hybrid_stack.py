"""Inheriting a block of layers, which is stacked."""

from __future__ import annotations

from megatron.config.sections.inherit import InheritConfig
from megatron.errors import ConfigError
from megatron.growth.inheriting.chosen_layers import chosen_layers
from megatron.growth.inheriting.inherit_operator import INHERIT_OPERATORS, InheritOperator


class HybridStack(InheritOperator):
    """Takes a block of the reference's layers and stacks copies of it: half of the model's layers, twice.

    The hybrid baseline of Sanyal et al. 2024, arXiv:2404.08634: layers 0 to 8 of the reference, once more above
    themselves. A list of layers is a block of another height, of which num_layers is a whole multiple. Preserves the
    hidden states of the first block where it has the first layers; what stands above reads another stream.
    """

    def source_layers(self, before: int, after: int, rules: InheritConfig) -> tuple[int, ...]:
        """Returns the block, over and over."""
        listed = rules.layers if isinstance(rules.layers, list) else None
        if listed is None and after % 2:
            raise ConfigError(
                f"num_layers: {after} is odd, and hybrid_stack puts two halves on top of each other. Use {after + 1}, "
                "or list the layers of a block, `inherit.layers`."
            )
        height = after // 2 if listed is None else len(listed)
        if after % height:
            below = after // height * height
            nearest = f"{below} and {below + height}" if below else f"{height}"
            raise ConfigError(
                f"num_layers: {after} is no whole multiple of the block of {height} layers that inherit.layers lists. "
                f"Nearest valid: {nearest}."
            )
        block = chosen_layers(rules, before, height, f"a block of {height} layers")
        return block * (after // height)


INHERIT_OPERATORS.register("hybrid_stack")(HybridStack())
