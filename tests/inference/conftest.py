"""A tiny model that was scored nowhere before, its export, and tasks to score it on."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.data.tokenizer import END_OF_DOCUMENT
from tests.helpers.eval_tasks import write_tasks
from tests.hf.checkpoints import MODELS, VOCAB, export, make_checkpoint, write_yaml

CONTEXT = 64


@pytest.fixture(scope="package")
def eval_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a tiny TokenFormer that reads 64 tokens, and whose tokens all have a text."""
    folder = tmp_path_factory.mktemp("evaluated")
    tokenizer = {"tokenizer_type": "HFTokenizer", "vocab_file": str(train_tokenizer(folder / "tokenizer.json"))}
    lengths = {"seq_length": CONTEXT, "max_position_embeddings": CONTEXT}
    return write_yaml(folder, MODELS["l2_norm_gelu"] | lengths | tokenizer)


def train_tokenizer(path: Path) -> Path:
    """A byte-level BPE of as many tokens as the checkpoints of tests/hf have, from a module's text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCAB.actual, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="package")
def eval_checkpoint(eval_config: Path) -> Checkpoint:
    """Its checkpoint, of one rank."""
    return make_checkpoint(eval_config)


@pytest.fixture(scope="package")
def eval_export(eval_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder exported from it."""
    return export(eval_checkpoint, tmp_path_factory.mktemp("eval_export") / "hf")


@pytest.fixture(scope="package")
def eval_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An include path with the tasks of tests/helpers/eval_tasks.py."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))
