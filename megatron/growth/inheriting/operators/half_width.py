"""Inheriting half of the width of all layers, or of some."""

from __future__ import annotations

from megatron.config.sections.inherit import InheritConfig
from megatron.growth.inheriting.chosen_layers import chosen_layers
from megatron.growth.inheriting.inherit_operator import INHERIT_OPERATORS, InheritOperator


class HalfWidth(InheritOperator):
    """Takes half of the features, of the heads and of the units of layers, as `rows` says: first, last or even.

    The half-width baseline of Sanyal et al. 2024, arXiv:2404.08634: the first half of heads and units, at full depth.
    With the kept features S and the kept heads and units U, a matrix W that reads the residual stream becomes W[U, S],
    one that writes to it W[S, U]; a kept head keeps all of its features, so that rotations and the scale of attention
    stay. A unit u then computes sum over S of W[u, s] n_S(x)[s], where n_S normalizes the kept features alone. That is
    the reference's value where two things hold: the reference's weights are 0 from left-out features to kept units and
    from left-out units to kept features, and the left-out features have the mean and the variance of the kept ones.
    Nothing else of the function is preserved.

    Parameter tokens may be kept or halved. Scores are scaled by sqrt(n) / ||s|| with the pinned n, and half of the
    tokens have ||s|| / sqrt(2) of the norm if their scores are alike: n is halved with them, and pinned otherwise.
    """

    uses = frozenset({"layers", "sublayers", "rows"})
    halves_width = True

    def source_layers(self, before: int, after: int, rules: InheritConfig) -> tuple[int, ...]:
        """Returns the chosen layers; all of them where the model is as deep as the reference."""
        return chosen_layers(rules, before, after, f"a model of {after} layers")


INHERIT_OPERATORS.register("half_width")(HalfWidth())
