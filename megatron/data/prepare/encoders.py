"""Turns batches of texts into one array of token ids, by the fastest encoder that gives the tokenizer's own ids."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.tokenizer import Tokenizer
from megatron.data.tokenizers.huggingface import LibraryTokenizer
from megatron.errors import UserError
from megatron.registry import is_installed, require

logger = logging.getLogger(__name__)

EncoderName = Literal["auto", "tokenizers", "fastokens"]
COMPARED_SHARE = 1 / 256
"""Share of the text [bytes] that the tokenizer encodes as well, to compare."""
_ALWAYS_COMPARED = 1 << 16
"""Text that is compared at the start of each process [bytes]."""
_SELF_CHECK = [
    "",
    " ",
    "The quick brown fox's den isn't where they'd've said it'll be; we're 'late, I'm 'sure.\n",
    "    def f(x):\n\treturn {'a': 1,  'b' : [2.5e-10, 0x1F]}  # \r\n\r\n   \n  \t \n",
    "".join(" " * n + "x" for n in range(1, 90)) + "\n" * 40 + "\t" * 40 + " \n" * 20,
    "\u00a0\u2003\u3000 \u200b\u2028\u0085 \u202f\u205f x\u00a0\u00a0y \u2003z",
    "naïve e\u0301 \u0041\u030a \u212b \ufb01 ½ ①Ⅷ ٣४ 東京都 한국어 \u1100\u1161 ไทย עברית العربية \u0958 \U0001d15e",
    "🦊👩\u200d👩\u200d👧🏽 \ufffd \x00\x01\x7f \u0300\u0301 \ue000 \U0010ffff \ud7ff \ufeff",
    "1234567890 1,000,000.00 3rd $5 100% a1b2 ¹²³ __init__ snake_case CamelCase --flag=-1 <a href='x'>&amp;</a>",
    "a" * 300 + " " + "ab" * 200 + " " + "".join(map(chr, range(33, 127))) * 3 + " " + "=" * 500,
    "".join(f"a{chr(point)}b {chr(point)}1{chr(point)}." for point in range(0x20, 0x3000)),
]


class FastEncoderMismatchError(UserError):
    """The fast encoder has given other ids than the tokenizer: nothing that it encoded may be kept."""


class Encoder(Protocol):
    """Encodes batches of texts."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """Returns the ids of all texts, one after the other, and the number of ids of each [texts]."""


class TokenizerEncoder:
    """The tokenizer itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = "tokenizers"
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        ids = self._tokenizer.tokenize_batch(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths


class FastEncoder:
    """The fastokens library, which reads a tokenizer.json and encodes it many times as fast.

    It is held against the tokenizer on texts of every kind when it is built, on the first texts of a process, and on a
    sample of all others. Raises FastEncoderMismatchError for the first difference.
    """

    def __init__(self, tokenizer: LibraryTokenizer, library: Any) -> None:
        self.name = "fastokens"
        self._reference = TokenizerEncoder(tokenizer)
        self._encoder = library.Tokenizer.from_json_str(tokenizer.definition())
        self._seen = 0
        self._compared = 0

    def check(self, added_tokens: Sequence[str]) -> None:
        """Compares both on texts of every kind, among which the tokenizer's added tokens stand in many contexts."""
        contexts = (f"a{token}b {token} {token}{token}\n{token}, {token[:-1]}" for token in added_tokens[:512])
        self._compare([*_SELF_CHECK, "".join(contexts)])

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        sampled = []
        for text in texts:
            self._seen += len(text)
            if self._compared < _ALWAYS_COMPARED or self._compared < self._seen * COMPARED_SHARE:
                self._compared += len(text)
                sampled.append(text)
        if sampled:
            self._compare(sampled)
        return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        ids, offsets = self._encoder.encode_batch_flat(list(texts), add_special_tokens=True)
        bounds = np.frombuffer(offsets, np.dtype("<u8")).astype(np.int64)
        return np.frombuffer(ids, np.dtype("<u4")), bounds[1:] - bounds[:-1]

    def _compare(self, texts: Sequence[str]) -> None:
        for text in texts:
            ours, _ = self._encode([text])
            expected, _ = self._reference.encode([text])
            if not np.array_equal(ours, expected):
                shown = text if len(text) < 80 else f"{text[:77]}..."
                raise FastEncoderMismatchError(
                    f"fastokens encodes {shown!r} otherwise than the tokenizer does. Use --encoder tokenizers."
                )


def build_encoder(tokenizer: Tokenizer, name: EncoderName) -> Encoder:
    """Builds the encoder that `name` asks for; `auto` takes the fastest one that agrees with the tokenizer.

    Raises EnvironmentSetupError when fastokens is asked for and missing, FastEncoderMismatchError when it does not
    agree.
    """
    if name == "tokenizers" or not isinstance(tokenizer, LibraryTokenizer):
        return TokenizerEncoder(tokenizer)
    if name == "auto" and not is_installed("fastokens"):
        return TokenizerEncoder(tokenizer)
    library = require("fastokens", "--encoder fastokens", "Install it with `pip install fastokens`.")
    added = [str(token["content"]) for token in json.loads(tokenizer.definition()).get("added_tokens", [])]
    try:
        encoder = FastEncoder(tokenizer, library)
        encoder.check([token for token in added if token])
    except (ValueError, UserError) as error:
        if name != "auto":
            raise
        logger.info("fastokens is not used for this tokenizer (%s)", error)
        return TokenizerEncoder(tokenizer)
    return encoder


def encoder_version(name: str) -> str:
    """Returns name and version of the library behind an encoder, for the manifest."""
    library = importlib.import_module(name)
    return f"{name} {getattr(library, '__version__', 'unknown')}"
