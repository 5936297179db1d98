"""Inherit operators: ways to make the layers of a model from those of a trained one, its reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import LayerLayout, layer_layouts
from megatron.config.architecture import ARCHITECTURES, FEATURES, Axis
from megatron.config.sections.inherit import InheritConfig, Sublayer
from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.model.causal_lm import VocabSize
from megatron.mpu.parameters import initial_values
from megatron.registry import Registry

RULES_OF_ONE_OPERATOR = ("rows", "sublayers", "layers")
"""Rules that have no effect but with the operators that declare them."""
MODULES: dict[str, Sublayer] = {
    "attention": "attention",
    "mlp": "feed_forward",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
}
"""Modules of a transformer layer (megatron/model/layer.py), and the part that a configuration calls each by."""


class InheritOperator(ABC):
    """One way to inherit. Its docstring says what it takes, and what it preserves of the reference's function."""

    uses: ClassVar[frozenset[str]] = frozenset({"layers", "sublayers"})
    """Those of RULES_OF_ONE_OPERATOR that it follows."""
    halves_width: ClassVar[bool] = False
    """Whether the model that it makes is narrower than the reference."""

    @abstractmethod
    def source_layers(self, before: int, after: int, rules: InheritConfig) -> tuple[int, ...]:
        """Returns, for each of the model's `after` layers, the reference's layer that it is made of.

        Raises ConfigError, beginning with the key, when it cannot make so many of the `before` that there are.
        """

    def takes(self, part: Sublayer, rules: InheritConfig) -> bool:
        """Tells whether a part of a transformer layer is inherited."""
        return part in rules.sublayers


INHERIT_OPERATORS: Registry[InheritOperator] = Registry(
    "inherit operator", package="megatron.growth.inheriting.operators"
)


@dataclass(frozen=True)
class Inheritance:
    """One model that is made of another, as it was required to fit (require_inheritance.py)."""

    before: ModelConfig
    """The reference's."""
    after: ModelConfig
    vocab: VocabSize
    rules: InheritConfig
    seed: int
    """Seed of what is not inherited."""

    @property
    def operator(self) -> InheritOperator:
        """Returns the operator that the rules name."""
        return INHERIT_OPERATORS[self.rules.operator]

    @cached_property
    def source_layers(self) -> tuple[int, ...]:
        """Returns, for each of the model's layers, the reference's layer that it is made of."""
        return self.operator.source_layers(self.before.num_layers, self.after.num_layers, self.rules)

    @cached_property
    def layouts(self) -> list[LayerLayout]:
        """Returns the layers of the new model in the order of the pipeline."""
        return layer_layouts(self.after, self.vocab)

    @cached_property
    def reference_layouts(self) -> dict[str, LayerLayout]:
        """Returns the reference's layers by name."""
        return {layout.name: layout for layout in layer_layouts(self.before, self.vocab)}

    def __str__(self) -> str:
        """Names the layers in a few words."""
        return f"layers {', '.join(map(str, self.source_layers))} of {self.before.num_layers}"

    def source(self, layer: str) -> str:
        """Returns the name of the reference's layer that a layer is made of."""
        stack, _, number = layer.partition(".")
        return f"{stack}.{self.source_layers[int(number)]}" if number else layer

    def is_inherited(self, layer: str, local: str) -> bool:
        """Tells whether a parameter comes from the reference; embeddings, final norm and head always do.

        Raises CheckpointError for a parameter of a module that is no part of a layer that we know.
        """
        if not layer.startswith("layers."):
            return True
        module = local.partition(".")[0]
        if module not in MODULES:
            raise CheckpointError(f"{layer}.{local} belongs to none of {', '.join(MODULES)}: it cannot be inherited.")
        return self.operator.takes(MODULES[module], self.rules)

    def is_copy(self, layer: str) -> bool:
        """Tells whether a layer of the reference is in the model a second time with this layer."""
        _, _, number = layer.partition(".")
        return bool(number) and self.source_layers.index(self.source_layers[int(number)]) < int(number)

    def axes(self, layer: str, local: str) -> tuple[Axis, ...]:
        """Returns the dimensions of a parameter; in norms and outside of the layers, the last one has the features."""
        if layer.startswith("layers.") and MODULES[local.partition(".")[0]] != "norms":
            return ARCHITECTURES[self.after.architecture].axes[local]
        spec = self.reference_layouts[self.source(layer)].parameters[local]
        return (*[Axis("rows")] * (len(spec.full_shape) - 1), FEATURES)

    def cuts(self, layer: str, local: str) -> list[Cut | None]:
        """Returns what is chosen of each dimension of a parameter; None where all of it is.

        Raises ConfigError where that would cut heads.
        """
        if not self.operator.halves_width:
            return []
        shapes = [
            layouts[name].parameters[local].full_shape
            for layouts, name in (
                (self.reference_layouts, self.source(layer)),
                ({layout.name: layout for layout in self.layouts}, layer),
            )
        ]
        found: list[Cut | None] = []
        for axis, size, kept in zip(self.axes(layer, local), *shapes, strict=True):
            there, left = (size, kept) if axis.groups is None else (axis.groups(self.before), axis.groups(self.after))
            if size * left != kept * there:
                raise ConfigError(
                    f"inherit.operator: half_width keeps {axis.what} whole, and {layer}.{local} has {size} rows or "
                    f"columns for {there} in the reference, and {kept} for {left} in the new model. Halve their number."
                )
            found.append(None if size == kept else Cut(axis.what, there, left, size // there, self.rules.rows))
        return found


@dataclass(frozen=True)
class Cut:
    """A choice among the groups of one dimension."""

    what: str
    there: int
    """Groups of the reference."""
    kept: int
    """Groups of the narrower model."""
    group_size: int
    """Neighbors in a group."""
    rows: str
    """The rule `rows`."""

    def __str__(self) -> str:
        """Names the choice, such as `first 2 of 4 heads`."""
        return f"{self.rows} {self.kept} of {self.there} {self.what}"

    @property
    def index(self) -> Tensor:
        """Returns the places that are kept, in their order."""
        step = self.there // self.kept
        first = {"first": 0, "last": self.there - self.kept, "even": 0}[self.rows]
        groups = torch.arange(self.kept) * (step if self.rows == "even" else 1) + first
        return (groups[:, None] * self.group_size + torch.arange(self.group_size)).flatten()


def inherited_layers(read: Callable[[str], LayerState], inheritance: Inheritance) -> Iterator[LayerState]:
    """Yields the new model's layers in the order of the pipeline.

    `read` returns the reference's layer of a name, such as `layers.3`. A layer is in memory at a time. Raises
    CheckpointError when a tensor of such a layer has no place in the new one, or another shape.
    """
    for layout in inheritance.layouts:
        source = read(inheritance.source(layout.name)).renamed(layout.name)
        _require_no_leftovers(source, layout, inheritance)
        made = {
            local: _inherited(state, inheritance.cuts(layout.name, local))
            if inheritance.is_inherited(layout.name, local)
            else _drawn(state, initial_values(layout.parameters[local], inheritance.seed, layout.global_name(local)))
            for local, state in source.parameters.items()
        }
        for local, state in made.items():
            if tuple(state.weight.shape) != layout.parameters[local].full_shape:
                raise CheckpointError(
                    f"{layout.global_name(local)}: the reference's has shape {tuple(state.weight.shape)}, and the new "
                    f"model's {layout.parameters[local].full_shape}. Configure the reference's sizes."
                )
        yield _with_moments_by_rule(LayerState(layout.name, made), inheritance)


def _require_no_leftovers(source: LayerState, layout: LayerLayout, inheritance: Inheritance) -> None:
    missing = layout.parameters.keys() - source.parameters.keys()
    left_over = source.parameters.keys() - layout.parameters.keys()
    if missing or left_over:
        raise CheckpointError(
            f"{layout.name} cannot be made of the reference's {inheritance.source(layout.name)}: missing there "
            f"{', '.join(sorted(missing)) or 'none'}; left over {', '.join(sorted(left_over)) or 'none'}."
        )


def _inherited(state: ParameterState, cuts: list[Cut | None]) -> ParameterState:
    for dim, cut in enumerate(cuts):
        if cut is not None:
            state = state.map(lambda tensor, dim=dim, index=cut.index: tensor.index_select(dim, index))  # type: ignore[misc]
    return state


def _drawn(state: ParameterState, initial: Tensor) -> ParameterState:
    return ParameterState(
        weight=initial.to(state.weight.dtype),
        master=None if state.master is None else initial.to(state.master.dtype),
        moments={name: moment.new_zeros(initial.shape) for name, moment in state.moments.items()},
        step=state.step,
    )


def _with_moments_by_rule(layer: LayerState, inheritance: Inheritance) -> LayerState:
    """Returns a layer with its moments as the rules say; what was drawn has zero moments in any case."""
    rule = inheritance.rules.moments
    if rule == "reset_all":
        return layer.replace({name: state.without_moments() for name, state in layer.parameters.items()})
    if rule == "keep" or not inheritance.is_copy(layer.name):
        return layer
    zeros = {
        name: state.with_moments({key: moment.new_zeros(moment.shape) for key, moment in state.moments.items()})
        for name, state in layer.parameters.items()
    }
    return layer.replace(zeros)
