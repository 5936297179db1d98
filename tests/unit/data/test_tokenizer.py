"""Tokenizers agree with independent implementations, and say what their files lack."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import regex
import sentencepiece

from megatron.config.sections.data import TokenizerConfig, TokenizerType
from megatron.config.sections.model import ModelConfig
from megatron.data.tokenizer import (
    END_OF_DOCUMENT,
    TOKENIZERS,
    Tokenizer,
    build_tokenizer,
    padded_vocab_size,
)
from megatron.errors import ConfigError, DataError
from tests.helpers.tokenizer_files import TEXTS, write_tokenizers


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json, vocab.json, merges.txt and SentencePiece models."""
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def build(kind: str, files: Path, vocab: str | None, merges: str | None = None) -> Tokenizer:
    return build_tokenizer(
        TokenizerConfig(
            type=kind,
            vocab_file=None if vocab is None else str(files / vocab),
            merge_file=None if merges is None else str(files / merges),
        )
    )


BUILDERS: dict[str, Callable[[Path], Tokenizer]] = {
    "HFTokenizer": lambda files: build("HFTokenizer", files, "tokenizer.json"),
    "GPT2BPETokenizer": lambda files: build("GPT2BPETokenizer", files, "vocab.json", "merges.txt"),
    "SPMTokenizer": lambda files: build("SPMTokenizer", files, "plain.model"),
    "CharLevelTokenizer": lambda files: build("CharLevelTokenizer", files, None),
}


def test_every_configurable_tokenizer_is_registered() -> None:
    assert set(TOKENIZERS) == set(get_args(TokenizerType)) == set(BUILDERS)


@pytest.mark.parametrize("kind", BUILDERS)
def test_batches_equal_single_texts(files: Path, kind: str) -> None:
    tokenizer = BUILDERS[kind](files)
    assert tokenizer.tokenize_batch(TEXTS) == [tokenizer.tokenize(text) for text in TEXTS]
    assert tokenizer.tokenize_batch([]) == []
    assert tokenizer.tokenize("") == []
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer", "CharLevelTokenizer"])
@pytest.mark.parametrize("text", [text for text in TEXTS if END_OF_DOCUMENT not in text])
def test_text_survives_the_round_trip(files: Path, kind: str, text: str) -> None:
    tokenizer = BUILDERS[kind](files)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod]) == text


def test_special_tokens_in_text_become_ids_as_in_the_published_data(files: Path) -> None:
    tokenizer = BUILDERS["HFTokenizer"](files)
    a, b = tokenizer.tokenize("a"), tokenizer.tokenize("b")
    assert tokenizer.tokenize("a<|endoftext|>b") == [*a, tokenizer.eod, *b]


def gpt2_reference(vocab: dict[str, int], merges: list[tuple[str, str]], text: str) -> list[int]:
    """Sennrich's merging, lowest rank first, on GPT-2's pieces of text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    pieces = regex.findall(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text)
    ids = []
    for piece in pieces:
        symbols = [symbol[byte] for byte in piece.encode()]
        while len(symbols) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
            if rank == len(ranks):
                break
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        ids += [vocab[merged] for merged in symbols]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_bpe_equals_the_reference(files: Path, text: str) -> None:
    """Special tokens in text are text to it, as in Megatron."""
    vocab = json.loads((files / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (files / "merges.txt").read_text().split("\n")[1:-1]]
    assert len(merges) > 40
    assert BUILDERS["GPT2BPETokenizer"](files).tokenize(text) == gpt2_reference(vocab, merges, text)


def test_characters_are_bytes() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(type="CharLevelTokenizer"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (512, 0)
    assert tokenizer.tokenize("aé\n") == [97, 195, 169, 10]
    assert tokenizer.detokenize([97, 0, 1, 195, 169, 300]) == "aé"
    assert tokenizer.detokenize([195]) == "�"


def test_sentencepiece_end_of_document(files: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(files / "with_eod.model"))
    with_piece = build("SPMTokenizer", files, "with_eod.model")
    assert with_piece.eod == processor.piece_to_id(END_OF_DOCUMENT) != processor.eos_id()
    plain = build("SPMTokenizer", files, "plain.model")
    assert plain.eod == sentencepiece.SentencePieceProcessor(model_file=str(files / "plain.model")).eos_id()
    assert plain.detokenize([*plain.tokenize("the lazy dog"), plain.eod]) == "the lazy dog"


def model_config(**changes: int) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8, "max_position_embeddings": 8}
    return ModelConfig(architecture="gpt_neox", pos_emb="rotary", **(sizes | changes))


def test_vocabulary_is_padded_as_published() -> None:
    assert padded_vocab_size(model_config(), 50277) == 50304
    assert padded_vocab_size(model_config(), 50304) == 50304
    assert padded_vocab_size(model_config(make_vocab_size_divisible_by=64), 2000) == 2048
    assert padded_vocab_size(model_config(padded_vocab_size=50432), 50277) == 50432
    with pytest.raises(ConfigError, match=r"padded_vocab_size: 100 rows are too few for the tokenizer's 101 ids"):
        padded_vocab_size(model_config(padded_vocab_size=100), 101)


@pytest.mark.parametrize(
    ("kind", "vocab", "merges", "error", "message"),
    [
        ("HFTokenizer", None, None, ConfigError, "vocab_file: HFTokenizer needs a tokenizer.json"),
        ("HFTokenizer", "nowhere.json", None, DataError, r"nowhere\.json: no such file \(vocab_file\)"),
        ("HFTokenizer", "vocab.json", None, DataError, r"vocab\.json: not a tokenizer\.json .* GPT2BPETokenizer"),
        ("HFTokenizer", "merges.txt", None, DataError, r"merges\.txt: not JSON"),
        ("HFTokenizer", "no_eod.json", None, DataError, r"no_eod\.json: the tokenizer has no <\|endoftext\|>"),
        ("GPT2BPETokenizer", "vocab.json", None, ConfigError, "merge_file: GPT2BPETokenizer needs a merges.txt"),
        ("GPT2BPETokenizer", "tokenizer.json", "merges.txt", DataError, "not a vocab.json .* HFTokenizer"),
        ("GPT2BPETokenizer", "vocab.json", "vocab.json", DataError, r"vocab\.json:1: a merge is two tokens"),
        (
            "GPT2BPETokenizer",
            "vocab.json",
            "foreign.txt",
            DataError,
            r"foreign\.txt: merges 'q' and 'x', but .*no 'qx'",
        ),
        ("GPT2BPETokenizer", "small.json", "merges.txt", DataError, r"small\.json: the tokenizer has no <\|endoftext"),
        ("SPMTokenizer", "tokenizer.json", None, DataError, r"tokenizer\.json: not a SentencePiece model"),
        ("SPMTokenizer", "no_eod.model", None, DataError, r"no_eod\.model: the tokenizer has no <\|endoftext"),
        ("HFTokenizer", "list.json", None, DataError, r"list\.json: holds a JSON list"),
    ],
)
def test_unusable_files_are_named(
    files: Path, kind: str, vocab: str | None, merges: str | None, error: type[Exception], message: str
) -> None:
    (files / "foreign.txt").write_text("q x\n")
    (files / "small.json").write_text('{"a": 0}')
    (files / "list.json").write_text("[]")
    with pytest.raises(error, match=message):
        build(kind, files, vocab, merges)
