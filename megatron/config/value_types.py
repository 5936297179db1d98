"""Types of configuration values: pydantic tells whether a value conforms, and our words say what was expected."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from megatron.config.local_path import PATH_NAMES, holds_paths, url_remedy
from megatron.config.yaml.problems import YamlValue, show

Schema: TypeAlias = Mapping[str, Any]
"""JSON schema of a value."""

_NAMES = {
    "boolean": ("true or false", "booleans"),
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "texts"),
    "object": ("a mapping", "mappings"),
    "array": ("a list", "lists"),
}


@cache
def _adapter(accepts: Any) -> TypeAdapter[Any]:
    return TypeAdapter(accepts)


@cache
def schema_of(accepts: Any) -> Schema:
    """Returns the JSON schema of a type such as `bool` or `Literal["fp16", "bfloat16"]`."""
    schema = _adapter(accepts).json_schema()
    # What a list or a mapping holds is not told by `list` and `dict`.
    return {key: value for key, value in schema.items() if key != "additionalProperties" and value != {}}


def mistyped(value: YamlValue, accepts: Any) -> str | None:
    """Says what was expected of a value that is not of the type `accepts`; returns None for one that is."""
    try:
        _adapter(accepts).validate_python(value, strict=True)
    except ValidationError:
        return expected(value, schema_of(accepts))
    return None


def expected(value: YamlValue, schema: Schema) -> str:
    """Says what was expected in the place of `value`, and what was probably meant by it."""
    remedy = url_remedy(value) if holds_paths(schema) else ""
    return f"expected {describe(schema)}{remedy or likely_meant(value, schema)}"


def describe(schema: Schema, plural: bool = False) -> str:
    """Puts a schema in words, such as `a whole number above 0`. Null is left unsaid, since every key may be null."""
    if "anyOf" in schema:
        options = [describe(option, plural) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if "enum" in schema:
        return f"one of {', '.join(show(choice) for choice in schema['enum'])}"
    if "const" in schema:
        return show(schema["const"])
    if schema.get("format") in PATH_NAMES:
        return PATH_NAMES[schema["format"]][plural]
    if "type" not in schema:
        return "anything"
    return _NAMES[schema["type"]][plural] + _narrowing(schema)


def _narrowing(schema: Schema) -> str:
    if "pattern" in schema:
        return f" of the form {schema['pattern']}"
    if "items" in schema:
        length = f"{schema['minItems']} " if "minItems" in schema else ""
        return f" of {length}{describe(schema['items'], plural=True)}"
    words = {
        "exclusiveMinimum": "above",
        "minimum": "of at least",
        "exclusiveMaximum": "below",
        "maximum": "of at most",
    }
    bounds = [f"{word} {schema[name]:g}" for name, word in words.items() if name in schema]
    return " " + " and ".join(bounds) if bounds else ""


def likely_meant(value: YamlValue, schema: Schema) -> str:
    """Asks whether the user meant what a value that does not conform resembles; returns nothing when unclear."""
    kinds = {option.get("type") for option in schema.get("anyOf", [schema])}
    if "array" in kinds and not isinstance(value, list | dict):
        return f"; did you mean [{show(value)}]?"
    if isinstance(value, str):
        if "boolean" in kinds:
            guess = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower(), value.lower())
            return f"; did you mean {guess}?" if guess in {"true", "false"} else ""
        if kinds & {"integer", "number"} and _is_number(value):
            return "; remove the quotes"
        return did_you_mean(value, schema.get("enum", []))
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return f"; did you mean {int(value)}?"
    return "; put it in quotes" if "string" in kinds and isinstance(value, int | float) else ""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Returns `; did you mean X?` for the known word nearest to `word`, or nothing when none is near."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
