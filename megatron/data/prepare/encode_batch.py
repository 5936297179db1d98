"""Turns a batch of raw documents into the tokens of each dataset that is written; runs in the worker processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.config.sections.data import TokenizerConfig
from megatron.data.dataset_format import DEFAULT_FORMAT
from megatron.data.prepare.documents import RawDocument, texts_of
from megatron.data.prepare.encoders import Encoder, EncoderName, build_encoder
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.registry import require

Place = tuple[int, int]
"""Number of an input, from 0, and of a document in it."""

_UINT16 = np.iinfo(np.uint16)


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

    encoder: EncoderName = "auto"
    """What encodes; it decides the time alone."""

    def facts(self) -> dict[str, Any]:
        """Returns what decides the tokens, for manifests; without the tokenizer, which has facts of its own."""
        return {
            "keys": list(self.keys),
            "format": self.format,
            "append_eod": self.append_eod,
            "fix_text": self.fix_text,
        }

    def outputs(self) -> dict[str, str]:
        """Returns the kind of each dataset that is written, by its name."""
        return dict.fromkeys(self.keys, "tokens")


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


class BatchEncoder:
    """Encodes batches by one tokenizer."""

    def __init__(self, options: TokenizeOptions) -> None:
        """Builds tokenizer and encoder. Raises what `build_tokenizer` and `build_encoder` raise."""
        self.options = options
        self.tokenizer: Tokenizer = build_tokenizer(options.tokenizer)
        self.encoder: Encoder = build_encoder(self.tokenizer, options.encoder)
        self._fix: Callable[[str], str] | None = None
        if options.fix_text:
            ftfy = require("ftfy", "--ftfy", "Install it with `pip install ftfy`, or leave the flag out.")
            self._fix = ftfy.fix_text

    def __call__(self, batch: Batch) -> EncodedBatch:
        """Encodes a batch. Raises FastEncoderMismatchError, or DataError of a damaged tokenizer."""
        keys = self.options.keys
        texts: dict[str, list[str]] = {key: [] for key in keys}
        owners: dict[str, list[int]] = {key: [] for key in keys}
        bad: list[tuple[Place, str]] = []
        text_bytes = 0
        for number, (place, content) in enumerate(zip(batch.places, batch.contents, strict=True)):
            try:
                document = texts_of(RawDocument(place[1], content, 0), keys)
            except ValueError as error:
                bad.append((place, str(error)))
                continue
            for key, text in document.items():
                fixed = self._fix(text) if self._fix else text
                text_bytes += len(fixed) if fixed.isascii() else len(fixed.encode())
                texts[key].append(fixed)
                owners[key].append(number)
        outputs: dict[str, Pieces] = {}
        empty, longest = 0, (0, (0, 0))
        for key in keys:
            tokens, all_lengths = self.encoder.encode(texts[key])
            kept = all_lengths > 0
            lengths: npt.NDArray[np.integer] = all_lengths[kept]
            empty += len(kept) - len(lengths)
            if self.options.append_eod:
                tokens, lengths = append_token(tokens, lengths, self.tokenizer.eod)
            outputs[key] = compact(tokens), lengths.astype(np.int32)
            if len(lengths):
                most = int(lengths.argmax())
                owner = np.flatnonzero(kept)[most]
                longest = max(longest, (int(lengths[most]), batch.places[owners[key][owner]]))
        return EncodedBatch(outputs, len(batch.places) - len(bad), empty, bad, text_bytes, longest)


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
