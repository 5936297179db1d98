"""Layers of a model with all that training keeps of them, whole and by name.

A stream of `LayerState` is the seam between what lies on disk and what changes a model. `read_states` yields one from
any checkpoint, whatever layout and precision wrote it; `write_states` makes a checkpoint of any layout from one. What
stands between them (reshaping, growth, pruning, inheritance, export, import) is a function of the stream: it touches
neither files nor layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields

from torch import Tensor


@dataclass(frozen=True)
class ParameterState:
    """One parameter over all tensor-parallel ranks, with what the optimizer keeps of it."""

    weight: Tensor
    """Values that the model computes with, in the format it was trained in."""
    master: Tensor | None = None
    """float32 values that the optimizer changes, of which the weight is a rounding; None without an optimizer."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 running averages by the optimizer's own names (megatron/config/optimizers/); empty before its first
    step."""
    step: float | None = None
    """Steps that the optimizer's bias correction has counted [steps]; None before the first, and where it counts
    none."""

    def map(self, change: Callable[[Tensor], Tensor]) -> ParameterState:
        """Applies one change to weight, master and moments alike; the step count stays."""
        return ParameterState(
            weight=change(self.weight),
            master=None if self.master is None else change(self.master),
            moments={name: change(moment) for name, moment in self.moments.items()},
            step=self.step,
        )

    def with_moments(self, moments: Mapping[str, Tensor]) -> ParameterState:
        """Returns the parameter with other moments."""
        return replace_fields(self, moments=moments)

    def without_moments(self) -> ParameterState:
        """Returns the parameter as the optimizer has it before its first step."""
        zeros = {name: moment.new_zeros(moment.shape) for name, moment in self.moments.items()}
        return replace_fields(self, moments=zeros, step=None if self.step is None else 0.0)


@dataclass(frozen=True)
class LayerState:
    """The parameters of one pipeline layer: the embedding, a transformer layer, the final norm or the head."""

    name: str
    """Start of the parameters' global names, such as `layers.3`; operators that move layers change it."""
    parameters: Mapping[str, ParameterState]
    """By the name within the layer, such as `mlp.key_tokens`."""

    def __getitem__(self, name: str) -> ParameterState:
        return self.parameters[name]

    def replace(self, changed: Mapping[str, ParameterState]) -> LayerState:
        """Returns the layer with the parameters in `changed` in place of its own of the same names."""
        return replace_fields(self, parameters={**self.parameters, **changed})

    def renamed(self, name: str) -> LayerState:
        """Returns the layer at another place in the model."""
        return replace_fields(self, name=name)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> LayerState:
        """Applies `change(global name, tensor)` to every tensor of every parameter."""
        return replace_fields(
            self,
            parameters={
                local: parameter.map(lambda tensor, name=f"{self.name}.{local}": change(name, tensor))  # type: ignore[misc]
                for local, parameter in self.parameters.items()
            },
        )

    def by_global_name(self) -> Iterator[tuple[str, ParameterState]]:
        """Yields each parameter with its name in the whole model, such as `layers.3.mlp.key_tokens`."""
        for local, parameter in self.parameters.items():
            yield f"{self.name}.{local}", parameter

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights by global name."""
        return {name: parameter.weight for name, parameter in self.by_global_name()}
