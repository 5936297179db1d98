"""What differs between two configurations, in the words of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.neox.keys.table import key_of
from megatron.config.section_fields import fields
from megatron.config.sections.run_config import RunConfig
from megatron.config.yaml.problems import YamlValue


@dataclass(frozen=True)
class Difference:
    """One value that two configurations do not share; None where it is unset."""

    key: str
    """The NeoX key."""
    first: YamlValue
    second: YamlValue


def differences(first: RunConfig, second: RunConfig) -> list[Difference]:
    """Every key whose value differs, in the order of the sections."""
    ours, theirs = first.model_dump(mode="json"), second.model_dump(mode="json")
    pairs = {path: (_value_at(ours, path), _value_at(theirs, path)) for path in fields()}
    return [Difference(key_of(path), *pair) for path, pair in pairs.items() if pair[0] != pair[1]]


def _value_at(dump: dict[str, Any], path: str) -> Any:
    value: Any = dump
    for name in path.split("."):
        value = None if value is None else value.get(name)
    return value
