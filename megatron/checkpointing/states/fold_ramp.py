"""Folds the multiplier of a growth that still opens into the keys that it multiplies."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.store.run_state import RunState
from megatron.model.new_rows import first_new_row


def fold_ramp(layer: LayerState, state: RunState, squared_moments: Collection[str] = ()) -> LayerState:
    """Returns the layer with new keys multiplied as the scores of their tokens are at the step of `state`.

    The model then computes the same without a multiplier: m (x k) = x (m k), before any normalization. A gradient of
    the folded key is 1/m of the key's, and averages of gradients and of their squares change accordingly; where m is 0
    they are 0. A layer without an unfinished ramp comes back as it is.
    """
    if not state.growth:
        return layer
    record = state.growth[-1]
    multiplier = record.score_multiplier(state.iteration)
    if multiplier == 1.0:
        return layer
    folded = {}
    for local, parameter in layer.parameters.items():
        row = first_new_row(f"{layer.name}.{local}", record)
        if row is not None and local.endswith(".key_tokens"):
            folded[local] = _folded(parameter, row, multiplier, squared_moments)
    return layer.replace(folded)


def _folded(parameter: ParameterState, row: int, multiplier: float, squared_moments: Collection[str]) -> ParameterState:
    def times(tensor: Tensor, factor: float) -> Tensor:
        changed = tensor.clone()
        changed[row:] *= factor
        return changed

    inverse = 1 / multiplier if multiplier else 0.0
    return ParameterState(
        weight=times(parameter.weight, multiplier),
        master=None if parameter.master is None else times(parameter.master, multiplier),
        moments={
            name: times(moment, inverse**2 if name in squared_moments else inverse)
            for name, moment in parameter.moments.items()
        },
        step=parameter.step,
    )
