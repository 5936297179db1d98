"""Inheriting no layer: the control of what inheriting layers gives."""

from __future__ import annotations

from megatron.config.sections.inherit import InheritConfig, Sublayer
from megatron.growth.inheriting.inherit_operator import INHERIT_OPERATORS, InheritOperator


class Random(InheritOperator):
    """Draws every layer as a new run does, and takes embeddings, final norm and head from the reference.

    Preserves no function. The control of the other operators: what it lacks, the layers have given. A model without
    anything inherited is a run without `inherit`.
    """

    uses = frozenset()

    def source_layers(self, before: int, after: int, rules: InheritConfig) -> tuple[int, ...]:
        """Returns a layer of the same shapes for each."""
        return tuple(layer % before for layer in range(after))

    def takes(self, part: Sublayer, rules: InheritConfig) -> bool:
        """Tells that nothing of a layer is inherited."""
        return False


INHERIT_OPERATORS.register("random")(Random())
