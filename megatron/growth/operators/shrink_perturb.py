"""Growth of a model that is drawn back towards its initial state."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.growth.added_tokens import with_new_rows
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, TokenOperator


class ShrinkPerturb(TokenOperator):
    """Multiplies every matrix by `shrink`, adds noise to it, and appends freshly drawn parameter tokens.

    Ash and Adams 2020, arXiv:1910.08475, for a model that grows: the noise is Gaussian, of `perturb` times the standard
    deviation of the matrix after it was shrunk; embeddings are matrices, scales and biases of norms stay. Preserves no
    function. The scale stays pinned, and all new keys and values have gradients from the first step. Moments of old
    rows are those of before.
    """

    uses = frozenset({"shrink", "perturb"})

    def is_exact(self, theta: str | None) -> bool:
        """Tells that no function is preserved."""
        return False

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Requires something to do."""
        if rules.shrink == 1.0 and not rules.perturb:
            return (
                "grow.shrink: 1.0: with grow.perturb 0.0 shrink_perturb is no other than random. Set one of them, such "
                "as shrink to 0.8 and perturb to 0.1."
            )
        return None

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer with as many parameter tokens as the larger model has."""
        changed = {
            local: _changed(state, growth, f"{layer.name}.{local}")
            for local, state in layer.parameters.items()
            if growth.specs[f"{layer.name}.{local}"].decays
        }
        return with_new_rows(layer.replace(changed), growth, keys="initial", values="initial")


def _changed(state: ParameterState, growth: Growth, name: str) -> ParameterState:
    rules = growth.rules
    exact = state.weight if state.master is None else state.master
    wide = torch.promote_types(exact.dtype, torch.float32)
    noise = growth.noise(name, exact.shape).to(wide) * (rules.perturb * rules.shrink * exact.to(wide).std())

    def changed(tensor: Tensor) -> Tensor:
        return (tensor * rules.shrink + noise).to(tensor.dtype)

    master = None if state.master is None else changed(state.master)
    return ParameterState(changed(state.weight), master, state.moments, state.step)


GROWTH_OPERATORS.register("shrink_perturb")(ShrinkPerturb())
