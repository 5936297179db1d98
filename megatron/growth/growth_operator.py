"""Growth operators: ways to make the layers of a larger model from those of a trained one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import layer_layouts
from megatron.config.sections.growth import GrowthRecord, GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.model.causal_lm import VocabSize
from megatron.model.new_rows import first_new_row
from megatron.mpu.parameters import ParameterSpec, initial_values, named_generator
from megatron.registry import Registry

if TYPE_CHECKING:
    from megatron.growth.layer_reader import LayerReader

RULES_OF_ONE_OPERATOR = ("ramp_iters", "perturb", "shrink", "insert_at", "reference")
"""Rules that have no effect but with the operators that declare them."""


@dataclass(frozen=True)
class Growth:
    """One growth of a model, as an operator sees it."""

    before: ModelConfig
    after: ModelConfig
    vocab: VocabSize
    record: GrowthRecord
    seed: int
    """Seed of the values that are new."""
    squared_moments: tuple[str, ...] = ()
    """The optimizer's moments that average squares of gradients."""

    @property
    def rules(self) -> GrowthRules:
        """Returns the rules of this growth."""
        return self.record.rules

    @cached_property
    def specs(self) -> dict[str, ParameterSpec]:
        """Returns the parameters of the larger model by global name."""
        layouts = layer_layouts(self.after, self.vocab)
        return {layout.global_name(local): spec for layout in layouts for local, spec in layout.parameters.items()}

    def initial(self, name: str) -> Tensor:
        """Returns the whole float32 values that the larger model's parameter `name` would start training with."""
        return initial_values(self.specs[name], self.seed, name)

    def noise(self, name: str, shape: Sequence[int]) -> Tensor:
        """Returns standard normal float32 noise for the parameter `name`, other than earlier growths have drawn."""
        return torch.randn(*shape, generator=named_generator(self.seed, f"{name} noise {self._sizes}"))

    def initial_of_layer(self, name: str) -> Tensor:
        """Returns whole float32 initial values of the parameter `name` of a new layer.

        Under the name alone they would be those that the layer which has had this place once started with.
        """
        return initial_values(self.specs[name], self.seed, f"{name} {self._sizes}")

    @cached_property
    def reference(self) -> LayerReader:
        """Opens the model that `rules.reference` names. Raises CheckpointError when it is not whole."""
        # They need DeepSpeed, which a configuration is checked without.
        from megatron.checkpointing.store.find_checkpoint import whole_checkpoint
        from megatron.growth.layer_reader import LayerReader

        return LayerReader(whole_checkpoint(Path(str(self.rules.reference))), optimizer=False)

    @property
    def _sizes(self) -> str:
        """Names the larger model by its sizes, which no earlier growth has led to."""
        return " ".join(map(str, self.record.after.model_dump().values()))

    def first_new_row(self, name: str) -> int | None:
        """Returns the first row of the larger model's parameter `name` that is new; None where nothing is."""
        return first_new_row(name, self.record)


class GrowthOperator(ABC):
    """One way to grow. Its docstring says what it preserves, and which new parameters train from which step on."""

    adds: ClassVar[Literal["tokens", "layers"]]
    uses: ClassVar[frozenset[str]] = frozenset()
    """Those of RULES_OF_ONE_OPERATOR that it follows."""

    @abstractmethod
    def is_exact(self, theta: str | None) -> bool:
        """Tells whether the larger model computes what the smaller did.

        `theta` normalizes its scores; None for a model without parameter tokens.
        """

    def reference_refusal(self, growth: Growth) -> str | None:
        """Returns why the model that `rules.reference` names does not fit, beginning with the key; None when it does.

        Raises CheckpointError when it is not whole.
        """
        return None

    @abstractmethod
    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the larger model's layer of the same name, with what the optimizer keeps of it."""

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Returns why it cannot make the one model of the other, beginning with the key; None when it can."""
        return None

    def scale_base(self, base: int, before: int, after: int) -> int:
        """Returns the token count that scales the scores after growth from `before` to `after` tokens."""
        return base

    def source_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns, for each of the larger model's layers, the layer of the smaller that it is made of."""
        return tuple(range(after))

    def new_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns the larger model's layers that are new."""
        return ()


class TokenOperator(GrowthOperator):
    """An operator that adds parameter tokens after those that there are, under the scale of before or its own."""

    adds = "tokens"


class LayerOperator(GrowthOperator):
    """An operator that adds layers."""

    adds = "layers"


ZERO_SCORES_WEIGH_NOTHING = frozenset({"l2_norm_gelu", "gelu_l2_norm"})
"""Normalizations in which a token that scores 0 changes neither the output nor the other tokens' weights."""

GROWTH_OPERATORS: Registry[GrowthOperator] = Registry("growth operator", package="megatron.growth.operators")


def grown_layers(read: Callable[[str], LayerState], growth: Growth) -> Iterator[LayerState]:
    """Yields the larger model's layers in the order of the pipeline.

    `read` returns the smaller model's layer of a name, such as `layers.3`. A layer is in memory at a time.
    """
    operator = GROWTH_OPERATORS[growth.rules.operator]
    before, after = growth.before.num_layers, growth.after.num_layers
    sources = operator.source_layers(before, after, growth.rules)
    for layout in layer_layouts(growth.after, growth.vocab):
        stack, _, number = layout.name.partition(".")
        layer = read(f"{stack}.{sources[int(number)]}" if number else layout.name)
        yield with_moments_by_rule(operator.grow(layer.renamed(layout.name), growth), growth)


def with_moments_by_rule(layer: LayerState, growth: Growth) -> LayerState:
    """Returns a grown layer with its moments as `rules.moments` says.

    Adam's bias correction has one step count for all rows. `reset_new` keeps it: zero moments under a large count make
    first updates of (1 - beta1) / sqrt(1 - beta2) of the learning rate, 0.45 with the usual betas, a warmup of its own.
    `reset_all` sets it to 0, as at the start of a run.
    """
    if growth.rules.moments == "reset_all":
        return layer.replace({name: state.without_moments() for name, state in layer.parameters.items()})
    if growth.rules.moments == "keep":
        return layer
    changed = {}
    for local, state in layer.parameters.items():
        row = growth.first_new_row(f"{layer.name}.{local}")
        if row is not None:
            kept = {name: moment.clone() for name, moment in state.moments.items()}
            for moment in kept.values():
                moment[row:] = 0
            changed[local] = state.with_moments(kept)
    return layer.replace(changed)
