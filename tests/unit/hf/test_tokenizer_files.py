"""Tokenizers of both kinds of files, as transformers loads them from an exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import ByteLevelBPETokenizer
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer

from megatron.config.sections.data import TokenizerConfig
from megatron.data.tokenizer import END_OF_DOCUMENT, build_tokenizer
from megatron.errors import DataError
from megatron.hf import tokenizer_files
from megatron.hf.tokenizer_files import PADDING, write_tokenizer
from tests.helpers.models import tiny_pythia

TEXT = ["The parameter tokens attend to the tokens of the sequence, and the tokens of the sequence to them."] * 20
SAMPLE = "Tokens of the sequence:\n\n  naïve 中 🙂\t!"


@pytest.fixture(params=["HFTokenizer", "GPT2BPETokenizer"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> TokenizerConfig:
    """A byte-level BPE of 320 ids; end of document 0, as in Pythia's, and for HFTokenizer padding 1."""
    library = ByteLevelBPETokenizer()
    special = [END_OF_DOCUMENT, PADDING] if request.param == "HFTokenizer" else [END_OF_DOCUMENT]
    library.train_from_iterator(TEXT, vocab_size=320, min_frequency=1, special_tokens=special, show_progress=False)
    if request.param == "HFTokenizer":
        library.save(str(tmp_path / "trained.json"))
        return TokenizerConfig(type=request.param, vocab_file=str(tmp_path / "trained.json"))
    vocab, merges = library.save_model(str(tmp_path), "trained")
    return TokenizerConfig(type=request.param, vocab_file=vocab, merge_file=merges)


def test_transformers_encodes_and_decodes_as_training_did(trained: TokenizerConfig, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "hf", trained, tiny_pythia(max_position_embeddings=64))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), build_tokenizer(trained)
    ids = theirs(SAMPLE)["input_ids"]
    assert ids == ours.tokenize(SAMPLE)
    assert theirs.decode(ids) == SAMPLE
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (ours.eod, ours.eod, ours.vocab_size)
    assert theirs.pad_token == (PADDING if trained.type == "HFTokenizer" else END_OF_DOCUMENT)
    assert (theirs.model_max_length, theirs.padding_side) == (64, "left")
    assert theirs(END_OF_DOCUMENT)["input_ids"] == [ours.eod]


def test_a_tokenizer_that_encodes_otherwise_is_refused(
    trained: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lowercased(config: TokenizerConfig, ours: object) -> tokenizers.Tokenizer:
        theirs = right(config, ours)
        theirs.normalizer = Lowercase()
        return theirs

    right = tokenizer_files.TOKENIZER_FILES[trained.type]
    monkeypatch.setattr(tokenizer_files, "TOKENIZER_FILES", {trained.type: lowercased})
    with pytest.raises(DataError, match="transformers encodes 'The quick brown fox"):
        write_tokenizer(tmp_path / "hf", trained, tiny_pythia(max_position_embeddings=64))


def test_older_versions_of_transformers_know_the_class(trained: TokenizerConfig, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "hf", trained, tiny_pythia(max_position_embeddings=64))
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
