"""Architectures without their tensors: the sizes from which parameters and FLOPs follow, and the keys that they read.

An architecture is one module in `architectures/` that registers its facts; its layer is built in `megatron/model`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron.config.sections.model import ModelConfig
from megatron.config.yaml.problems import YamlValue
from megatron.registry import Registry


@dataclass(frozen=True)
class FixedValue:
    """A value of the model that an architecture cannot vary."""

    value: YamlValue
    reason: str
    """Why any other value is refused, and what to use."""


@dataclass(frozen=True)
class ArchitectureFacts:
    """Facts of one architecture. Fields of the model are named by their path in `ModelConfig`.

    An architecture reads every field of the model but those in `fixed` and those that are another's own, and no
    optional section but its own.
    """

    layer_matrices: Callable[[ModelConfig], int]
    """Weights of one transformer layer that every token is multiplied with: the FLOPs follow from these."""

    layer_biases: Callable[[ModelConfig], int]
    """Further parameters of one transformer layer, norms apart."""

    attention_types: tuple[str, ...]
    """Names that NeoX's `attention_config` has for its layers."""

    output_weights: tuple[str, ...] = ()
    """Parameters of a layer, by name within it, that are zero where the layer adds nothing to the residual stream."""

    split_sizes: tuple[str, ...] = ()
    """Sizes that the tensor-parallel ranks share evenly."""

    activations: tuple[str, ...] = ("gelu", "gelu_tanh")
    """Activations that its MLP can have."""

    defaults: Mapping[str, YamlValue] = field(default_factory=dict)
    """Defaults that differ from those of the section, where the YAML names the architecture."""

    derived: Mapping[str, Callable[[Mapping[str, YamlValue]], YamlValue]] = field(default_factory=dict)
    """Defaults that follow from other keys, also where the YAML names no architecture: from all that were given, flat.
    None where those do not tell."""

    fixed: Mapping[str, FixedValue] = field(default_factory=dict)
    """Fields that have one value only."""

    own_fields: tuple[str, ...] = ()
    """Fields that no other architecture reads; elsewhere they have their default."""

    is_implied_by: Callable[[Mapping[str, YamlValue]], bool] = lambda keys: False
    """Tells whether NeoX's keys, in a YAML that names no architecture, describe this one. All defaults are NeoX's
    then."""

    prompts_begin_with_bos: bool = False
    """Whether prompts begin with the begin-of-sequence token of a tokenizer that has one, as its counterpart in
    transformers reads them."""

    sections: Mapping[str, str] = field(default_factory=dict)
    """Optional sections of the model that it requires, and what they describe; other architectures refuse them."""


ARCHITECTURES: Registry[ArchitectureFacts] = Registry("architecture", package="megatron.config.architectures")

DEFAULT_ARCHITECTURE = "gpt_neox"
"""The architecture of a configuration that names none."""


def architecture_facts(name: object) -> ArchitectureFacts | None:
    """Returns the facts of an architecture; None for what names none."""
    return ARCHITECTURES[name] if isinstance(name, str) and name in ARCHITECTURES else None


def optional_sections() -> dict[str, str]:
    """Returns the optional sections of the model that any architecture has, and what they describe."""
    return {section: what for name in ARCHITECTURES for section, what in ARCHITECTURES[name].sections.items()}


def owners_of(section: str) -> list[str]:
    """Returns the architectures that have an optional section of the model."""
    return [name for name in ARCHITECTURES if section in ARCHITECTURES[name].sections]


def attention_types() -> dict[str, list[str]]:
    """Returns the architectures that each attention type of NeoX's `attention_config` may be of, NeoX's own first."""
    names = sorted(ARCHITECTURES, key=lambda name: name != DEFAULT_ARCHITECTURE)
    kinds = dict.fromkeys(kind for name in names for kind in ARCHITECTURES[name].attention_types)
    return {kind: [name for name in names if kind in ARCHITECTURES[name].attention_types] for kind in kinds}


def implied_architecture(keys: Mapping[str, YamlValue]) -> str:
    """Returns the architecture of a YAML with these keys of NeoX's that names none."""
    implied = (name for name in ARCHITECTURES if ARCHITECTURES[name].is_implied_by(keys))
    return next(implied, DEFAULT_ARCHITECTURE)
