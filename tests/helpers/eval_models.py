"""A tiny model whose tokens all have a text, so that evaluation and generation can read what it says."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from megatron.data.tokenizer import END_OF_DOCUMENT
from tests.helpers.tiny_checkpoints import MODELS, VOCAB, write_yaml

CONTEXT = 64
"""Tokens that the model reads."""


def write_eval_config(folder: Path) -> Path:
    """Writes the YAML of a tiny TokenFormer and its tokenizer to `folder`; standard errors come from few resamples."""
    tokenizer = {"tokenizer_type": "HFTokenizer", "vocab_file": str(train_tokenizer(folder / "tokenizer.json"))}
    lengths = {"seq_length": CONTEXT, "max_position_embeddings": CONTEXT}
    return write_yaml(folder, MODELS["l2_norm_gelu"] | lengths | tokenizer | {"eval_bootstrap_iters": 1000})


def train_tokenizer(path: Path) -> Path:
    """Trains a byte-level BPE of as many tokens as the tiny checkpoints have on a module's text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCAB.actual, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    tokenizer.save(str(path))
    return path
