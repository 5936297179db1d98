"""Inheriting layers as they are."""

from __future__ import annotations

from megatron.config.sections.inherit import InheritConfig
from megatron.growth.inheriting.chosen_layers import chosen_layers
from megatron.growth.inheriting.inherit_operator import INHERIT_OPERATORS, InheritOperator


class Inherit(InheritOperator):
    """Takes layers of the reference as they are, in the order in which they are named.

    Sanyal et al. 2024, arXiv:2404.08634, algorithm 1, where they are the first ones. Preserves the hidden states below:
    after its first k layers the model computes what the reference does after them. Later layers, or some parts of them
    alone, read another residual stream than they did, and preserve nothing.
    """

    def source_layers(self, before: int, after: int, rules: InheritConfig) -> tuple[int, ...]:
        """Returns the chosen layers."""
        return chosen_layers(rules, before, after, f"a model of {after} layers")


INHERIT_OPERATORS.register("inherit")(Inherit())
