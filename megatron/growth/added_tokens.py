"""Rows for parameter tokens that are added to a layer, with zero moments."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.growth.growth_operator import Growth

Values = Literal["zero", "initial"]
"""New rows: zero, or as the larger model would start training with them."""


def with_new_rows(layer: LayerState, growth: Growth, *, keys: Values, values: Values) -> LayerState:
    """Returns the layer with as many parameter tokens as the larger model has; moments of the new rows are zero."""
    kinds = {"key_tokens": keys, "value_tokens": values}
    grown = {}
    for local, state in layer.parameters.items():
        kind = kinds.get(local.rpartition(".")[-1])
        if kind is not None:
            grown[local] = _longer(state, growth, f"{layer.name}.{local}", kind)
    return layer.replace(grown)


def _longer(state: ParameterState, growth: Growth, name: str, values: Values) -> ParameterState:
    rows = len(state.weight)
    shape = (growth.specs[name].full_shape[0] - rows, *state.weight.shape[1:])

    def with_zeros(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(shape)])

    if values == "zero":
        return state.map(with_zeros)
    added = growth.initial(name)[rows:]
    return ParameterState(
        weight=torch.cat([state.weight, added.to(state.weight.dtype)]),
        master=None if state.master is None else torch.cat([state.master, added.to(state.master.dtype)]),
        moments={moment: with_zeros(tensor) for moment, tensor in state.moments.items()},
        step=state.step,
    )
