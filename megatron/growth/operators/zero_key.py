"""Growth by parameter tokens whose keys are zero."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.errors import ConfigError
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, require_more_tokens


class ZeroKey:
    """Appends parameter tokens with zero keys and freshly drawn values; moments of the new rows are zero.

    Preserves the function of both GeLU forms of Theta while the scale stays pinned to the old token count: a zero key
    scores 0, GeLU(0) = 0, and zero scores add nothing to a norm. New keys have a gradient from the first step, new
    values from the second. Softmax has no such operator: zero scores add exp(0) to its denominator.
    """

    def require(self, growth: Growth) -> None:
        """Raises ConfigError for softmax, fewer tokens, or a scale that is not pinned to what it was."""
        require_more_tokens(growth)
        before, after = growth.before.param_tokens, growth.after.param_tokens
        if before is None or after is None:
            return
        if before.theta == "softmax":
            raise ConfigError(
                "norm_activation_type: softmax: zero keys take a share of the probabilities, so zero_key would change "
                "the function. Grow a model of another normalization."
            )
        for key in ("qkv_scale_base", "proj_scale_base", "ffn_scale_base"):
            old, new = getattr(before, key), getattr(after, key)
            if new != old:
                raise ConfigError(
                    f"{key}: {new}: the scores would be scaled by another token count than the checkpoint's {old}, "
                    f"which changes the function. Set `{key}: {old}`."
                )

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer with as many parameter tokens as the larger model has."""
        keys = {
            name: _with_zeros(state, growth, f"{layer.name}.{name}") for name, state in _tokens(layer, "key_tokens")
        }
        values = {
            name: _with_initial_values(state, growth, f"{layer.name}.{name}")
            for name, state in _tokens(layer, "value_tokens")
        }
        return layer.replace(keys | values)


def _tokens(layer: LayerState, kind: str) -> list[tuple[str, ParameterState]]:
    return [(name, state) for name, state in layer.parameters.items() if name.endswith(f".{kind}")]


def _with_zeros(state: ParameterState, growth: Growth, name: str) -> ParameterState:
    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(growth.added_rows(name, len(tensor)), *tensor.shape[1:])])

    return state.map(longer)


def _with_initial_values(state: ParameterState, growth: Growth, name: str) -> ParameterState:
    added = growth.initial(name)[len(state.weight) :]
    grown = _with_zeros(state, growth, name)
    weight = torch.cat([state.weight, added.to(state.weight.dtype)])
    master = None if state.master is None else torch.cat([state.master, added])
    return ParameterState(weight, master, grown.moments, state.step)


GROWTH_OPERATORS.register("zero_key")(ZeroKey())
