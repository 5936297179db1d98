"""What the configuration sections say about a value at a dotted path: its schema, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from megatron.config.json_schema import Schema
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.section import Section
from megatron.config.yaml.problems import YamlValue


@dataclass(frozen=True)
class Field:
    """One value of the configuration."""

    path: str
    """Dotted path from the root, such as `model.num_layers`."""
    schema: Schema
    """JSON schema of its type."""
    meaning: str
    """Its docstring: meaning and unit."""
    required: bool
    """Whether it has no default."""
    derived: bool
    """Whether its default is computed from other values."""
    default: YamlValue
    """Default value; None also for required and derived ones."""


@cache
def fields() -> dict[str, Field]:
    """All values of the configuration by dotted path, in the order of the sections; subsections come last."""
    return {field.path: field for field in _walk(RunConfig, "")}


def _walk(section: type[Section], prefix: str) -> Iterator[Field]:
    schema = section.model_json_schema(mode="validation")
    definitions = schema.get("$defs", {})
    inner = {name: _section_of(info.annotation) for name, info in section.model_fields.items()}
    for name, info in section.model_fields.items():
        if inner[name] is not None:
            continue
        yield Field(
            path=prefix + name,
            schema=_resolve(schema["properties"][name], definitions),
            meaning=" ".join((info.description or "").split()),
            required=info.is_required(),
            derived=info.default_factory is not None,
            default=_default(info),
        )
    for name, subsection in inner.items():
        if subsection is not None:
            yield from _walk(subsection, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _default(info: FieldInfo) -> YamlValue:
    default: YamlValue = None if info.is_required() or info.default_factory is not None else info.default
    return default


def _resolve(schema: Any, definitions: dict[str, Any]) -> Any:
    """Inline references and drop titles, defaults and descriptions, so that the type alone remains."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _resolve(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        noise = {"title", "default", "description"}
        return {key: _resolve(value, definitions) for key, value in schema.items() if key not in noise}
    if isinstance(schema, list):
        return [_resolve(item, definitions) for item in schema]
    return schema
