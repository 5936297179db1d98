"""Flags for the rules of growth, made from the fields of their section, which declares each of them once."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import ValidationError

from megatron.config.sections.growth import GrowthRules
from megatron.config.value_types import describe
from megatron.errors import ConfigError

_TYPES: dict[str, type] = {"integer": int, "number": float, "string": str}


def add_growth_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each rule, such as `--moments`, with its meaning and its default."""
    group = parser.add_argument_group("rules of growth")
    for name, schema in _schemas().items():
        meaning = " ".join(schema["description"].split()).replace("%", "%%")
        if schema.get("type") == "boolean":
            group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=meaning)
            continue
        default = schema.get("default")
        kind = next(option for option in schema.get("anyOf", [schema]) if option["type"] != "null")
        group.add_argument(
            f"--{name}",
            type=_TYPES[kind["type"]],
            choices=kind.get("enum"),
            default=argparse.SUPPRESS,
            help=meaning if default is None else f"{meaning} ({default})",
        )


def read_growth_flags(args: argparse.Namespace) -> GrowthRules:
    """Returns the rules that the flags ask for. Raises ConfigError for a value out of range."""
    schemas = _schemas()
    given = {name: value for name, value in vars(args).items() if name in schemas}
    try:
        return GrowthRules.model_validate(given)
    except ValidationError as error:
        wrong = [str(details["loc"][0]) for details in error.errors()]
        lines = [f"--{name} {given[name]}: expected {describe(schemas[name])}." for name in wrong]
        raise ConfigError("\n".join(lines)) from error


def _schemas() -> dict[str, Any]:
    properties: dict[str, Any] = GrowthRules.model_json_schema()["properties"]
    return properties
