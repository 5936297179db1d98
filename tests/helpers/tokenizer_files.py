"""Tiny tokenizers of every kind, trained on the spot."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from megatron.data.tokenizer import END_OF_DOCUMENT

CORPUS = ["The quick brown fox jumps over the lazy dog.", "It's the fox's den; don't they say so?"] * 20
TEXTS = ["The foxes' den", "  two  spaces\n\tand tabs", "naïve Straße 東京 🦊", "a<|endoftext|>b", "don't 1234"]


def train_bpe(special: list[AddedToken]) -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_tokenizers(folder: Path) -> Path:
    """Writes tokenizer.json, vocab.json, merges.txt and SentencePiece models into `folder`; returns it."""
    trained = train_bpe([AddedToken(END_OF_DOCUMENT, special=True)])
    trained.save(str(folder / "tokenizer.json"))
    model = json.loads(trained.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    train_bpe([]).save(str(folder / "no_eod.json"))
    for name, extra in {
        "plain": {},
        "with_eod": {"user_defined_symbols": [END_OF_DOCUMENT]},
        "no_eod": {"eos_id": -1},
    }.items():
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=written, vocab_size=40, minloglevel=2, **extra
        )
        (folder / f"{name}.model").write_bytes(written.getvalue())
    return folder


def write_sentencepiece(file: Path) -> Path:
    """Writes a SentencePiece model as LLaMA's is, byte-pair encoding that falls back to bytes; returns its path."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    file.write_bytes(written.getvalue())
    return file
