"""Flags for the rules of a section, made from its fields, which declares each of them once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron.config.section import Section
from megatron.config.value_types import describe
from megatron.errors import ConfigError

Rules = TypeVar("Rules", bound=Section)
Parsers = Mapping[str, Callable[[str], Any]]
_NONE: Parsers = MappingProxyType({})
_TYPES: dict[str, type] = {"integer": int, "number": float, "string": str}


def add_section_flags(
    parser: argparse.ArgumentParser, section: type[Section], title: str, own: Parsers = _NONE
) -> None:
    """Adds a flag for each value of a section, such as `--moments`, with its meaning and its default.

    `own` reads flags whose values are more than one word or number.
    """
    group = parser.add_argument_group(title)
    for name, schema in _schemas(section).items():
        meaning = " ".join(schema["description"].split()).replace("%", "%%")
        if schema.get("type") == "boolean":
            group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=meaning)
            continue
        default = schema.get("default")
        shown = " ".join(default) if isinstance(default, list) else default
        words: dict[str, Any] = {"default": argparse.SUPPRESS}
        words["help"] = meaning if default is None else f"{meaning} ({shown})"
        if name in own:
            words |= {"type": own[name]}
        elif schema.get("type") == "array":
            words |= {"nargs": "*", "choices": schema["items"]["enum"]}
        else:
            kind = next(option for option in schema.get("anyOf", [schema]) if option["type"] != "null")
            words |= {"type": _TYPES[kind["type"]], "choices": kind.get("enum")}
        group.add_argument(f"--{name}", **words)


def read_section_flags(args: argparse.Namespace, section: type[Rules]) -> Rules:
    """Returns the section that the flags ask for. Raises ConfigError for a value out of range."""
    schemas = _schemas(section)
    given = {name: value for name, value in vars(args).items() if name in schemas}
    try:
        return section.model_validate(given)
    except ValidationError as error:
        wrong = dict.fromkeys(str(details["loc"][0]) for details in error.errors())
        lines = [f"--{name} {given[name]}: expected {describe(schemas[name])}." for name in wrong]
        raise ConfigError("\n".join(lines)) from error


def _schemas(section: type[Section]) -> dict[str, Any]:
    properties: dict[str, Any] = section.model_json_schema()["properties"]
    return properties
