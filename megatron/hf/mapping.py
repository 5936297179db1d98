"""How a model of ours and a Hugging Face model correspond: names of parameters, fields of configurations, as data.

Every architecture's tensors have the same shapes and element order on both sides, so a map is a list of renamed
prefixes. What a map cannot express is refused with the field that prevents it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from megatron.config.model import ModelConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.registry import Registry


@dataclass(frozen=True)
class NameMap:
    """Parameter names, ours to theirs and back."""

    prefixes: tuple[tuple[str, str], ...]
    """(ours, theirs); what follows a prefix is the same on both sides."""

    also_read: tuple[tuple[str, str], ...] = ()
    """(other spelling of theirs, theirs), for folders that another version of transformers wrote."""

    without_weights: re.Pattern[str] | None = None
    """Names of tensors in folders of old versions that are no parameters: masks and rotary frequencies."""

    def to_theirs(self, name: str) -> str:
        """Their name of our parameter. Raises KeyError for a name that no prefix matches."""
        return _rename(name, self.prefixes)

    def to_ours(self, name: str) -> str | None:
        """Our name of their tensor; None for a tensor that is no parameter. Raises KeyError for an unknown name."""
        if self.without_weights is not None and self.without_weights.fullmatch(name):
            return None
        for spelling, usual in self.also_read:
            if name.startswith(spelling):
                name = usual + name.removeprefix(spelling)
        return _rename(name, ((theirs, ours) for ours, theirs in self.prefixes))


def _rename(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for source, target in prefixes:
        if name.startswith(source):
            return target + name.removeprefix(source)
    raise KeyError(name)


def our_names(names: NameMap, theirs: Iterable[str], expected: Iterable[str], where: str) -> dict[str, str]:
    """Our name to theirs, for all tensors of a folder. Every tensor and every parameter is accounted for.

    Raises CheckpointError, naming `where`, for unknown tensors, missing parameters, and parameters given twice.
    """
    found: dict[str, str] = {}
    unknown: list[str] = []
    expected = set(expected)
    for name in theirs:
        try:
            ours = names.to_ours(name)
        except KeyError:
            unknown.append(name)
            continue
        if ours is None:
            continue
        if ours in found:
            raise CheckpointError(f"{where}: {name} and {found[ours]} are the same parameter, {ours}.")
        if ours not in expected:
            unknown.append(name)
        else:
            found[ours] = name
    missing = sorted(names.to_theirs(name) for name in expected - found.keys())
    if unknown or missing:
        raise CheckpointError(
            f"{where}: its tensors are not those of the configured model. Missing: {', '.join(missing) or 'none'}. "
            f"Left over: {', '.join(sorted(unknown)) or 'none'}."
        )
    return found


@dataclass(frozen=True)
class FieldMap:
    """Fields of configurations that carry over as they are, and the values that their model has without saying so."""

    same: Mapping[str, str]
    """Our dotted field of ModelConfig to theirs."""

    fixed: Mapping[str, Any]
    """Our fields that their model cannot vary, and the value that it has."""

    def to_theirs(self, model: ModelConfig, what: str) -> dict[str, Any]:
        """Their settings. Raises ConfigError, naming `what`, for a model that theirs cannot be."""
        for path, value in self.fixed.items():
            ours = read_field(model, path)
            if ours != value:
                raise ConfigError(
                    f"{path}: {what} always has {value!r}, and this model has {ours!r}. It has no export."
                )
        return {theirs: read_field(model, ours) for ours, theirs in self.same.items()}

    def to_ours(self, config: PretrainedConfig) -> dict[str, Any]:
        """Our settings, by dotted field."""
        return {ours: getattr(config, theirs) for ours, theirs in self.same.items()} | dict(self.fixed)


def read_field(model: ModelConfig, path: str) -> Any:
    """The value at a dotted path of the section."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


@dataclass(frozen=True)
class HFArchitecture:
    """Their counterpart of one of our architectures."""

    model_class: type[PreTrainedModel]
    names: NameMap
    to_config: Callable[[ModelConfig, int], PretrainedConfig]
    """(model, rows of the vocabulary) -> their configuration, without dtype and token ids. Raises ConfigError for a
    model that they cannot express."""
    to_settings: Callable[[PretrainedConfig], dict[str, Any]]
    """Their configuration -> all fields of ModelConfig that it decides, by dotted path. Raises ConfigError for a
    model that we cannot express."""


HF_ARCHITECTURES: Registry[HFArchitecture] = Registry("architecture with a Hugging Face counterpart")
"""By our name of the architecture, which is their model_type too."""
