"""The base of every configuration section, and what a section declares about its values beside their types."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class Section(BaseModel):
    """A frozen, strictly typed part of the configuration; field docstrings are its reference manual."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    key_prefix: ClassVar[str] = ""
    """Start of the YAML keys that set the section's values, such as `fp16.`; the rest is the field's name."""


@dataclass(frozen=True)
class Key:
    """Annotates a value with the YAML key that sets it, and with how that differs from NeoX's."""

    name: str = ""
    """The key, where it is not the section's prefix and the field's name; dots lead into NeoX's dictionaries."""
    difference: str = ""
    """How the meaning or the default differs from NeoX's."""
    default: str | None = None
    """The key's default, where the section requires the value."""


@dataclass(frozen=True)
class OneOf:
    """Annotates a text that names a registered variant. A set of variants that grows by files is no Literal."""

    names: Callable[[], Iterable[str]]
    """Lists the variants of the moment, without importing torch."""

    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema of the choice."""
        return {"enum": list(self.names()), "type": "string"}

    def __get_pydantic_core_schema__(self, source: type[str], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Builds pydantic's validator of the choice."""
        return core_schema.no_info_after_validator_function(self._require_known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Returns the JSON schema of the choice, as pydantic asks for it."""
        return self.schema()

    def _require_known(self, name: str) -> str:
        known = list(self.names())
        if name not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return name
