"""Correspondence of our models and Hugging Face models: names of parameters, fields of configurations, as data.

An architecture is one module in `architectures/`. A model that its map cannot express is refused, with the field that
prevents it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from megatron.checkpointing.states.name_map import NameMap
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.registry import Registry


@dataclass(frozen=True)
class FieldMap:
    """Fields of configurations that carry over as they are, and the values that their model has without saying so."""

    same: Mapping[str, str]
    """Our dotted field of ModelConfig to theirs."""

    fixed: Mapping[str, Any]
    """Our fields that their model cannot vary, and the value that each has there."""

    def to_theirs(self, model: ModelConfig, what: str) -> dict[str, Any]:
        """Returns their settings. Raises ConfigError, naming `what`, for a model that theirs cannot be."""
        for path, value in self.fixed.items():
            ours = read_field(model, path)
            if ours != value:
                raise ConfigError(
                    f"{path}: {what} always has {value!r}, and this model has {ours!r}. It has no export."
                )
        return {theirs: read_field(model, ours) for ours, theirs in self.same.items()}

    def to_ours(self, config: PretrainedConfig) -> dict[str, Any]:
        """Returns our settings, by dotted field."""
        return {ours: getattr(config, theirs) for ours, theirs in self.same.items()} | dict(self.fixed)


def read_field(model: ModelConfig, path: str) -> Any:
    """Returns the value at a dotted path of the section."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


def default_rope(config: PretrainedConfig) -> tuple[float, float]:
    """Returns the rotated share of a head, and the base. Raises ConfigError for scaled positions, unknown here."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ConfigError(f"rope_parameters: rope_type {rope['rope_type']!r}; only 'default' is known here.")
    return rope.get("partial_rotary_factor", 1.0), rope["rope_theta"]


TensorChange = Callable[[ModelConfig, Mapping[str, Tensor]], dict[str, Tensor]]
"""(model, tensors of a layer by our global name) -> the same layer's, by our global name."""


def unchanged(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as they are."""
    return dict(tensors)


@dataclass(frozen=True)
class HFArchitecture:
    """Counterpart of one of our architectures in transformers."""

    model_class: type[PreTrainedModel]
    names: NameMap
    to_config: Callable[[ModelConfig, int], PretrainedConfig]
    """Returns their configuration of (model, rows of the vocabulary), without dtype and token ids. Raises ConfigError
    for a model that they cannot express."""
    to_settings: Callable[[PretrainedConfig], dict[str, Any]]
    """Returns the fields of ModelConfig that their configuration decides, by dotted path. Raises ConfigError for a
    model that we cannot express."""
    title: str
    """Name and source of the architecture, for the card of a model."""
    to_their_tensors: TensorChange = unchanged
    """Makes theirs of our tensors where they differ in more than their names: turned, in another order, or zeros for
    what our model does not have. Changes meta tensors too, from which names and shapes of a folder follow."""
    to_our_tensors: TensorChange = unchanged
    """Undoes `to_their_tensors`. Raises CheckpointError for numbers that our model has no place for."""


HF_ARCHITECTURES: Registry[HFArchitecture] = Registry(
    "architecture with a Hugging Face counterpart", package="megatron.hf.architectures"
)
"""By our name of the architecture, which is their model_type as well."""
