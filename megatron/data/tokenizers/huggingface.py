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
from megatron.data.tokenizer import END_OF_DOCUMENT, TOKENIZERS, configured_file, no_end_of_document
from megatron.errors import DataError


class LibraryTokenizer:
    """A tokenizer of the library, with the id of its end-of-document token."""

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
class HFTokenizer(LibraryTokenizer):
    """A tokenizer.json. Special tokens that occur in raw text become their ids, as in the published datasets."""

    def __init__(self, config: TokenizerConfig) -> None:
        path = configured_file(config.vocab_file, "vocab_file", config, "a tokenizer.json")
        if "model" not in _read_json(path):
            raise DataError(
                f"{path}: not a tokenizer.json (it has no 'model'). A vocab.json belongs to GPT2BPETokenizer."
            )
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        eod = tokenizer.token_to_id(END_OF_DOCUMENT)
        if eod is None:
            raise no_end_of_document(path)
        super().__init__(tokenizer, eod)


@TOKENIZERS.register("GPT2BPETokenizer")
class GPT2BPETokenizer(LibraryTokenizer):
    """GPT-2's byte-level BPE from vocab.json and merges.txt. As in Megatron, special tokens in raw text are text."""

    def __init__(self, config: TokenizerConfig) -> None:
        path = configured_file(config.vocab_file, "vocab_file", config, "a vocab.json")
        content = _read_json(path)
        vocabulary = {token: id_ for token, id_ in content.items() if isinstance(id_, int)}
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
        tokenizer = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        super().__init__(tokenizer, vocabulary[END_OF_DOCUMENT])


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
