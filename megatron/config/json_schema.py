"""The few forms of JSON schema that configuration values take: does a value conform, and how to say it in words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from megatron.config.yaml.problems import YamlValue, show

Schema: TypeAlias = Mapping[str, Any]

BOOL: Schema = {"type": "boolean"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
TEXT: Schema = {"type": "string"}
LIST: Schema = {"type": "array"}
DICTIONARY: Schema = {"type": "object"}
ANYTHING: Schema = {}

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_NAMES = {
    "boolean": ("true or false", "booleans"),
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "texts"),
    "object": ("a mapping", "mappings"),
    "array": ("a list", "lists"),
}


def one_of(*values: str) -> Schema:
    """Schema of a choice among texts."""
    return {"enum": list(values)}


def conforms(value: YamlValue, schema: Schema) -> bool:
    """Whether a value has the schema's type, or is one of its choices. Bounds and items are not looked at."""
    if "enum" in schema:
        return isinstance(value, str) and value in schema["enum"]
    if "anyOf" in schema:
        return any(conforms(value, option) for option in schema["anyOf"])
    if "type" not in schema:
        return True
    if isinstance(value, bool):
        return bool(schema["type"] == "boolean")
    return isinstance(value, _PYTHON_TYPES[schema["type"]])


def describe(schema: Schema, plural: bool = False) -> str:
    """A schema in words, such as `a whole number above 0`; null is left unsaid, since every key may be null."""
    if "anyOf" in schema:
        options = [describe(option, plural) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if "enum" in schema:
        return f"one of {', '.join(show(choice) for choice in schema['enum'])}"
    if "const" in schema:
        return show(schema["const"])
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
    """What the user probably meant by a value that does not conform, as a question; empty when unclear."""
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
    """`; did you mean X?` for the known word nearest to `word`, or nothing when none is near."""
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
