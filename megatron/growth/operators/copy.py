"""Growth by whole copies of the parameter tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.config.token_share import TOKEN_KEYS
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, TokenOperator


class Copy(TokenOperator):
    """Makes c whole copies of the parameter tokens, each with values divided by c, under a scale base c times as large.

    Preserves the function of every Theta (Net2Net, Chen et al. 2016, arXiv:1511.05641). Scores of copies are equal, so
    the norm grows by sqrt(c), or the sum of exponentials by c; the scale, its square root by c or itself by c, brings
    every weight back to what it was, and the values of c copies add up to the old one.

    All rows have gradients from the first step: a value's is the old value's, a key's is the old key's divided by c,
    because the value behind it is. Moments follow: those of values are kept, those of keys divided by c, squared ones
    by its square. Without more, copies stay equal for ever and add nothing: `perturb` adds noise to the values, which
    sums to zero over the copies of a token and so leaves the function as it is; `moments: reset_new` tells them apart
    as well. Adam steps by the sign of gradients, so that the sum of c values moves c times as far as one did: lower the
    learning rate, or rewarm it.
    """

    uses = frozenset({"perturb"})

    def is_exact(self, theta: str | None) -> bool:
        """Tells that every function of parameter tokens is preserved."""
        return theta is not None

    def scale_base(self, base: int, before: int, after: int) -> int:
        """Returns the base that makes up for the copies in the norm."""
        return base * (after // before)

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Requires whole multiples."""
        for field, key in TOKEN_KEYS.items():
            old, new = getattr(before.param_tokens, field), getattr(after.param_tokens, field)
            if new % old:
                below = new // old * old
                return (
                    f"{key}: {new} is no whole multiple of the checkpoint's {old}, and copy makes whole copies. "
                    f"Nearest valid values: {below} and {below + old}."
                )
        return None

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the layer with its tokens c times, block after block."""
        grown = {}
        for local, state in layer.parameters.items():
            name = f"{layer.name}.{local}"
            copies = growth.specs[name].full_shape[0] // len(state.weight)
            if growth.first_new_row(name) is None:
                continue
            if local.endswith(".key_tokens"):
                grown[local] = _copied_keys(state, copies, growth)
            else:
                grown[local] = _copied_values(state, copies, growth, name)
        return layer.replace(grown)


def _copied_keys(state: ParameterState, copies: int, growth: Growth) -> ParameterState:
    moments = {
        name: moment.repeat(copies, 1) / copies ** (2 if name in growth.squared_moments else 1)
        for name, moment in state.moments.items()
    }
    return state.map(lambda tensor: tensor.repeat(copies, 1)).with_moments(moments)


def _copied_values(state: ParameterState, copies: int, growth: Growth, name: str) -> ParameterState:
    exact = state.weight if state.master is None else state.master
    wide = torch.promote_types(exact.dtype, torch.float32)
    noise = growth.noise(name, (copies, *exact.shape)).to(wide)
    cancelling = (noise - noise.mean(0)).flatten(0, 1) * (growth.rules.perturb * exact.to(wide).std() / copies)

    def copied(tensor: Tensor) -> Tensor:
        return (tensor.repeat(copies, 1) / copies + cancelling).to(tensor.dtype)

    return ParameterState(
        weight=copied(state.weight),
        master=None if state.master is None else copied(state.master),
        moments={moment: tensor.repeat(copies, 1) for moment, tensor in state.moments.items()},
        step=state.step,
    )


GROWTH_OPERATORS.register("copy")(Copy())
