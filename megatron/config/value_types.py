"""Types of configuration values: pydantic tells whether a value conforms, and our words say what was expected."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Set
from functools import cache
from typing import Any, TypeAlias

from pydantic import ConfigDict, TypeAdapter, ValidationError

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
    return TypeAdapter(accepts, config=ConfigDict(strict=True, allow_inf_nan=False))


@cache
def schema_of(accepts: Any) -> Schema:
    """Returns the JSON schema of a type such as `bool` or `Literal["fp16", "bfloat16"]`."""
    schema = _adapter(accepts).json_schema()
    # What a list or a mapping holds is not told by `list` and `dict`.
    return {key: value for key, value in schema.items() if key != "additionalProperties" and value != {}}


def mistyped(value: YamlValue, accepts: Any) -> str | None:
    """Says what was expected of a value that is not of the type `accepts`; returns None for one that is."""
    return None if conforms(value, _adapter(accepts)) else expected(value, schema_of(accepts))


def conforms(value: object, adapter: TypeAdapter[Any]) -> bool:
    """Tells whether pydantic accepts a value."""
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def expected(value: YamlValue, schema: Schema) -> str:
    """Says what was expected in the place of `value`, and what was probably meant by it."""
    remedy = url_remedy(value, schema) if holds_paths(schema) else ""
    return f"expected {describe(schema, value=value)}{remedy or likely_meant(value, schema)}"


def describe(schema: Schema, plural: bool = False, value: YamlValue = None) -> str:
    """Puts a schema in words, such as `a whole number above 0`. Null is left unsaid, since every key may be null.

    So are bounds far from any use, unless `value` is beyond them.
    """
    if "anyOf" in schema:
        options = [describe(option, plural, value) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    if "enum" in schema:
        return f"one of {', '.join(show(choice) for choice in schema['enum'])}"
    if "const" in schema:
        return show(schema["const"])
    if schema.get("format") in PATH_NAMES:
        return PATH_NAMES[schema["format"]][plural]
    if "type" not in schema:
        return "anything"
    return _NAMES[schema["type"]][plural] + _narrowing(schema, value)


def _narrowing(schema: Schema, value: YamlValue) -> str:
    if "pattern" in schema:
        longest = f", of at most {schema['maxLength']} characters" if "maxLength" in schema else ""
        return f" of the form {schema['pattern']}{longest}"
    if "maxLength" in schema:
        return f" of at most {schema['maxLength']} characters"
    if "items" in schema:
        length = f"{schema['minItems']} " if "minItems" in schema else ""
        worst = max(value, key=_size, default=None) if isinstance(value, list) else None
        return f" of {length}{describe(schema['items'], plural=True, value=worst)}"
    bounds = [
        f"{word} {_in_digits(schema[name])}" for name, word in _BOUNDS.items() if _is_worth_saying(name, schema, value)
    ]
    if schema.get("minimum") == SMALLEST and not 0 < _size(value) < SMALLEST:
        bounds.insert(0, "above 0")
    return " " + " and ".join(bounds) if bounds else ""


_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "of at least",
    "exclusiveMaximum": "below",
    "maximum": "of at most",
}
SMALLEST = 1e-30
"""Least of the numbers above 0 that float32 holds with room for products."""
_FAR = 10**5
"""Upper bounds from here on are far from any use."""


def _is_worth_saying(name: str, schema: Schema, value: YamlValue) -> bool:
    if name not in schema:
        return False
    bound: float = schema[name]
    if "aximum" in name:
        return bound < _FAR or _size(value) >= bound
    return bound != SMALLEST or 0 < _size(value) < SMALLEST


def _size(value: YamlValue) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _in_digits(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) and bound >= _FAR else f"{bound:g}"


def likely_meant(value: YamlValue, schema: Schema) -> str:
    """Asks whether the user meant what a value that does not conform resembles; returns nothing when unclear."""
    options = schema.get("anyOf", [schema])
    kinds = {option.get("type") for option in options}
    if "array" in kinds and not isinstance(value, list | dict):
        return f"; did you mean [{show(value)}]?" if any(_fits_alone(value, option) for option in options) else ""
    if isinstance(value, str):
        if "boolean" in kinds:
            guess = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower(), value.lower())
            return f"; did you mean {guess}?" if guess in {"true", "false"} else ""
        if kinds & {"integer", "number"} and _is_number(value):
            return "; remove the quotes"
        choices = [choice for option in options for choice in option.get("enum", ())]
        return did_you_mean(value, choices)
    return _likely_meant_by_number(value, kinds) if isinstance(value, int | float) else ""


def _likely_meant_by_number(value: float, kinds: Set[str | None]) -> str:
    if "string" in kinds:
        return "; put it in quotes"
    if not math.isfinite(value):
        return "; infinity and NaN are none"
    if isinstance(value, float) and value.is_integer() and "integer" in kinds and "number" not in kinds:
        return f"; did you mean {int(value)}?"
    return ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` for the known word that `word` is a slip of, or nothing when it is none.

    A slip changes or leaves out parts of a word, which stand between underscores and dots: `num_gpu` is one of
    `num_gpus`, `ffn_slots` of `ffn_slot_num`, and `attention_type` none of `attention_dropout`.
    """
    if len(word) > _LONGEST_SLIP:
        return ""
    near = difflib.get_close_matches(word, list(known), n=5, cutoff=0.7)
    nearest = next((name for name in near if _is_slip(word, name)), None)
    return f"; did you mean {nearest}?" if nearest else ""


def _fits_alone(value: YamlValue, schema: Schema) -> bool:
    """Tells whether a list of this value alone conforms."""
    items = schema.get("items", {})
    types = {"integer": int, "number": int | float, "string": str}
    if items.get("type") not in types or schema.get("minItems", 1) > 1 or isinstance(value, bool):
        return False
    if value not in items.get("enum", [value]):
        return False
    size = _size(value)
    within = items.get("minimum", -math.inf) <= size <= items.get("maximum", math.inf)
    strictly_within = items.get("exclusiveMinimum", -math.inf) < size < items.get("exclusiveMaximum", math.inf)
    return isinstance(value, types[items["type"]]) and within and strictly_within


_LONGEST_SLIP = 64


def _is_slip(word: str, known: str) -> bool:
    ours, theirs = re.split(r"[._]", word.lower()), re.split(r"[._]", known.lower())
    if len(ours) == len(theirs):
        return all(_likeness(*pair) >= 0.6 for pair in zip(ours, theirs, strict=True))
    fewer, more = sorted((ours, theirs), key=len)
    rest = iter(more)
    left_out = all(any(_likeness(part, other) >= 0.8 for other in rest) for part in fewer)
    return left_out or _likeness("".join(ours), "".join(theirs)) >= 0.9


def _likeness(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, word, other).ratio()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
