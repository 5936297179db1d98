"""Tokenizers by NeoX's names: text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from megatron.config.sections.data import TokenizerConfig
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError, DataError
from megatron.registry import Registry

END_OF_DOCUMENT = "<|endoftext|>"
_CHAR_LEVEL_VOCABULARY = 512
_CHAR_LEVEL_EOD = 0
_CHAR_LEVEL_PAD = 1


class Tokenizer(Protocol):
    """What training, data preparation and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Token ids, special ones included, before padding."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without an end-of-document token."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` of each text."""

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""


TOKENIZERS: Registry[Callable[[TokenizerConfig], Tokenizer]] = Registry("tokenizer")


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The configured tokenizer.

    Raises ConfigError when a file is not configured, DataError when it is missing, damaged, or without an
    end-of-document token.
    """
    return TOKENIZERS[config.type](config)


def padded_vocab_size(model: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding for a tokenizer of `vocab_size` ids: `model.padded_vocab_size`, or the next multiple of
    `make_vocab_size_divisible_by`. Raises ConfigError when the configured one is smaller than the vocabulary."""
    if model.padded_vocab_size is None:
        multiple = model.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple
    if model.padded_vocab_size < vocab_size:
        raise ConfigError(
            f"padded_vocab_size: {model.padded_vocab_size} rows are too few for the tokenizer's {vocab_size} ids. "
            "Raise it, or leave it out to have it derived."
        )
    return model.padded_vocab_size


class _LibraryTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, eod: int) -> None:
        self._tokenizer = tokenizer
        self.eod = eod
        self.vocab_size = tokenizer.get_vocab_size()

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([id_ for id_ in ids if id_ != self.eod])


@TOKENIZERS.register("HFTokenizer")
class HFTokenizer(_LibraryTokenizer):
    """A tokenizer.json of the `tokenizers` library. Special tokens that occur in raw text become their ids, as in the
    published datasets."""

    def __init__(self, config: TokenizerConfig) -> None:
        path = _vocab_file(config, "a tokenizer.json")
        if "model" not in _read_json(path):
            raise DataError(
                f"{path}: not a tokenizer.json (it has no 'model'). A vocab.json belongs to GPT2BPETokenizer."
            )
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        eod = tokenizer.token_to_id(END_OF_DOCUMENT)
        if eod is None:
            raise _no_end_of_document(path)
        super().__init__(tokenizer, eod)


@TOKENIZERS.register("GPT2BPETokenizer")
class GPT2BPETokenizer(_LibraryTokenizer):
    """GPT-2's byte-level BPE from vocab.json and merges.txt. As in Megatron, special tokens in raw text are text."""

    def __init__(self, config: TokenizerConfig) -> None:
        path = _vocab_file(config, "a vocab.json")
        content = _read_json(path)
        vocabulary = {token: id_ for token, id_ in content.items() if isinstance(id_, int)}
        if len(vocabulary) < len(content):
            raise DataError(f"{path}: not a vocab.json (token to id). A tokenizer.json belongs to HFTokenizer.")
        if END_OF_DOCUMENT not in vocabulary:
            raise _no_end_of_document(path)
        merges = _read_merges(_configured_file(config.merge_file, "merge_file", "GPT2BPETokenizer", "a merges.txt"))
        for left, right in merges:
            if left + right not in vocabulary:
                raise DataError(
                    f"{config.merge_file}: merges {left!r} and {right!r}, but {path} has no {left + right!r}. "
                    "The two files belong to different tokenizers."
                )
        tokenizer = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        super().__init__(tokenizer, vocabulary[END_OF_DOCUMENT])


@TOKENIZERS.register("SPMTokenizer")
class SPMTokenizer:
    """A SentencePiece .model. Its end-of-document token is the piece <|endoftext|>, or else the model's own </s>."""

    def __init__(self, config: TokenizerConfig) -> None:
        path = _vocab_file(config, "a SentencePiece .model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model ({error}).") from error
        piece = self._processor.piece_to_id(END_OF_DOCUMENT)
        self.eod = piece if piece != self._processor.unk_id() else self._processor.eos_id()
        if self.eod < 0:
            raise _no_end_of_document(path)
        self.vocab_size = self._processor.get_piece_size()

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts))
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([id_ for id_ in ids if id_ != self.eod])
        return text


@TOKENIZERS.register("CharLevelTokenizer")
class CharLevelTokenizer:
    """The bytes of UTF-8. NeoX's constants: 512 ids, end of document 0, padding 1."""

    def __init__(self, config: TokenizerConfig) -> None:
        del config  # bytes need no file
        self.vocab_size = _CHAR_LEVEL_VOCABULARY
        self.eod = _CHAR_LEVEL_EOD

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        return bytes(id_ for id_ in ids if _CHAR_LEVEL_PAD < id_ < 256).decode(errors="replace")


def _vocab_file(config: TokenizerConfig, what: str) -> Path:
    return _configured_file(config.vocab_file, "vocab_file", config.type, what)


def _configured_file(name: str | None, key: str, tokenizer_type: str, what: str) -> Path:
    if name is None:
        raise ConfigError(f"{key}: {tokenizer_type} needs {what}; give its path as {key}.")
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{path}: no such file ({key}). {tokenizer_type} needs {what}.")
    return path


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}). Copy the tokenizer's file again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a JSON {type(content).__name__}, not an object. Is it a tokenizer's file?")
    return content


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise DataError(f"{path}:{number}: a merge is two tokens with a space between, not {line!r}.")
        merges.append((pair[0], pair[1]))
    return merges


def _no_end_of_document(path: Path) -> DataError:
    return DataError(
        f"{path}: the tokenizer has no {END_OF_DOCUMENT} token, which marks the end of a document. Use a tokenizer "
        "that has one, or add it to this one as a special token."
    )
