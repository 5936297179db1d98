"""Batches of documents on their way to the workers and back, and the options that decide their tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.sections.data import TokenizerConfig
from megatron.data.dataset_format import DEFAULT_FORMAT
from megatron.data.prepare.encoders import EncoderName

Place = tuple[int, int]
"""Number of an input, from 0, and of a document in it."""

_UINT16 = np.iinfo(np.uint16)


@dataclass(frozen=True)
class MaskBefore:
    """Counts what follows the first occurrence of some tokens in a document, or all of it where they do not occur."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptCompletion:
    """Counts the completion, which follows the prompt."""

    prompt: str
    """Key of the prompt."""
    completion: str


@dataclass(frozen=True)
class Chat:
    """Counts what one role says in a conversation, a list of {"role", "content"}."""

    key: str
    template: str
    """Jinja, as in tokenizer_config.json."""
    variables: tuple[tuple[str, str], ...] = ()
    """Names and texts of special tokens, for the template."""
    role: str = "assistant"
    only_last: bool = False
    """Count the last message alone."""
    counts_all: bool = False
    """Count every token."""


LabelRule = MaskBefore | PromptCompletion | Chat


@dataclass(frozen=True)
class TokenizeOptions:
    """Options that decide the tokens of a dataset."""

    tokenizer: TokenizerConfig

    format: str = DEFAULT_FORMAT
    """Dataset format to write."""

    keys: tuple[str, ...] = ("text",)
    """Keys of a JSON line's texts; each gets a dataset of its own. The text of a .txt file counts as the first."""

    append_eod: bool = False
    """End each document with the tokenizer's end-of-document token."""

    fix_text: bool = False
    """Mend broken Unicode with the ftfy library."""

    labels: LabelRule | None = None
    """Decides which tokens the loss counts; a dataset of labels says so."""

    encoder: EncoderName = "auto"
    """What encodes; it decides the time alone."""

    def facts(self) -> dict[str, Any]:
        """Returns what decides the tokens, for manifests; without the tokenizer, which has facts of its own."""
        return {
            "keys": list(self.keys),
            "format": self.format,
            "append_eod": self.append_eod,
            "fix_text": self.fix_text,
            "labels": None
            if self.labels is None
            else {"rule": type(self.labels).__name__} | _as_json(dataclasses.asdict(self.labels)),
        }

    def outputs(self) -> dict[str, str]:
        """Returns the kind of each dataset that is written, by its name."""
        kinds = dict.fromkeys(self.keys, "tokens")
        if isinstance(self.labels, PromptCompletion):
            return {"text": "tokens", "label": "labels"}
        if isinstance(self.labels, Chat):
            return kinds | {f"{self.labels.key}_label": "labels"}
        return kinds | ({"label": "labels"} if self.labels else {})

    def columns(self) -> tuple[str, ...]:
        """Returns the keys that are read."""
        if isinstance(self.labels, PromptCompletion):
            return (self.labels.prompt, self.labels.completion)
        return self.keys


@dataclass
class Batch:
    """Raw documents that are encoded together."""

    places: list[Place] = field(default_factory=list)
    contents: list[Any] = field(default_factory=list)
    """Contents of RawDocument."""
    size: int = 0
    """Of the contents [bytes]."""
    bytes_read: int = 0
    """Position of the reader in all inputs together [bytes]."""
    finished: list[FinishedInput] = field(default_factory=list)
    """Inputs that end before the last document, or with it."""


@dataclass(frozen=True)
class FinishedInput:
    """An input that has been read to its end."""

    input: int
    sha256: str


Pieces = tuple[npt.NDArray[np.integer], npt.NDArray[np.int32]]
"""Tokens of documents, one after the other, and the length of each [documents]."""


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens of a batch, and what is to be counted of it."""

    outputs: dict[str, Pieces]
    """By name of the dataset; without empty documents."""
    documents: int
    empty: int
    bad: list[tuple[Place, str]]
    """Place and reason of each malformed document."""
    text_bytes: int
    longest: tuple[int, Place]
    """Tokens of the longest document, and where it is."""


def append_token(
    tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer], token: int
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Ends each document with `token`; returns the new tokens and lengths."""
    ended = np.full(len(tokens) + len(lengths), token, dtype=np.int64)
    ended[np.arange(len(tokens)) + np.repeat(np.arange(len(lengths)), lengths)] = tokens
    return ended, lengths + 1


def compact(tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Returns tokens in two bytes each where they fit, which is less to hand over to another process."""
    fits = not len(tokens) or (tokens.min() >= 0 and tokens.max() <= _UINT16.max)
    return tokens.astype(np.uint16) if fits else tokens


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Returns values as they come back from a JSON file."""
    return {key: _lists(value) for key, value in values.items()}


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
