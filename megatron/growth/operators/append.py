"""Growth by the next layers of a deeper model."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.same_model import model_differences
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, LayerOperator


class Append(LayerOperator):
    """Adds the layers of a reference that stand above as many as there are: 12 layers get its layers 12, 13 and so on.

    A round of Inheritune's loop (Sanyal et al. 2024, arXiv:2404.08634, algorithm 1). Layers that were trained stay as
    they are, moments included; those of a new layer are zero. Preserves no function: the new layers read the stream of
    a model that has trained on without them, and the final norm reads theirs. All weights have gradients from the first
    step. The reference stays in a folder of its own and is read when the model grows.
    """

    uses = frozenset({"reference"})

    def is_exact(self, theta: str | None) -> bool:
        """Tells that no function is preserved."""
        return False

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Requires a reference."""
        if rules.reference is None:
            return "grow.reference: append adds layers of a deeper model. Name the folder of its checkpoint."
        return None

    def reference_refusal(self, growth: Growth) -> str | None:
        """Requires the reference to be a deeper one of the same model."""
        checkpoint = growth.reference.checkpoint
        theirs, needed = checkpoint.config.model, growth.after.num_layers
        differences = model_differences(theirs, growth.after.model_copy(update={"num_layers": theirs.num_layers}))
        if differences:
            return (
                f"grow.reference: {checkpoint.path} is another model than the run's: {'; '.join(differences)}. Name "
                "that which the run has inherited from."
            )
        if theirs.num_layers < needed:
            return (
                f"num_layers: {needed} layers are asked for, and {checkpoint.path} has {theirs.num_layers}. Use "
                f"{theirs.num_layers} or fewer."
            )
        return None

    def source_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns the layer itself, and for a new layer the last one."""
        return tuple(min(layer, before - 1) for layer in range(after))

    def new_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns the layers above those that there are."""
        return tuple(range(before, after))

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns an old layer as it is, and the reference's in place of the one that is given for a new one."""
        if growth.first_new_row(f"{layer.name}.{next(iter(layer.parameters))}") is None:
            return layer
        theirs = growth.reference.read(layer.name).parameters
        return layer.replace(
            {local: _with_values(state, theirs[local].weight) for local, state in layer.parameters.items()}
        )


def _with_values(state: ParameterState, values: Tensor) -> ParameterState:
    return ParameterState(
        weight=values.to(state.weight.dtype),
        master=None if state.master is None else values.to(torch.float32),
        moments={name: torch.zeros_like(moment) for name, moment in state.moments.items()},
        step=state.step,
    )


GROWTH_OPERATORS.register("append")(Append())
