"""The fast encoder gives the tokenizer's ids on every character there is, in every context that tokenizers look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as LibraryTokenizer

from megatron.config.sections.data import TokenizerConfig
from megatron.data.prepare.encoders import FastEncoder, TokenizerEncoder, build_encoder
from megatron.data.tokenizer import END_OF_DOCUMENT, build_tokenizer
from megatron.data.tokenizers.huggingface import LibraryTokenizer as OurTokenizer
from tests.helpers.tokenizer_files import TEXTS, train_bpe, write_tokenizers

CODE_POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]


def like_neox(folder: Path) -> Path:
    """GPT-NeoX-20B's form: NFC, and runs of spaces among the added tokens."""
    tokenizer: LibraryTokenizer = train_bpe([AddedToken(END_OF_DOCUMENT, special=True)])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * length, normalized=True) for length in range(24, 1, -1)])
    path = folder / "neox.json"
    tokenizer.save(str(path))
    return path


def texts(step: int) -> Iterator[str]:
    for first in range(0, len(CODE_POINTS), 256 * step):
        yield "".join(f"a{chr(c)}e\u0301 {chr(c)}1{chr(c)}.\n  '{chr(c)}s" for c in CODE_POINTS[first : first + 256])


@pytest.mark.parametrize("kind", ["plain", "like NeoX"])
@pytest.mark.parametrize("step", [400, pytest.param(1, marks=pytest.mark.full)])
def test_every_character(kind: str, step: int, tmp_path: Path) -> None:
    pytest.importorskip("fastokens")
    path = like_neox(tmp_path) if kind == "like NeoX" else write_tokenizers(tmp_path) / "tokenizer.json"
    tokenizer = build_tokenizer(TokenizerConfig(type="HFTokenizer", vocab_file=str(path)))
    fast, reference = build_encoder(tokenizer, "fastokens"), TokenizerEncoder(tokenizer)
    assert isinstance(fast, FastEncoder)
    for text in [*TEXTS, *texts(step)]:
        for ours, expected in zip(fast.encode([text, "", text]), reference.encode([text, "", text]), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_two_files_of_gpt2_are_encoded_fast_as_well(tmp_path: Path) -> None:
    """Special tokens in raw text stay text there."""
    pytest.importorskip("fastokens")
    write_tokenizers(tmp_path)
    names = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(tmp_path / "merges.txt")}
    tokenizer = build_tokenizer(TokenizerConfig(type="GPT2BPETokenizer", **names))
    assert isinstance(tokenizer, OurTokenizer)
    fast = build_encoder(tokenizer, "fastokens")
    ids, lengths = fast.encode(TEXTS)
    assert np.split(ids, np.cumsum(lengths)[:-1])[3].tolist() == tokenizer.tokenize("a<|endoftext|>b")
    assert tokenizer.eod not in ids


def test_other_kinds_encode_themselves(tmp_path: Path) -> None:
    write_tokenizers(tmp_path)
    for config in (
        TokenizerConfig(type="CharLevelTokenizer"),
        TokenizerConfig(type="SPMTokenizer", vocab_file=str(tmp_path / "plain.model")),
    ):
        tokenizer = build_tokenizer(config)
        ids, lengths = build_encoder(tokenizer, "auto").encode(TEXTS)
        assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == tokenizer.tokenize_batch(TEXTS)
