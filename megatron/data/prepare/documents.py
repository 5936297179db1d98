"""Documents as inputs hold them: where they are, and the texts in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

DEFAULT_MAX_LINE_BYTES = 1 << 28
DEFAULT_MAX_EXPANSION = 1000.0


@dataclass(frozen=True)
class Limits:
    """Bounds on what an input may ask for."""

    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES
    """Longest line, or file of a single document [bytes]; memory grows with it."""

    max_expansion: float = DEFAULT_MAX_EXPANSION
    """Largest ratio of decompressed to compressed bytes."""


class RawDocument(NamedTuple):
    """One document of an input, not yet decoded."""

    number: int
    """Line or row, from 1; 0 for a file that is one document."""

    content: bytes | dict[str, Any] | None
    """JSON line or text file as bytes, values of a row by column; None for a line beyond the limit."""

    bytes_read: int
    """Position of the reader in the input, as it lies on disk [bytes]."""


class Input(Protocol):
    """A file, folder or dataset with documents."""

    name: str
    """What messages and manifests call it."""

    size: int
    """Of all its files [bytes]."""

    unit: str
    """`line` or `row`, as messages count documents; empty for a file that is one document."""

    def identity(self) -> dict[str, Any]:
        """Returns what tells this input from another of the same name, at little cost."""

    def read(self, keys: Sequence[str], after: int, limits: Limits) -> Iterator[RawDocument]:
        """Yields the documents with numbers above `after`, in order; -1 asks for all.

        Raises DataError when the input is damaged.
        """

    def sha256(self) -> str:
        """Returns the hash of the whole input, once it has been read."""


def place(source: Input, number: int) -> str:
    """Describes where a document is: file:line, or file, row N."""
    if not number:
        return source.name
    return f"{source.name}:{number}" if source.unit == "line" else f"{source.name}, {source.unit} {number:,}"


def texts_of(raw: RawDocument, keys: Sequence[str]) -> dict[str, str]:
    """Decodes the texts of a .jsonl line or a row by key, or a whole text file under the first key.

    Raises ValueError, with the reason, when the document is malformed.
    """
    if raw.content is None:
        raise ValueError("longer than --max-line-bytes")
    if isinstance(raw.content, bytes):
        text = _decoded(raw.content)
        if not raw.number:
            return {keys[0]: text}
        values = parse_object(text)
    else:
        values = raw.content
    return {key: checked_text(values, key) for key in keys}


def values_of(raw: RawDocument) -> dict[str, Any]:
    """Decodes a .jsonl line or a row whose values need not be texts. Raises ValueError when it is malformed."""
    if raw.content is None:
        raise ValueError("longer than --max-line-bytes")
    return parse_object(_decoded(raw.content)) if isinstance(raw.content, bytes) else raw.content


def parse_object(text: str) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError, with the reason, for anything else."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON {type(values).__name__}, not an object")
    return values


def checked_text(values: dict[str, Any], key: str) -> str:
    """Returns the text under `key`. Raises ValueError where there is none, or no UTF-8 can be made of it."""
    text = values.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is not a text" if key in values else f"no key {key!r}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key!r} holds half of a surrogate pair") from None
    return text


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
