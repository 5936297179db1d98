"""Tokenizers turn text into token ids and back; NeoX's `tokenizer_type` selects one.

The kinds are in `tokenizers/`, which registers them under NeoX's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from megatron.config.sections.data import TokenizerConfig
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError, DataError
from megatron.io.checkout import hint_at_checkout
from megatron.registry import Registry

END_OF_DOCUMENT = "<|endoftext|>"
ENDS_OF_DOCUMENT = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>")
"""Names of the end-of-document token, in the order in which they are looked for: GPT-2's and NeoX's, then LLaMA's."""
BEGINS_OF_SEQUENCE = ("<s>", "<|begin_of_text|>")
"""Names of the begin-of-sequence token, LLaMA's first."""


class Tokenizer(Protocol):
    """The interface that training, data preparation and generation need."""

    @property
    def vocab_size(self) -> int:
        """Returns the number of token ids, special ones included, before padding."""

    @property
    def eod(self) -> int:
        """Returns the id of the end-of-document token."""

    def vocabulary(self) -> Iterable[tuple[int, str]]:
        """Returns every id with its token, in any order."""

    @property
    def bos(self) -> int | None:
        """Returns the id of the begin-of-sequence token; None for a tokenizer without one."""

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, without an end-of-document token."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `tokenize` of each text."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids; special tokens are left out."""


TOKENIZERS: Registry[Callable[[TokenizerConfig], Tokenizer]] = Registry("tokenizer", package="megatron.data.tokenizers")


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Builds the configured tokenizer.

    Raises ConfigError when a file is not configured, DataError when it is missing, damaged, or without an
    end-of-document token.
    """
    return TOKENIZERS[config.type](config)


def padded_vocab_size(model: ModelConfig, vocab_size: int) -> int:
    """Returns the rows of the embedding for a tokenizer of `vocab_size` ids.

    They are `padded_vocab_size`, or else the next multiple of `make_vocab_size_divisible_by`. Raises ConfigError when
    the configured number is smaller than the vocabulary.
    """
    if model.padded_vocab_size is None:
        multiple = model.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple
    if model.padded_vocab_size < vocab_size:
        raise ConfigError(
            f"padded_vocab_size: {model.padded_vocab_size} rows are too few for the tokenizer's {vocab_size} ids. "
            "Raise it, or leave it out to have it derived."
        )
    return model.padded_vocab_size


def configured_file(name: str | None, key: str, config: TokenizerConfig, content: str) -> Path:
    """Returns the path of a tokenizer's file, which `key` configures and which should hold `content`.

    Raises ConfigError when it is not configured, DataError when it is missing.
    """
    if name is None:
        raise ConfigError(f"{key}: {config.type} needs {content}; give its path as {key}.")
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{path}: no such file ({key}). {config.type} needs {content}.{hint_at_checkout(path)}")
    return path


def no_end_of_document(path: Path) -> DataError:
    """Returns the error about a tokenizer that lacks the end-of-document token."""
    return DataError(
        f"{path}: the tokenizer has no {END_OF_DOCUMENT} token, which marks the end of a document, nor "
        f"{' or '.join(ENDS_OF_DOCUMENT[1:])}. Use a tokenizer that has one, or add it to this one as a special token."
    )
