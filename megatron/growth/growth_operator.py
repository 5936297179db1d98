"""Growth operators: ways to make the layers of a larger model from those of a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import layer_layouts
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.model.causal_lm import VocabSize
from megatron.mpu.parameters import ParameterSpec, initial_values
from megatron.registry import Registry


@dataclass(frozen=True)
class Growth:
    """One growth of a model, as an operator sees it."""

    before: ModelConfig
    after: ModelConfig
    specs: Mapping[str, ParameterSpec]
    """Parameters of the larger model by global name."""
    seed: int
    """Seed of the values that are new."""

    @staticmethod
    def between(before: ModelConfig, after: ModelConfig, vocab: VocabSize, seed: int) -> Growth:
        """Describes the growth from one model to another of the same vocabulary."""
        layouts = layer_layouts(after, vocab)
        specs = {layout.global_name(local): spec for layout in layouts for local, spec in layout.parameters.items()}
        return Growth(before, after, specs, seed)

    def initial(self, name: str) -> Tensor:
        """Returns the whole float32 values that the larger model's parameter `name` would start training with."""
        return initial_values(self.specs[name], self.seed, name)

    def added_rows(self, name: str, rows: int) -> int:
        """Returns how many rows the larger model's parameter `name` has beyond `rows`."""
        return self.specs[name].full_shape[0] - rows


class GrowthOperator(Protocol):
    """One way to grow. Its docstring says what it preserves, and which new parameters train from which step on."""

    def require(self, growth: Growth) -> None:
        """Raises ConfigError, naming the YAML key, when the operator cannot keep its promise for this growth."""

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns the larger model's layer of the same name."""


GROWTH_OPERATORS: Registry[GrowthOperator] = Registry("growth operator", package="megatron.growth.operators")


def require_more_tokens(growth: Growth) -> None:
    """Raises ConfigError unless both models are TokenFormers, and no count of parameter tokens shrinks."""
    before, after = growth.before.param_tokens, growth.after.param_tokens
    if before is None or after is None:
        raise ConfigError("architecture: only a TokenFormer has parameter tokens to add. Grow another checkpoint.")
    for key, old, new in (
        ("qkv_slot_num", before.qkv, after.qkv),
        ("proj_slot_num", before.proj, after.proj),
        ("ffn_slot_num", before.ffn, after.ffn),
    ):
        if new < old:
            raise ConfigError(
                f"{key}: {new} is fewer than the checkpoint's {old}. Growing adds tokens: use {old} or more."
            )
