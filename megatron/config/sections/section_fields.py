"""Lists the values of the configuration by dotted path: schema, default and meaning, as their sections declare them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from megatron.config.optimizer import OptimizerConfig, registered_optimizers
from megatron.config.section import Key, OneOf, Section
from megatron.config.sections.run_config import RunConfig
from megatron.config.value_types import Schema, conforms
from megatron.config.yaml.problems import YamlValue


@dataclass(frozen=True)
class Field:
    """One value of the configuration."""

    path: str
    """Dotted path from the root, such as `model.num_layers`."""
    key: str
    """YAML key that sets it, such as `optimizer.params.lr`."""
    difference: str
    """How the key's meaning or default differs from NeoX's."""
    section: type[Section]
    """The section that declares it."""
    name: str
    """Its name there."""
    choice: OneOf | None
    """The registered names it is one of."""
    meaning: str
    """Its docstring: meaning and unit."""
    required: bool
    """Whether it has no default."""
    derived: bool
    """Whether its default is computed from other values."""
    default: YamlValue
    """Default value; None also for required and derived ones."""
    key_default: YamlValue
    """Default of the key, where the section requires the value."""

    @property
    def type_schema(self) -> Schema:
        """Returns the JSON schema of its type; of a choice among registered names, the schema of a text."""
        return _type_schemas(self.section)[self.name]

    @property
    def schema(self) -> Schema:
        """Returns the JSON schema of its type, with the names that are registered now."""
        return self.type_schema if self.choice is None else self.choice.schema()

    def accepts(self, value: object) -> bool:
        """Tells whether the value may be this, apart from all others."""
        return conforms(value, _adapter(self.section, self.name))


def fields(optimizer: type[OptimizerConfig] | None = None) -> dict[str, Field]:
    """Returns all values of the configuration by dotted path, in the order of the sections; subsections come last.

    Those of every registered optimizer are among them, or with `optimizer` only those of that section.
    """
    sections = [facts.section for facts in registered_optimizers()] if optimizer is None else [optimizer]
    return _fields_with(tuple(sections))


@cache
def _fields_with(optimizers: tuple[type[OptimizerConfig], ...]) -> dict[str, Field]:
    found: dict[str, Field] = {}
    for field in _walk(RunConfig, "", optimizers):
        found.setdefault(field.path, field)
    return found


def _walk(section: type[Section], prefix: str, optimizers: tuple[type[OptimizerConfig], ...]) -> Iterator[Field]:
    for field in _own_fields(section):
        yield replace(field, path=prefix + field.path)
    for name, info in section.model_fields.items():
        inner = _section_of(info.annotation)
        if inner is not None:
            for variant in optimizers if inner is OptimizerConfig else (inner,):
                yield from _walk(variant, f"{prefix}{name}.", optimizers)


@cache
def _own_fields(section: type[Section]) -> list[Field]:
    """Lists the values of one section, without those of its subsections, under their names in it."""
    keys = {name: _key(section, name) for name in section.model_fields}
    return [
        Field(
            path=name,
            key=keys[name].name or section.key_prefix + name,
            difference=keys[name].difference,
            section=section,
            name=name,
            choice=next((item for item in info.metadata if isinstance(item, OneOf)), None),
            meaning=" ".join((info.description or "").split()),
            required=info.is_required(),
            derived=info.default_factory is not None,
            default=_default(info),
            key_default=keys[name].default,
        )
        for name, info in section.model_fields.items()
        if _section_of(info.annotation) is None
    ]


@cache
def _type_schemas(section: type[Section]) -> dict[str, Schema]:
    """Returns the JSON schemas of a section's values. They cost more than reading a configuration, which needs none."""
    schema = section.model_json_schema(mode="validation")
    definitions = schema.get("$defs", {})
    return {name: _resolve(found, definitions) for name, found in schema["properties"].items()}


@cache
def _adapter(section: type[Section], name: str) -> TypeAdapter[Any]:
    """Returns pydantic's validator of a value alone."""
    return TypeAdapter(_alone(section.model_fields[name]), config=section.model_config)


def _key(section: type[Section], name: str) -> Key:
    """Returns the key of a field as the section declares it, or the section that it extends."""
    sections = [base for base in section.__mro__ if issubclass(base, Section) and name in base.model_fields]
    declared = (item for base in sections for item in base.model_fields[name].metadata if isinstance(item, Key))
    return next(declared, Key())


def _section_of(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _alone(info: FieldInfo) -> Any:
    """Returns the type of a field with its bounds."""
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def _default(info: FieldInfo) -> YamlValue:
    default: YamlValue = None if info.is_required() or info.default_factory is not None else info.default
    return default


def _resolve(schema: Any, definitions: dict[str, Any]) -> Any:
    """Inlines references and drops titles, defaults and descriptions, so that the type alone remains."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _resolve(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        noise = {"title", "default", "description"}
        return {key: _resolve(value, definitions) for key, value in schema.items() if key not in noise}
    if isinstance(schema, list):
        return [_resolve(item, definitions) for item in schema]
    return schema
