"""Tokenizers of Hugging Face's `tokenizers` library: from its own tokenizer.json, or from GPT-2's two files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from megatron.config.sections.data import TokenizerConfig
from megatron.data.tokenizer import (
    BEGINS_OF_SEQUENCE,
    END_OF_DOCUMENT,
    ENDS_OF_DOCUMENT,
    TOKENIZERS,
    configured_file,
    no_end_of_document,
)
from megatron.errors import DataError, UntypedErrorsAs
from megatron.io.json_files import describe_read_error, read_json_object


class LibraryTokenizer:
    """A tokenizer of the library, with the id of its end-of-document token.

    A tokenizer that could be loaded may still find, at some text, that it is not whole: that raises DataError as well.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eod: int, path: Path) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self.eod = eod
        self.bos = _first_id(tokenizer, BEGINS_OF_SEQUENCE)
        self.vocab_size = tokenizer.get_vocab_size()

    def vocabulary(self) -> list[tuple[int, str]]:
        return [(id_, token) for token, id_ in self._tokenizer.get_vocab().items()]

    def definition(self) -> str:
        """Returns the tokenizer as the content of a tokenizer.json."""
        with _library_errors(self._path):
            return self._tokenizer.to_str()

    def tokenize(self, text: str) -> list[int]:
        with _library_errors(self._path):
            return self._tokenizer.encode(text).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _library_errors(self._path):
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        with _library_errors(self._path):
            return self._tokenizer.decode([id_ for id_ in ids if id_ != self.eod])


@TOKENIZERS.register("HFTokenizer")
class HFTokenizer(LibraryTokenizer):
    """A tokenizer.json. Special tokens that occur in raw text become their ids, as in the published datasets.

    Its own template decides what a text begins with: that of LLaMA's puts <s> there, also in prepared data.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        path = configured_file(config.vocab_file, "vocab_file", config, "a tokenizer.json")
        if "model" not in _read_object(path):
            raise DataError(
                f"{path}: not a tokenizer.json (it has no 'model'). A vocab.json belongs to GPT2BPETokenizer."
            )
        tokenizer = read_tokenizer_json(path)
        eod = _first_id(tokenizer, ENDS_OF_DOCUMENT)
        if eod is None:
            raise no_end_of_document(path)
        super().__init__(tokenizer, eod, path)


def _first_id(tokenizer: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    """Returns the id of the first of the tokens that the tokenizer has."""
    return next((id_ for name in names if (id_ := tokenizer.token_to_id(name)) is not None), None)


@TOKENIZERS.register("GPT2BPETokenizer")
class GPT2BPETokenizer(LibraryTokenizer):
    """GPT-2's byte-level BPE from vocab.json and merges.txt. As in Megatron, special tokens in raw text are text."""

    def __init__(self, config: TokenizerConfig) -> None:
        path = configured_file(config.vocab_file, "vocab_file", config, "a vocab.json")
        content = _read_object(path)
        vocabulary = {token: id_ for token, id_ in content.items() if type(id_) is int and 0 <= id_ < 2**31}
        if len(vocabulary) < len(content):
            raise DataError(f"{path}: not a vocab.json (token to id). A tokenizer.json belongs to HFTokenizer.")
        if END_OF_DOCUMENT not in vocabulary:
            raise no_end_of_document(path)
        merges = _read_merges(configured_file(config.merge_file, "merge_file", config, "a merges.txt"))
        for left, right in merges:
            if left + right not in vocabulary:
                raise DataError(
                    f"{config.merge_file}: merges {left!r} and {right!r}, but {path} has no {left + right!r}. "
                    "The two files belong to different tokenizers."
                )
        with _library_errors(path):
            tokenizer = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        super().__init__(tokenizer, vocabulary[END_OF_DOCUMENT], path)


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Reads a tokenizer.json. Raises DataError when it is damaged or no tokenizer's."""
    with _library_errors(path):
        return tokenizers.Tokenizer.from_file(str(path))


def _library_errors(path: Path) -> UntypedErrorsAs:
    return UntypedErrorsAs(
        lambda error: DataError(f"{path}: not a whole tokenizer ({error}). Copy the tokenizer's files again.")
    )


def _read_object(path: Path) -> dict[str, object]:
    try:
        content = read_json_object(path)
        # Half of a surrogate pair is JSON, and no text.
        json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {describe_read_error(error)}. Copy the tokenizer's file again.") from error
    return content


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {describe_read_error(error)}. Copy the tokenizer's file again.") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        pair = line.split(" ")
        if len(pair) != 2:
            raise DataError(f"{path}:{number}: a merge is two tokens with a space between, not {line!r}.")
        merges.append((pair[0], pair[1]))
    return merges
