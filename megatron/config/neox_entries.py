"""Statements about flat NeoX keys: a key sets a value, has no effect here, or is refused.

A key of a section's value is declared in the section. The tables in neox/keys/ hold the rest: how such a key is
written where that differs from the section's value, other names of the same values, and the keys that set nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal, TypeAlias

from megatron.config.yaml.problems import YamlValue, show

Flat: TypeAlias = Mapping[str, YamlValue]
"""All given keys, flat, with their values as written."""


class RefusedError(Exception):
    """A value that a known key may not have; the message says why and what to do."""


class _Unset(Enum):
    UNSET = "unset"


UNSET: Final = _Unset.UNSET
"""What a conversion returns for a value that leaves the default in place, such as `fp16: {enabled: false}`."""

Converted: TypeAlias = "YamlValue | Literal[_Unset.UNSET]"


@dataclass(frozen=True)
class MapsTo:
    """The key sets the value at a dotted path of the sections."""

    path: str
    convert: Callable[[YamlValue, Flat], Converted] | None = None
    """Turns the given value, in the light of the other keys, into the section's; raises RefusedError."""
    accepts: Any = None
    """Type of the key itself where it differs from that of the path. A choice is the conversion's to check."""
    difference: str = ""
    """How the meaning or the default differs from NeoX's."""
    meaning: str = ""
    """What the key says, where that is not what the path's docstring says."""
    default: YamlValue = None
    """The key's own default, where it is not the path's."""


@dataclass(frozen=True)
class Conversion:
    """The key of a section's value is not written as the section holds the value. See `MapsTo` for the fields."""

    convert: Callable[[YamlValue, Flat], Converted]
    accepts: Any = None
    meaning: str = ""
    default: YamlValue = None


@dataclass(frozen=True)
class Inert:
    """The key is accepted and changes nothing here."""

    accepts: Any
    """Type of the key."""
    reason: str
    """Why nothing that the run computes depends on it."""
    check: Callable[[YamlValue, Flat], str | None] = lambda value, flat: None
    """Why this value may not be ignored after all, or None."""
    warn: bool = False
    """Whether the user should hear that it has no effect (unless the value is false)."""


@dataclass(frozen=True)
class Rejected:
    """NeoX knows the key, and what it asks for is not supported."""

    reason: str
    use: str = ""
    """What to write instead."""
    harmless: tuple[YamlValue, ...] = ()
    """Values that ask for nothing, such as NeoX's own default of a feature that is missing here."""
    accepts: Any = None
    """Type that NeoX gives the key; None means any."""

    def allows(self, value: YamlValue) -> bool:
        """Tells whether the value asks for nothing."""
        if isinstance(value, dict) and value.get("enabled") is False:
            return True
        return _is_among(value, self.harmless)

    def message(self) -> str:
        """Says why the key is refused, and the way out."""
        way_out = f"; {self.use}" if self.use else ""
        return f"known to NeoX, not supported here: {self.reason}{way_out}"


Entry: TypeAlias = MapsTo | Inert | Rejected
"""What can be said of a key."""

TableEntry: TypeAlias = Entry | Conversion
"""What can be said of it beside the sections."""

DELETED_EXPERIMENT = "it belongs to experiments whose code the TokenFormer release no longer holds"
"""Reason shared by the keys that the release still declares and nothing in it reads."""


def absent_flag(reason: str, use: str = "") -> Rejected:
    """Refuses a switch for something that is missing here: false is accepted, true is not."""
    return Rejected(reason, use, harmless=(False,), accepts=bool)


def only(*values: YamlValue, because: str) -> Callable[[YamlValue, Flat], str | None]:
    """Builds a check that lets only these values be ignored."""

    def check(value: YamlValue, flat: Flat) -> str | None:
        if _is_among(value, values):
            return None
        accepted = " or ".join(map(show, values))
        return f"known to NeoX, not supported here with this value: {because}; only {accepted} is accepted"

    return check


def _is_among(value: YamlValue, values: tuple[YamlValue, ...]) -> bool:
    """Compares as YAML does, where true is not 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)
