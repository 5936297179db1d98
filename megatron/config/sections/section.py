"""The base of every configuration section, and what a section says about its values beside their types."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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
