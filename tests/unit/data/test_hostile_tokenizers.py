"""Damaged and hostile tokenizer files: refused by a DataError that names them, or a whole tokenizer.

Accepted, though it differs from the original: a file that is well formed, as with another letter inside a token.
Nothing in it can tell. A run that resumes compares the file's SHA-256 with that of its first start (data_fingerprint).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.sections.data import TokenizerConfig
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from tests.helpers.mutations import Findings, damaged_bytes, damaged_json, settings_of
from tests.helpers.tokenizer_files import TEXTS, write_tokenizers

FILES = {
    "HFTokenizer": ("tokenizer.json", None),
    "GPT2BPETokenizer": ("vocab.json", "merges.txt"),
    "SPMTokenizer": ("with_eod.model", None),
}
OTHER = "another whole tokenizer"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizers(tmp_path_factory.mktemp("originals"))


def encoded(kind: str, folder: Path) -> tuple[list[list[int]], list[str], int, int]:
    """Everything that a tokenizer made of these files does with the texts."""
    vocabulary, merges = FILES[kind]
    config = TokenizerConfig(
        type=kind, vocab_file=str(folder / vocabulary), merge_file=None if merges is None else str(folder / merges)
    )
    tokenizer: Tokenizer = build_tokenizer(config)
    ids = tokenizer.tokenize_batch(TEXTS)
    assert ids == [tokenizer.tokenize(text) for text in TEXTS]
    return ids, [tokenizer.detokenize(each) for each in ids], tokenizer.vocab_size, tokenizer.eod


@st.composite
def changes(draw: st.DrawFn, originals: Path) -> tuple[str, str, bytes]:
    """A kind of tokenizer, one of its files, and the file's new content."""
    kind = draw(st.sampled_from(["HFTokenizer", *FILES]))
    name = draw(st.sampled_from([name for name in FILES[kind] if name is not None]))
    content = (originals / name).read_bytes()
    damage = damaged_bytes(content)
    return kind, name, draw(damage | damaged_json(json.loads(content)) if name.endswith(".json") else damage)


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_damaged_tokenizers(examples: int, originals: Path, tmp_path: Path) -> None:
    expected = {kind: encoded(kind, originals) for kind in FILES}
    found = Findings()

    @settings_of(examples)
    @given(changes(originals))
    def read(change: tuple[str, str, bytes]) -> None:
        kind, name, content = change
        for file in filter(None, FILES[kind]):
            shutil.copy(originals / file, tmp_path)
        (tmp_path / name).write_bytes(content)
        got = found.read(lambda: encoded(kind, tmp_path), tmp_path)
        if got is not None:
            found.accept("read as it was" if got == expected[kind] else OTHER)

    read()
    found.report()
    assert found.counts[OTHER] <= examples // 20
